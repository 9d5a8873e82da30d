"""Format 3 is frozen: golden files, the specification's own reader, the same bytes."""

import ast
import json
import pathlib
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.coding import array_codecs
from jaxcompress.coding.floats.bit_fields import SPLITS
from jaxcompress.quantization.grids import GRIDS
from jaxcompress.storage import archive
from jaxcompress.storage.static_json import DTYPES

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS, GOLDEN = ROOT / "scripts", ROOT / "tests" / "data" / "format3"
RECORD = json.loads((GOLDEN / "digests.json").read_text())
NAMES = pytest.mark.parametrize("name", RECORD["dense"])


@pytest.fixture
def scripts(monkeypatch):
    """The scripts that write golden files and read them without JAX."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import read_file
    import write_golden_files

    yield read_file, write_golden_files
    for name in [name for name in sys.modules if name.startswith("read_")]:
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def nodes(x):
    """Every JSON object in a tree."""
    if isinstance(x, dict):
        yield x
    for child in x.values() if isinstance(x, dict) else x if type(x) is list else ():
        yield from nodes(child)


@NAMES
def test_golden_files_are_read(name, scripts):
    """Bit for bit: every dense array has the digest that it had when it was written."""
    tree = jc.load(GOLDEN / f"{name}.safetensors", numpy=True)
    # Compiled together where there are many small operations, for speed.
    dense = jax.jit(jc.materialize) if name == "quantized" else jc.materialize
    tree = nn.meta.unbox(dense(tree))
    assert scripts[1].dense_digests(tree) == RECORD["dense"][name]


@NAMES
def test_the_reader_of_the_specification_reads_the_same(name, scripts):
    found = scripts[0].load(GOLDEN / f"{name}.safetensors")
    assert scripts[1].dense_digests(found) == RECORD["dense"][name]


def test_archives_are_unpacked_by_both(scripts, tmp_path):
    reader, writer = scripts
    old, new = (writer.write_directory(tmp_path, name) for name in ("old", "new"))
    for root, file, base in (
        (old, "archive", None),
        (new, "archive_of_differences", old),
    ):
        path, ours, theirs = (
            GOLDEN / f"{file}.safetensors",
            tmp_path / f"{file}_1",
            tmp_path / f"{file}_2",
        )
        archive.unpack(path, ours, base=base)
        reader.unpack_archive(path, theirs, base)
        for one in root.rglob("*.*"):
            for folder in (ours, theirs):
                found = folder / one.relative_to(root)
                assert found.read_bytes() == one.read_bytes()


@pytest.mark.slow
def test_the_same_trees_are_the_same_bytes(scripts, tmp_path):
    """Where the compressors are those that wrote the golden files: every byte."""
    writer = scripts[1]
    writer.write_all(tmp_path)
    zlib_same, zstd_same = (
        a == b for a, b in zip(writer.probes(), RECORD["probes"], strict=True)
    )
    if not zlib_same:
        pytest.skip("another zlib")
    frames = {"floats", "codings", "fast_codings", "archive", "archive_of_differences"}
    for name, digest in writer.file_digests(tmp_path).items():
        if zstd_same or name.split(".")[0] not in frames:
            assert RECORD["files"][name] == digest, name
    assert writer.file_digests(GOLDEN) == RECORD["files"]


def test_golden_files_hold_all_that_the_format_has(scripts):
    """A new leaf type, grid, dtype, coding or form of node must join them."""
    reader = scripts[0]
    stores = [reader.Store(GOLDEN / f"{name}.safetensors") for name in RECORD["dense"]]
    found = [node for store in stores for node in nodes(store.about["tree"])]
    written = {
        cls.name
        for path in (ROOT / "jaxcompress").rglob("*.py")
        for cls in ast.walk(ast.parse(path.read_text()))
        if isinstance(cls, ast.ClassDef)
        and any(getattr(one, "id", "") == "leaf" for one in cls.decorator_list)
        and "for_files: ClassVar[bool] = False" not in ast.unparse(cls)
    }
    assert len(written) >= 16
    assert {node["leaf"] for node in found if "leaf" in node} == written
    assert {
        node["static"]["grid"] for node in found if "grid" in node.get("static", ())
    }
    masks = [node["fields"]["mask"] for node in found if node.get("leaf") == "Sparse"]
    assert None in masks and any(masks)
    grids = {node["static"].get("grid") for node in found if "static" in node}
    assert grids >= set(GRIDS)
    assert {node["array"] for node in found if "array" in node} == DTYPES
    forms = {key for node in found for key in node}
    assert forms >= {"dict", "list", "tuple", "same", "box", "stored", "fields"}
    codings = {coding for store in stores for _, coding in store.arrays.values()}
    wanted = {*SPLITS, "halves", "palette", "zstd"}
    assert len(wanted) == array_codecs.CODINGS and codings - {None} == wanted
    splits = {node["static"].get("split") for node in found if "static" in node}
    assert splits >= set(SPLITS) - {"bytes"}


def test_the_reader_of_the_specification_stands_alone():
    allowed = {"argparse", "functools", "hashlib", "json", "math", "pathlib", "zlib"}
    allowed |= {"numpy", "zstandard"}
    for path in SCRIPTS.glob("read_*.py"):
        text = path.read_text()
        assert text.count("\n") < 300
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [getattr(node, "module", None) or node.names[0].name]
                named += [one.name for one in getattr(node, "names", ())][1:]
                root = (getattr(node, "module", None) or named[0]).split(".")[0]
                assert root in allowed or (SCRIPTS / f"{root}.py").exists(), root


def test_the_reader_of_the_specification_sees_damage(scripts, tmp_path):
    raw = bytearray((GOLDEN / "integers.safetensors").read_bytes())
    for at in np.linspace(8, len(raw) - 1, 9).astype(int):
        other = raw.copy()
        other[at] ^= 4
        (tmp_path / "x").write_bytes(other)
        with pytest.raises(ValueError):
            scripts[0].load(tmp_path / "x")

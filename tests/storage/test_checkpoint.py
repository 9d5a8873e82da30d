"""Files come back bit for bit, or not at all."""

import gc
import hashlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import tracemalloc
import types
import zlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax.core import FrozenDict, freeze
from trees_for_tests import (
    NARROW,
    RNG,
    TREES,
    Labelled,
    Padded,
    bits,
    check_same,
    on_device,
    trees,
)

import jaxcompress as jc
import jaxcompress.coding
import jaxcompress.quantization
from jaxcompress import storage
from jaxcompress.storage import checkpoint, checksummed_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@trees
def test_load_gives_the_same_tree(name, path):
    storage.save(path, TREES[name], {"recipe": [["a.*", "symmetric(bits=4)"]]})
    check_same(storage.load(path), TREES[name])
    with storage.open_checkpoint(path) as file:
        assert file.metadata == {"recipe": [["a.*", "symmetric(bits=4)"]]}
        assert file.versions["jax"] == jax.__version__
    on_host = storage.load(path, numpy=True)
    check_same(on_host, jax.tree.map(np.asarray, TREES[name]))


@pytest.mark.parametrize(
    "recipe",
    [
        "symmetric(bits=3, block=16)",
        "asymmetric(bits=4)",
        "sign_split(bits=(3, 3))",
        ("symmetric(bits=4)", "entropy_code()"),
        "code_floats()",
        ("asymmetric(bits=2, block=16)", "entropy_code()", "code_floats()"),
    ],
)
def test_what_compress_makes_comes_back(recipe, path):
    stages = (recipe,) if isinstance(recipe, str) else recipe
    params = {
        "kernel": jnp.asarray(RNG.normal(size=(96, 64)), jnp.bfloat16),
        "embedding": jnp.asarray(RNG.normal(size=(80, 64)), jnp.float32),
    }
    small = jc.compress(params, jc.chain(*stages))
    assert jax.tree.structure(small) != jax.tree.structure(params)
    storage.save(path, small)
    check_same(storage.load(path), small)
    assert path.stat().st_size < jc.nbytes(params) + 4000
    storage.save_orbax(path.with_suffix(".orbax"), small)
    check_same(storage.restore_orbax(path.with_suffix(".orbax")), small)


def test_numpy_oddities_and_other_mappings_are_kept_by_value(path):
    big_endian = np.arange(3, dtype=">i4")
    turned = np.arange(6, dtype=np.int8).reshape(2, 3).T
    values = {"b": big_endian, "t": turned, "s": np.float32(2)}
    storage.save(path, types.MappingProxyType(values))
    found = storage.load(path)
    assert type(found) is dict
    assert found["b"].tolist() == [0, 1, 2]
    assert found["t"].tolist() == turned.tolist()
    assert found["s"].shape == ()


def test_same_tree_same_bytes(path, tmp_path):
    tree = TREES["nesting"]
    storage.save(path, tree, {"b": 1, "a": 2})
    other = tmp_path / "other.safetensors"
    storage.save(other, dict(reversed(tree.items())), {"b": 1, "a": 2})
    assert path.read_bytes() == other.read_bytes()


def test_a_leaf_may_keep_less_in_the_file(path):
    storage.save(path, TREES["nesting"])
    with safetensors.safe_open(path, "np") as file:
        assert [n for n in file.keys() if "padded" in n] == ["padded/short"]  # noqa: SIM118
        assert file.get_tensor("padded/short").shape == (6,)


def test_other_readers_can_read_it(path):
    plain = [
        d for d in NARROW if d in checksummed_file.CODES and not d.startswith("float8")
    ]
    tree = {d: bits(d) for d in plain if d != "bfloat16"}
    storage.save(path, {"layer": tree})
    found = safetensors.numpy.load_file(path)
    seal = found.pop(checksummed_file.SEAL)
    about = json.loads(zlib.decompress(found.pop(checksummed_file.ABOUT)))
    assert about.keys() == {"metadata", "tree", "versions"}
    assert seal.shape == (len(tree) + 3, 16)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert start % 8 == 0
    header = json.loads(raw[8:start])
    order = sorted(tree, key=lambda dtype: (-tree[dtype].itemsize, dtype))
    assert [*header][1:-2] == [f"layer/{dtype}" for dtype in order]
    for dtype, x in tree.items():
        assert header[f"layer/{dtype}"]["data_offsets"][0] % x.itemsize == 0
    for dtype, x in tree.items():
        assert found[f"layer/{dtype}"].tobytes() == x.tobytes()
        assert found[f"layer/{dtype}"].dtype == x.dtype


class Pair(NamedTuple):
    a: Any


class Stranger(jc.Leaf):
    pass


class Crate(nn.Partitioned):
    """A box of somebody's own."""

    def __init__(self, value):
        super().__init__(value, names=("x",))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": {"b": 1.5}}, "a/b is the Python float 1.5; .*jnp.asarray"),
        ({"a": "text"}, "a is the Python str"),
        ({"a": Pair(jnp.ones(1))}, "a is a .*Pair"),
        ({"a": jax.random.key(0)}, "a holds random keys; store jax.random.key_data"),
        ({"a": np.array(["x"])}, "a has dtype <U1"),
        ({"a": jax.ShapeDtypeStruct((1,), "int8")}, "a is a .*ShapeDtypeStruct"),
        ({"a": Stranger()}, "a: .*Stranger.* is not registered"),
        ({"a": {"b": jnp.ones(1), 1: jnp.ones(1)}}, "a: keys .*all strings"),
        ({"a": {True: jnp.ones(1)}}, "a: keys .*all strings"),
        ({"a": Labelled(jnp.ones(1), None, [1], "", 1.0)}, r"a/sizes is \[1\]"),
        ({"a": Labelled(jnp.ones(1), None, (1,), "", 1.0)}, r"a/sizes .*declares"),
        ({"a": Padded(jnp.ones(8), jnp.ones(1), np.int64(3))}, "a/length is"),
        ({"__checksums__": jnp.ones(1)}, "can't be called __checksums__"),
        ({"__about__": jnp.ones(1)}, "can't be called __about__"),
        ({"a": Crate(jnp.ones(1))}, "a is in a box of .*Crate"),
    ],
)
def test_what_files_do_not_keep_is_named(tree, words, path):
    with pytest.raises((TypeError, ValueError), match=words):
        storage.save(path, tree)
    assert list(path.parent.iterdir()) == []


def test_tracers_and_odd_metadata_are_refused(path):
    with pytest.raises(TypeError, match=r"a is a .*Tracer"):
        jax.jit(lambda x: storage.save(path, {"a": x}))(jnp.ones(1))
    for odd in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(TypeError, match="metadata must be JSON"):
            storage.save(path, {}, odd)


def corruptions(raw):
    """Each a damaged copy of the bytes: 200, and some chosen ones."""
    size = len(raw)
    start = 8 + int.from_bytes(raw[:8], "little")
    at = [*range(0, 64), *range(start - 8, start + 24), *range(size - 36, size)]
    at += RNG.integers(0, size, 140).tolist()
    for place in at:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(RNG.integers(8))
        yield f"bit at {place}", bytes(damaged)
    for cut in [0, 1, 7, 8, 9, start, size - 1, *RNG.integers(0, size, 20).tolist()]:
        yield f"cut at {cut}", raw[:cut]
    for more in (b"\0", b"x" * 16, raw[-32:], raw):
        yield f"{len(more)} bytes more", raw + more
    digits = [i for i in range(8, start) if raw[i : i + 1].isdigit()]
    for place in RNG.choice(digits, 30).tolist():
        other = (raw[place] - 48 + int(RNG.integers(1, 10))) % 10 + 48
        yield f"digit at {place}", raw[:place] + bytes([other]) + raw[place + 1 :]
    for _ in range(20):
        a, b = sorted(RNG.integers(start, size - 8, 2).tolist())
        damaged = bytearray(raw)
        damaged[a : a + 8], damaged[b : b + 8] = raw[b : b + 8], raw[a : a + 8]
        if damaged != raw:
            yield f"swap of {a} and {b}", bytes(damaged)


def test_every_corruption_is_detected(path):
    storage.save(path, {"n": TREES["nesting"], "d": bits("float32", (40, 3))}, {"a": 1})
    raw, count = path.read_bytes(), 0
    assert storage.verify(path)["bytes"] == len(raw)
    for what, damaged in corruptions(raw):
        path.write_bytes(damaged)
        for read in (storage.load, storage.verify):
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error)
            else:
                pytest.fail(f"{what} went unnoticed by {read.__name__}")
        count += 1
    assert count > 300


def forge(path, edit):
    """Rewrites a file after `edit(header, tree, data)`, with checksums that fit.

    What `edit` returns, if anything, is written as the text of the tree.
    """
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    first, end = header["__about__"]["data_offsets"]
    about = json.loads(zlib.decompress(raw[start + first : start + end]))
    data = bytearray(raw[start : start + first])
    text = edit(header, about["tree"], data) or json.dumps(about["tree"])
    about = f'{{"metadata":{{}},"versions":{{}},"tree":{text}}}'
    data += zlib.compress(about.encode())
    header["__about__"] |= {"shape": [len(data) - first]}
    header["__about__"]["data_offsets"] = [first, len(data)]
    size = header["__checksums__"]["data_offsets"][1] - end
    header["__checksums__"]["data_offsets"] = [len(data), len(data) + size]
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    digest = lambda x: hashlib.blake2b(x, digest_size=16).digest()  # noqa: E731
    names = [n for n in header if n in "abc" or n == "c/inner"]
    names = [n for n in names if type(header[n]) is dict]
    names.sort(key=lambda n: header[n]["data_offsets"])
    names.append("__about__")
    rows = [digest(data[slice(*header[n]["data_offsets"])]) for n in names]
    rows.append(digest(head))
    rows.append(digest(b"".join(rows)))
    path.write_bytes(head + data + b"".join(rows))


def change(*keys, value, place="tree"):
    def edit(header, tree, data):
        *most, last = keys
        inner = header if place == "header" else tree
        for key in most:
            inner = inner[key]
        inner[last] = value

    return edit


def drop_array(header, tree, data):
    tree["dict"].pop(0)


def move(header, tree, data):
    header["a"]["data_offsets"], header["b"]["data_offsets"] = [12, 24], [0, 12]
    header["a"]["data_offsets"][1] += 2**40


def twins(header, tree, data):
    tree["dict"] += [[1, None], ["1", None]]


LEAF = ("dict", 2, 1)
LIES = {
    "nothing": None,
    "a shape in the tree": change("dict", 0, 1, "shape", value=[4]),
    "a negative size": change("dict", 0, 1, "shape", value=[-3]),
    "an enormous size": change("dict", 0, 1, "shape", value=[2**80]),
    "a dtype in the tree": change("dict", 0, 1, "array", value="int32"),
    "no dtype": change("dict", 0, 1, "array", value="object"),
    "a dtype in the header": change("a", "dtype", value="I32", place="header"),
    "an unknown dtype": change("a", "dtype", value="F7", place="header"),
    "a shape in the header": change("a", "shape", value=[2, 3], place="header"),
    "offsets": change("a", "data_offsets", value=[0, 16], place="header"),
    "offsets outside": move,
    "an entry": change("a", value=7, place="header"),
    "an array that only the header has": drop_array,
    "an array that only the tree has": change("dict", 0, 0, value="z"),
    "two equal keys": change("dict", 0, 0, value="b"),
    "a key as a number and as text": twins,
    "a key": change("dict", 0, 0, value=None),
    "a node": change("dict", 0, 1, value={"set": []}),
    "a leaf type": change(*LEAF, "leaf", value="Labelled"),
    "an unknown leaf type": change(*LEAF, "leaf", value="os.system"),
    "a static field's type": change(*LEAF, "static", "sizes", value=[2, 2.5]),
    "a static field's kind": change(*LEAF, "static", "sizes", value={"a": 1}),
    "a static field's dtype": change(
        *LEAF, "static", "sizes", value={"dtype": {"a": 1}}
    ),
    "a static field too many": change(*LEAF, "static", "more", value=1),
    "no static field": change(*LEAF, "static", value={}),
    "a static field's value": change(*LEAF, "static", "sizes", value=[3, 2]),
    "the dense shape": change(*LEAF, "dense", value=["float32", [2, 3]]),
    "the dense dtype": change(*LEAF, "dense", value=["int8", [2, 2]]),
    "no dense shape": change(*LEAF, "dense", value=["float32"]),
    "a field's name": change(*LEAF, "fields", value={"outer": None}),
    "a field that is None": change(*LEAF, "fields", "inner", value=None),
    "an array that is another": change("dict", 0, 1, value={"same": "b"}),
    "an array that is none": change("dict", 1, 1, value={"same": "z"}),
    "a box": change("dict", 0, 1, value={"box": "os", "names": [], "value": {}}),
}


def test_boxes_and_shared_arrays_come_back(path, tmp_path):
    """An array under two names is stored once, and is one array again."""
    shared, leaf = jnp.arange(4096.0), jc.symmetric(jnp.ones((64, 64)), bits=4)
    names = ("embed", None, ("x", "y"))
    tree = {
        "a": nn.Partitioned(jnp.ones((2, 3, 4)), names=names),
        "b": nn.LogicallyPartitioned(leaf, names=("in", "out")),
        "c": [shared, {"d": shared}, leaf],
    }
    storage.save(path, tree, coding="none")
    assert path.stat().st_size < 4096 * 4 + 8000
    storage.save_orbax(tmp_path / "orbax", tree)
    for found in (storage.load(path), storage.restore_orbax(tmp_path / "orbax")):
        assert isinstance(found["a"], nn.Partitioned) and found["a"].names == names
        assert type(found["b"]) is nn.LogicallyPartitioned
        assert found["b"].names == ("in", "out")
        assert found["c"][0] is found["c"][1]["d"]
        check_same(jax.tree.leaves(found), jax.tree.leaves(tree))
    with storage.open_checkpoint(path) as file:
        np.testing.assert_array_equal(file["c/1/d"], shared)
        assert (
            file.describe("c/2")
            == file.describe("b")
            == ("Quantized", (64, 64), "float32")
        )


def test_a_file_that_needs_more_than_this_version_knows_says_so(path):
    about = storage.checkpoint.describe({"dict": []}, {}) | {"needs": ["wings"]}
    with path.open("wb+") as file:
        storage.checkpoint.write(file, {}, about | {"more": 1})
    with pytest.raises(ValueError, match=r"needs .*wings.* update it"):
        storage.load(path)


@pytest.mark.parametrize("lie", LIES)
def test_lies_under_good_checksums_are_detected(lie, path):
    tree = {
        "a": jnp.arange(3.0),
        "b": jnp.ones(3),
        "c": jc.Reshaped(jnp.ones((2, 2)), (2, 2), (-1, -2)),
    }
    storage.save(path, tree)
    forge(path, LIES[lie] or (lambda *_: None))
    if lie == "nothing":
        check_same(storage.load(path), tree)
        return
    with pytest.raises(ValueError, match=str(path)):
        storage.load(path)


def test_deep_trees_do_not_exhaust_the_stack(path):
    storage.save(path, {"a": jnp.ones(1)})
    forge(path, lambda *_: '{"list":[' * 50_000 + "null" + "]}" * 50_000)
    with pytest.raises(storage.FileDamaged, match="unreadable"):
        storage.load(path)


@pytest.mark.parametrize("length", [2**24, 2**40, 2**63, 2**64 - 1])
def test_an_enormous_header_takes_no_memory(length, path):
    path.write_bytes(length.to_bytes(8, "little") + b"{" * 1000)
    tracemalloc.start()
    try:
        with pytest.raises(storage.FileDamaged, match=r"claims \d+ bytes of 1008"):
            storage.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_foreign_and_newer_files_are_told_apart_from_damage(path):
    safetensors.numpy.save_file({"a": np.ones(3)}, path)
    with pytest.raises(ValueError, match=r"not written by .*models\.load"):
        storage.load(path)
    storage.save(path, {"a": jnp.ones(3)})
    forge(path, change("__metadata__", "format_version", value="4", place="header"))
    with pytest.raises(ValueError, match=r"written in format 4, .* update it"):
        storage.load(path)
    with pytest.raises(FileNotFoundError):
        storage.load(path.with_name("none"))


@jc.leaf
class Failing(jc.Leaf):
    """Gives its array once, for the header; then the write ends."""

    values: jax.Array
    how: str = jc.static()

    shape, dtype = (3,), jnp.dtype("float32")
    calls = itertools.count()

    def stored(self):
        if next(self.calls) % 2 and self.how == "raise":
            raise OSError("the disk is full")
        return {"values": np.ones(3, np.float32)}


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    storage.save(path, {"a": jnp.ones(3)})
    old = path.read_bytes()
    # The second leaf lets go of what the first one stored, which is then made again.
    failing = {"a": Failing(jnp.ones(3), "raise"), "b": TREES["nesting"]["padded"]}
    with pytest.raises(OSError, match="full"):
        storage.save(path, failing)
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            storage.save(path, {"a": jnp.zeros(3)})
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


KILLED = """
import os, signal, sys
import numpy as np
from jaxcompress import storage
from jaxcompress.storage import file_writer

read = file_writer._array_of
def last(name, slot):
    if name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(name, slot)
file_writer._array_of = last
storage.save(sys.argv[1], {"a": np.zeros(100_000), "b": np.zeros(3)})
"""


def test_a_killed_write_leaves_the_old_file(path):
    storage.save(path, {"a": jnp.ones(3)})
    old = path.read_bytes()
    found = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert found.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    storage.verify(path)


def names(path):
    return sorted(x.name for x in path.parent.iterdir())


def test_shards(path):
    tree = {f"layer_{i}": on_device("float32", (25,)) for i in range(5)}
    storage.save(path, tree, {"a": 1}, max_shard_bytes=250)
    files = [f"x-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(path) == [*files, "x.safetensors.index.json"]
    index = json.loads((path.parent / "x.safetensors.index.json").read_text())
    assert index["weight_map"]["layer_2"] == files[1]
    assert index["metadata"]["total_size"] == 500
    check_same(storage.load(path), tree)
    check_same(storage.load(f"{path}.index.json"), tree)
    assert storage.verify(path)["files"] == 3
    with storage.open_checkpoint(path) as file:
        assert file.metadata == {"a": 1}
        check_same(file["layer_4"], tree["layer_4"])
    with pytest.raises(ValueError, match="is shard 2 of 3"):
        storage.load(path.parent / files[1])
    # Another save takes other names, and removes these when it is whole.
    storage.save(path, tree, max_shard_bytes=250)
    assert len(names(path)) == 4
    assert not set(files) & set(names(path))
    check_same(storage.load(path), tree)
    storage.save(path, {"a": jnp.ones(2)})
    assert names(path) == ["x.safetensors"]
    storage.save(path, tree, max_shard_bytes=250)
    assert names(path) == [*files, "x.safetensors.index.json"]


def test_shards_that_do_not_belong_together(path, tmp_path):
    tree = {f"layer_{i}": on_device("float32", (25,)) for i in range(4)}
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    storage.save(path, tree, max_shard_bytes=200)
    storage.save(other, jax.tree.map(lambda x: x + 1, tree), max_shard_bytes=200)
    shard = path.parent / "x-00002-of-00002.safetensors"
    good = shard.read_bytes()
    shard.write_bytes((other.parent / shard.name).read_bytes())
    with pytest.raises(storage.FileDamaged, match="is not the shard"):
        storage.load(path)
    shard.unlink()
    with pytest.raises(FileNotFoundError):
        storage.load(path)
    shard.write_bytes(good)
    check_same(storage.load(path), tree)
    index = tmp_path / "x.safetensors.index.json"
    raw = index.read_bytes()
    damages = [raw + b" ", raw[:-1], raw.replace(b'":', b'": ', 1)]
    for place in range(0, len(raw), 23):
        damages.append(bytearray(raw))
        damages[-1][place] ^= 1 << (place % 8)
    for damaged in damages:
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(index)):
            storage.load(path)
    index.write_bytes(raw)
    shard.write_bytes(good[:-9])
    with pytest.raises(storage.FileDamaged) as caught:
        storage.load(path)
    assert str(caught.value).startswith(str(shard)), "one file, and what to do, named"
    assert str(caught.value).count("get the file again") == 1


@pytest.mark.parametrize("odd", [7, None, True, [], {}, "", "../x", float("nan")])
def test_an_index_of_odd_json_is_damaged(odd, path):
    """Under a checksum that fits."""
    storage.save(path, {"a": jnp.ones(25), "b": jnp.ones(25)}, max_shard_bytes=100)
    index = pathlib.Path(f"{path}.index.json")
    whole = index.read_text()
    about = json.loads(whole)["metadata"]
    places = [("weight_map", name) for name in ("a", "b")]
    places += [("metadata", key) for key in about if key != "total_size"]
    places += [("metadata",), ("weight_map",)]
    for *most, last in places:
        found = json.loads(whole)
        holder = found[most[0]] if most else found
        holder[last] = odd
        if type(found["metadata"]) is dict and last != "checksum":
            found["metadata"]["checksum"] = ""
            text = json.dumps(found, separators=(",", ":")).encode()
            digest = hashlib.blake2b(text, digest_size=16).hexdigest()
            found["metadata"]["checksum"] = digest
        index.write_text(json.dumps(found, separators=(",", ":")))
        with pytest.raises(ValueError, match=str(index)):
            storage.load(path)


def test_a_failed_write_of_shards_leaves_the_old_ones(path, monkeypatch):
    tree = {f"layer_{i}": jnp.ones(25) for i in range(4)}
    storage.save(path, tree, max_shard_bytes=200)
    old = names(path)
    replace = os.replace
    for allowed in range(3):
        left = iter(range(allowed))

        def failing(a, b, left=left):
            if next(left, None) is None:
                raise OSError("the disk is full")
            replace(a, b)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="full"):
            storage.save(path, jax.tree.map(jnp.zeros_like, tree), max_shard_bytes=200)
        monkeypatch.undo()
        assert names(path) == old
        check_same(storage.load(path), tree)


def test_open_reads_only_what_is_asked_for(path):
    tree = {"a": jnp.arange(100.0), "b": TREES["nesting"], "c": (jnp.ones(2), None)}
    storage.save(path, tree)
    with storage.open_checkpoint(path) as file:
        assert file.tree["c"] == ("c/0", None)
        assert "b/padded" in file.names
        assert file.describe("b/padded") == ("Padded", (6,), "float32")
        assert file.describe("a") == ("array", (100,), "float32")
        assert file.nbytes("b/padded") == 24
        with pytest.raises(KeyError, match="near: b/padded"):
            file["b/paded"]
        start = file._files[""].spans["a"].start
    raw = bytearray(path.read_bytes())
    raw[start + 17] ^= 4
    path.write_bytes(raw)
    with storage.open_checkpoint(path) as file:
        check_same(file["b/padded"], tree["b"]["padded"])
        check_same(file["c/0"], tree["c"][0])
        with pytest.raises(storage.FileDamaged, match="the bytes of a are not"):
            file["a"]
    with pytest.raises(storage.FileDamaged, match="the bytes of a are not"):
        storage.verify(path)


def peak(function, *args, **options):
    tracemalloc.start()
    try:
        result = function(*args, **options)
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def test_memory_is_the_result_and_one_leaf(path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    one = 1 << 22
    tree = {f"{i:02}": np.full(one // 4, i, np.float32) for i in range(16)}
    tree["big"] = jc.Sum((np.zeros(one, np.float32), np.ones(one, np.float32)))
    total = 24 * one
    saving, _ = peak(storage.save, path, tree)
    assert saving < 12 * one  # two threads, each with 16 MB to write to
    loading, found = peak(storage.load, path, numpy=True)
    assert loading < total + 2 * one
    del found
    checking, _ = peak(storage.verify, path)
    assert checking < 6 * one


STATM = pathlib.Path("/proc/self/statm")


def resident():
    """Bytes of memory that this process holds now."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("kind", ["dense", "coded"])
def test_memory_on_the_device_is_the_result_and_one_leaf(kind, path):
    noise = np.random.default_rng(0).integers(-99, 99, 40 << 20, np.int8)
    x = jc.entropy_code(noise) if kind == "coded" else jnp.asarray(noise)
    storage.save(path, {str(i): jax.tree.map(jnp.array, x) for i in range(3)})
    del x, noise
    storage.load(path)  # once, for what stays: code, buffers
    gc.collect()
    start, most, done = resident(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = storage.load(path)
    done.set()
    watcher.join()
    total = jc.nbytes(found)
    assert most - start < total + 1.3 * total / 3


def test_versions_of_missing_packages_are_said():
    assert set(checkpoint.versions()) == {"jaxcompress", "jax", "flax"}


@pytest.mark.parametrize("length", [640, 1152])  # 0x80 0x02 and 0x80 0x04
def test_a_header_as_long_as_a_pickle_begins_is_read(length, tmp_path):
    path, name = tmp_path / "x.safetensors", "x"
    while True:
        storage.save(path, {name: jnp.ones(1)})
        size = int.from_bytes(path.read_bytes()[:8], "little")
        if size == length:
            break
        assert size < length
        name += "x" * max(1, (length - size) // 4)  # names are written more than once
    assert storage.load(path)[name] == 1


def test_frozen_dicts_are_kept(tmp_path, monkeypatch):
    inner = {"kernel": jc.symmetric(jnp.ones((8, 8)), bits=8)}
    tree = {"a": freeze({"b": inner}), "c": [{"d": jnp.ones(2)}, (freeze({}),)]}
    for name, saved in {"some": tree, "all": freeze(tree), "none": inner}.items():
        for save, load in ((jc.save, jc.load), (jc.save_orbax, jc.restore_orbax)):
            path = tmp_path / f"{name}_{save.__name__}"
            save(path, saved)
            check_same(load(path), saved)
    with jc.open_checkpoint(tmp_path / "all_save") as file:
        assert isinstance(file.tree, FrozenDict)  # so that blocks are rebuilt as one
    monkeypatch.setattr(
        "jaxcompress.storage.checkpoint.frozen_paths", lambda tree: [("x",)]
    )
    jc.save(tmp_path / "wrong", inner)
    with pytest.raises(jc.FileDamaged, match="no dict to freeze"):
        jc.load(tmp_path / "wrong")

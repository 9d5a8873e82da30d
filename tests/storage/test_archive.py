"""Lossless coding in files: plain arrays, rows alone, directories byte for byte."""

import json
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxcompress as jc
from jaxcompress import cli, storage
from jaxcompress.coding import array_codecs
from jaxcompress.coding.floats import chunks as float_chunks
from jaxcompress.storage import archive

RANDOM = np.random.default_rng(11)


def weights(dtype, shape=(300, 200)):
    return (
        RANDOM.normal(0, 0.05, shape) * np.exp(RANDOM.normal(0, 1, shape[:1]))[:, None]
    ).astype(dtype)


TREE = {
    "bfloat16": weights(ml_dtypes.bfloat16),
    "float16": weights(np.float16),
    "float32": weights(np.float32),
    "float8": weights(ml_dtypes.float8_e4m3fn),
    "halves": weights(ml_dtypes.bfloat16).astype(np.float32),
    "float64": weights(np.float64),
    "codes": np.rint(RANDOM.normal(0, 3, (90, 80))).astype(np.int8),
    "constant": np.full((70, 90), 1.5, np.float32),
    "ids": np.arange(9000, dtype=np.int32),
    "mask": RANDOM.random((200, 90)) < 0.02,
    "levels": np.rint(RANDOM.normal(0, 3, (90, 80))).astype(np.float32),
    "noise": RANDOM.integers(0, 2**32, 3000, dtype=np.uint32),
    "small": weights(np.float32, (3, 5)),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.float32(3),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def same_bits(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one.dtype, one.shape) == (two.dtype, np.shape(two))
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def test_plain_arrays_are_coded_where_it_pays_and_come_back(path):
    storage.save(path, TREE)
    same_bits(storage.load(path, numpy=True), TREE)
    storage.save(path, TREE, coding="decode")
    same_bits(storage.load(path, numpy=True), TREE)
    with storage.open_checkpoint(path) as stored:
        assert stored.files()[0].codings["float32"] == "bfloat16 pairs"
    storage.save(path, TREE)
    with storage.open_checkpoint(path) as stored:
        (file,) = stored.files()
        wanted = {"bfloat16": "bfloat16", "float16": "float16", "float32": "bfloat16"}
        wanted |= {"float8": "float8", "halves": "halves", "codes": "bytes"}
        wanted |= {"constant": "zstd", "ids": "zstd", "mask": "palette"}
        assert {name: file.codings.get(name) for name in wanted} == wanted
        assert "noise" not in file.codings and "small" not in file.codings
        for name, limit in {"bfloat16": 11.2, "float16": 14.2, "float32": 27.2}.items():
            assert 8 * stored.nbytes(name) / TREE[name].size < limit
        assert stored.nbytes("halves") < 1.001 * stored.nbytes("bfloat16") + 100
        assert stored.nbytes("constant") < 100
        assert stored.describe("float32") == ("array", (300, 200), "float32")
    first = path.read_bytes()
    storage.save(path, jax.tree.map(jnp.asarray, TREE | {"float64": TREE["codes"]}))
    storage.save(path, TREE)
    assert path.read_bytes() == first


def test_a_coding_must_gain_a_hundredth():
    """Less is not worth the time that decoding takes."""
    assert array_codecs.choose(TREE["noise"]) is None
    bits = TREE["noise"].copy()
    bits[:12] = 0  # about 0.4 % less
    assert array_codecs.choose(bits) is None
    bits[:200] = 0
    assert array_codecs.choose(bits) == "zstd"


def test_a_file_is_on_the_disk_before_it_takes_the_place(path, monkeypatch):
    """Else a machine that stops between the two would leave neither file."""
    seen = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def spy(*given, name=name, real=real):
            seen.append(name)
            return real(*given)

        monkeypatch.setattr(os, name, spy)
    storage.save(path, {"a": TREE["small"]})
    assert seen[:2] == ["fsync", "replace"] and seen[2:] in ([], ["fsync"])


def test_coding_may_be_left_out(path):
    tree = {name: x for name, x in TREE.items() if name != "float8"}
    storage.save(path, tree, coding="none")
    found = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(found["float32"], TREE["float32"])
    same_bits(storage.load(path, numpy=True), tree)


def test_a_sample_that_misleads_leaves_the_array_as_it_is(path, monkeypatch):
    """Samples look at four places; what lies between them may not fit the coding."""
    bits = TREE["bfloat16"].reshape(-1).view(np.uint16).copy()
    monkeypatch.setattr(array_codecs, "SAMPLE", 1000)
    bits[5000:15000] = RANDOM.integers(0, 2**16, 10000)
    wild = bits.view(ml_dtypes.bfloat16)
    halves = TREE["halves"].copy()
    halves[150, 100] = np.float32(np.pi)
    storage.save(path, {"halves": halves, "wild": wild, "z": TREE["codes"]})
    same_bits(
        storage.load(path, numpy=True),
        {"halves": halves, "wild": wild, "z": TREE["codes"]},
    )
    with storage.open_checkpoint(path) as stored:
        assert stored.nbytes("halves") == halves.nbytes
    storage.verify(path)


def test_rows_are_read_alone(path, monkeypatch):
    monkeypatch.setattr(float_chunks, "CHUNK", 1 << 14)
    tree = {"w": TREE["float32"], "i": TREE["ids"], "raw": TREE["noise"]}
    tree["leaf"] = jc.symmetric(bits=4)(jnp.asarray(TREE["float32"]))
    storage.save(path, tree)
    with storage.open_checkpoint(path) as stored:
        for name, first, last in (("w", 0, 300), ("w", 77, 200), ("w", 5, 5)):
            found = stored.rows(name, first, last)
            np.testing.assert_array_equal(found, tree[name][first:last])
        np.testing.assert_array_equal(stored.rows("i", 8990, 9000), tree["i"][8990:])
        np.testing.assert_array_equal(stored.rows("raw", 7, 9), tree["raw"][7:9])
        dense = tree["leaf"].materialize()
        np.testing.assert_array_equal(stored.rows("leaf", 3, 9), dense[3:9])
        for first, last in ((-1, 5), (9, 3), (0, 301)):
            with pytest.raises(ValueError, match=r"w, whose shape is \(300, 200\)"):
                stored.rows("w", first, last)
        (file,) = stored.files()
        span = file.spans["w"]
    data = bytearray(path.read_bytes())
    data[span.start + 100] ^= 1  # in the first chunk of four
    path.write_bytes(data)
    with storage.open_checkpoint(path) as stored:
        np.testing.assert_array_equal(stored.rows("w", 200, 300), tree["w"][200:])
        with pytest.raises(storage.FileDamaged, match="chunk 0"):
            stored.rows("w", 0, 10)
        with pytest.raises(storage.FileDamaged, match="not those written"):
            stored["w"]


def test_codings_that_lie_are_refused(path, monkeypatch):
    """A file whose digests are right, and whose codings are not those of its bytes."""
    for lie in ("float16", "float8", "zstd", "nonsense"):
        storage.save(path, {"a": TREE["bfloat16"], "b": TREE["codes"]})
        with monkeypatch.context() as patch:
            patch.setattr(array_codecs, "encode", lambda *_, **__: iter([bytes(4000)]))
            patch.setattr(array_codecs, "choose", lambda x, lie=lie, **_: lie)
            storage.save(path, {"a": TREE["bfloat16"]})
        with pytest.raises(storage.FileDamaged, match="a: "):
            storage.load(path)


def test_mutated_streams_raise_or_give_numbers():
    """Digests find damage first; decoding must not depend on that."""
    refused = total = 0
    for name in ("bfloat16", "float32", "codes", "mask", "halves", "levels"):
        array = TREE[name]
        how = array_codecs.choose(array)
        whole = b"".join(array_codecs.encode(array, how))
        for seed in range(80):
            random = np.random.default_rng(seed)
            data = bytearray(whole)
            if seed % 4 == 0:
                data = data[: random.integers(0, len(data))]
            else:
                tail = random.integers(0, [len(data), 300, 40][seed % 4 - 1])
                data[-1 - tail] ^= 1 << random.integers(0, 8)
            view = bytes(data)
            total += 1
            try:
                stream = array_codecs.open_stream(
                    lambda i, j, view=view: view[i:j],
                    len(view),
                    how,
                    array.dtype,
                    array.shape,
                )
                found = array_codecs.decode(stream, array.dtype)
                assert (found.size, found.dtype) == (array.size, array.dtype)
            except ValueError:
                refused += 1
    assert refused > total / 3


FULL = """
import resource, sys
import numpy as np
from jaxcompress import storage

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
x = np.random.default_rng(0).normal(0, 1, (400, 400)).astype(np.float32)
try:
    storage.save(sys.argv[1], {"a": x})
except OSError as error:
    sys.exit(3)
"""


def test_a_full_disk_leaves_the_old_file(path):
    storage.save(path, {"a": TREE["small"]})
    old = path.read_bytes()
    found = subprocess.run([sys.executable, "-c", FULL, path], check=False)
    assert found.returncode == 3
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200_000  # not ours


# Directories


def checkpoint(folder):
    """A directory like one of Hugging Face, with oddities, and its files' bytes."""
    folder.mkdir()
    (folder / "sub" / "deeper").mkdir(parents=True)
    safetensors.numpy.save_file(
        {"b": TREE["float16"], "a": TREE["float32"], "n": TREE["ids"]},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    data = {"z": [[0, 120000], "BF16"], "a": [[120000, 120008], "F64"]}
    head = {
        k: {"dtype": d, "shape": [1], "data_offsets": o} for k, (o, d) in data.items()
    }
    text = b"   " + json.dumps(head, indent=3).encode() + b"  \n"
    (folder / "sub" / "odd.safetensors").write_bytes(
        len(text).to_bytes(8, "little")
        + text
        + TREE["bfloat16"].tobytes()
        + bytes(8)
        + b"left over"
    )
    (folder / "not.safetensors").write_bytes(b"\x00" * 7)
    (folder / "lies.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    (folder / "config.json").write_text('{"a": 1}\n' * 900)
    (folder / "empty").write_bytes(b"")
    (folder / "sub" / "deeper" / "pytorch.bin").write_bytes(RANDOM.bytes(9999))
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("part", [archive.PART, 50_000])
def test_a_directory_comes_back_byte_for_byte(tmp_path, monkeypatch, part):
    monkeypatch.setattr(archive, "PART", part)
    files = checkpoint(tmp_path / "in")
    path = tmp_path / "packed"
    seen = []
    found = storage.pack(
        tmp_path / "in", path, progress=lambda items: seen.extend(items) or items
    )
    assert found["files"] == len(files) and found["parts"] == len(seen)
    assert found["bytes"] == sum(map(len, files.values()))
    assert found["packed"] == path.stat().st_size < 0.85 * found["bytes"]
    storage.verify(path)
    assert storage.unpack(path, tmp_path / "out")["files"] == len(files)
    out = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    back = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in out}
    assert back == files
    first = path.read_bytes()
    storage.pack(tmp_path / "in", path)
    assert path.read_bytes() == first


def test_a_directory_is_packed_to_be_unpacked_sooner(tmp_path, capsys):
    """And not by default: pairs of exponents, in either type."""
    (tmp_path / "in").mkdir()
    names = ("bfloat16", "float32")
    safetensors.numpy.save_file(
        {name: TREE[name] for name in names}, tmp_path / "in" / "x.safetensors"
    )
    storage.pack(tmp_path / "in", tmp_path / "plain")
    storage.pack(tmp_path / "in", tmp_path / "fast", coding="decode")
    command = ["pack", "--fast", str(tmp_path / "in"), str(tmp_path / "command")]
    assert cli.main(command) == 0
    capsys.readouterr()
    for name, coding in (("plain", "bfloat16"), ("fast", "bfloat16 pairs")):
        with storage.open_checkpoint(tmp_path / name) as stored:
            codings = stored.files()[0].codings
            kinds = {
                stored.describe(part)[2]: codings.get(part) for part in stored.names
            }
        assert {name: kinds[name] for name in names} == dict.fromkeys(names, coding)
        storage.unpack(tmp_path / name, tmp_path / f"{name} out")
        found, wanted = (
            (tmp_path / folder / "x.safetensors").read_bytes()
            for folder in (f"{name} out", "in")
        )
        assert found == wanted
    assert (tmp_path / "command").read_bytes() == (tmp_path / "fast").read_bytes()


def test_pack_and_unpack_refuse_what_they_must(tmp_path):
    checkpoint(tmp_path / "in")
    with pytest.raises(FileNotFoundError, match="no directory"):
        storage.pack(tmp_path / "none", tmp_path / "x")
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="no files"):
        storage.pack(tmp_path / "void", tmp_path / "x")
    with pytest.raises(ValueError, match="would be in"):
        storage.pack(tmp_path / "in", tmp_path / "in" / "x")
    storage.pack(tmp_path / "in", tmp_path / "x")
    with pytest.raises(FileExistsError, match="void exists"):
        storage.unpack(tmp_path / "x", tmp_path / "void")
    storage.save(tmp_path / "plain", {"a": TREE["small"]})
    with pytest.raises(ValueError, match="no archive"):
        storage.unpack(tmp_path / "plain", tmp_path / "y")
    for name in (b"a:b", b"a\\b", b"\xff"):  # unpack would refuse them later
        odd = os.path.join(os.fsencode(tmp_path / "in"), name)
        with open(odd, "wb"):
            pass
        with pytest.raises(ValueError, match="rename it"):
            storage.pack(tmp_path / "in", tmp_path / "x")
        os.unlink(odd)
    os.mkfifo(tmp_path / "in" / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        storage.pack(tmp_path / "in", tmp_path / "x")


NAMES = ["../x", "/x", "a/../../x", "", "C:x", "a\\b", "a\0", 7, None]


@pytest.mark.parametrize("name", NAMES)
def test_an_archive_writes_nothing_outside(tmp_path, name):
    files = [{"path": name, "bytes": 60, "digest": "00"}]
    tree = {"files": [[TREE["small"]]]}
    storage.save(tmp_path / "x", tree, {"archive": files})
    with pytest.raises(storage.FileDamaged, match="list of files is odd"):
        storage.unpack(tmp_path / "x", tmp_path / "out")
    assert os.listdir(tmp_path) == ["x"]


def test_unpacked_files_are_compared_with_their_digests(tmp_path):
    for about in ({"bytes": 60, "digest": "00"}, {"bytes": 61}, {"digest": 3}):
        files = [{"path": "a", "bytes": 60, "digest": "", **about}]
        storage.save(tmp_path / "x", {"files": [[TREE["small"]]]}, {"archive": files})
        with pytest.raises(storage.FileDamaged):
            storage.unpack(tmp_path / "x", tmp_path / "out")
        assert os.listdir(tmp_path) == ["x"]


def test_lists_of_files_that_lie_are_refused(tmp_path):
    """Whatever JSON stands where the files, the parts and the base do."""
    one = {"path": "a", "bytes": 60, "digest": ""}
    rows = TREE["small"].view(np.uint8).reshape(4, -1)
    pieces = [[[TREE["small"]]], [[[*rows]]]]
    leaf = [[jc.symmetric(bits=4)(jnp.ones((3, 5)))]]
    plain, different = ({"files": x} for x in pieces)
    named = {"path": "b", "bytes": 60, "digest": ""}
    places = ([[0, "V4", "b", 0]], [[0, "O", "b", 0]], [[0, "float32", "b", 1]], [[0]])
    places += ([[0, "float32", "c", 0]], [[0, "float32", "b", None]], [7], 7)
    cases = [
        *(
            (plain, {"archive": x})
            for x in ([], {}, 7, [7], [[]], [{}], "a", [one] * 2)
        ),
        *((plain, {"archive": [one | {k: x}]}) for k in one for x in ([], {}, 1.5)),
        *((plain, {"archive": [one], "base": x}) for x in ([], {}, 7, [7], [{}], "b")),
        *(
            (different, {"archive": [one | {"from": x}], "base": [named]})
            for x in places
        ),
        (different, {"archive": [one]}),
        ({"files": leaf}, {"archive": [one]}),
        *(({"files": x}, {"archive": [one]}) for x in ([[None]], [None], None, {}, [])),
        (TREE["small"], {"archive": [one]}),
    ]
    for tree, metadata in cases:
        storage.save(tmp_path / "x", tree, metadata)
        with pytest.raises(storage.FileDamaged, match="list of files is odd"):
            storage.unpack(tmp_path / "x", tmp_path / "out", base=tmp_path)
        assert os.listdir(tmp_path) == ["x"]


def test_the_command_line_packs_and_unpacks(tmp_path, capsys):
    files = checkpoint(tmp_path / "in")
    arguments = ["pack", str(tmp_path / "in"), str(tmp_path / "x")]
    assert cli.main(arguments) == 0
    assert cli.main(["verify", str(tmp_path / "x")]) == 0
    assert cli.main(["unpack", str(tmp_path / "x"), str(tmp_path / "out")]) == 0
    assert f"{len(files)} file(s), as they were packed" in capsys.readouterr().out
    assert cli.main(["unpack", str(tmp_path / "x"), str(tmp_path / "out")]) == 2
    assert "exists" in capsys.readouterr().err

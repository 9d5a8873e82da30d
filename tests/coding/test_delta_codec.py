"""Checkpoints packed against a base: every bit back, and no other base accepted."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxcompress as jc
from jaxcompress import cli, storage
from jaxcompress.coding import array_codecs, delta_codec
from jaxcompress.storage import archive

RANDOM = np.random.default_rng(5)
KINDS = [
    *(ml_dtypes.bfloat16, np.float16, np.float32, np.float64),
    *(ml_dtypes.float8_e4m3fn, np.int8, np.uint16, np.int32, np.uint64),
]


@pytest.mark.parametrize("dtype", KINDS)
def test_differences_of_any_bits_come_back(dtype):
    one, two = (
        np.frombuffer(RANDOM.bytes(8 * 512), dtype).copy() for _ in range(2)
    )  # NaN payloads, infinities and both zeros among them
    two[:100] = one[:100]
    found = delta_codec.restore(delta_codec.difference(one, two), two)
    assert found.dtype == one.dtype and found.tobytes() == one.tobytes()


@pytest.mark.parametrize("dtype", KINDS[:4])
def test_neighbours_differ_by_one(dtype):
    """Also across zero and across powers of two."""
    some = np.array([1.0, 0.0, -0.0, -1.5, 2.0, 0.5], dtype)
    for up, code in ((np.inf, 2), (-np.inf, 1)):
        near = np.nextafter(some, np.array(up, dtype))
        parts = delta_codec.difference(near, some)
        crossed = (some == 0) & (np.signbit(some) != np.signbit(near))
        # Between the zeros of both signs there is a step of its own.
        wanted = np.where(crossed, code + 2, code)
        np.testing.assert_array_equal(parts[0], wanted)
        assert not parts[1:].any()


def test_an_oracle_of_integers():
    """Differences of the numbers' ranks, by Python's integers."""

    def rank(bits):
        return bits if bits < 1 << 15 else (1 << 15) + (1 << 16) - 1 - bits

    bits = RANDOM.integers(0, 1 << 16, (2, 300), dtype=np.uint16)
    parts = delta_codec.difference(*bits.view(ml_dtypes.bfloat16))
    for new, old, low, high in zip(*bits.tolist(), *parts.tolist(), strict=True):
        gap = (rank(new) - rank(old)) % (1 << 16)
        gap = gap if gap < 1 << 15 else gap - (1 << 16)
        assert low + 256 * high == (2 * gap if gap >= 0 else -2 * gap - 1)


def test_an_estimate_is_about_the_bytes_of_the_stream():
    for array in (
        RANDOM.normal(0, 1, 200_000).astype(np.float32),
        np.rint(RANDOM.normal(0, 3, 90_000)).astype(np.int8),
        RANDOM.integers(0, 256, 70_000, dtype=np.uint8),
        np.zeros(50_000, np.uint8),
    ):
        how = array_codecs.choose(array)
        size = array.nbytes
        if how is not None:
            size = sum(map(len, array_codecs.encode(array, how)))
        assert abs(array_codecs.estimate(array) - size) < 0.02 * array.nbytes


def weights(seed, dtype, shape=(300, 200)):
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(dtype)


def checkpoints(folder):
    """A base, and what training made of it: some tensors moved, others new or gone."""
    base = {
        "a": weights(0, np.float32),
        "b": weights(1, ml_dtypes.bfloat16),
        "resized": weights(2, np.float32),
        "retyped": weights(3, np.float32),
        "gone": weights(4, np.float32),
        "another": weights(5, np.float32),
        "same": weights(6, np.float16),
    }
    moved = RANDOM.normal(0, 1e-6, (300, 200))
    later = {
        "a": (base["a"] + moved).astype(np.float32),
        "b": np.where(RANDOM.random((300, 200)) < 0.1, base["b"] * 1.01, base["b"]),
        "resized": weights(2, np.float32, (150, 200)),
        "retyped": base["retyped"].astype(ml_dtypes.bfloat16),
        "another": weights(7, np.float32) * 40,
        "same": base["same"],
        "new": weights(8, np.float16),
    }
    later["b"] = later["b"].astype(ml_dtypes.bfloat16)
    for name, tree in (("base", base), ("later", later)):
        (folder / name / "sub").mkdir(parents=True)
        first = {k: x for k, x in tree.items() if k < "b"}
        rest = {k: x for k, x in tree.items() if k >= "b"}
        # In other shards than in the base, and in other places.
        if name == "base":
            first, rest = rest, first
        safetensors.numpy.save_file(first, folder / name / "1.safetensors")
        safetensors.numpy.save_file(rest, folder / name / "sub" / "2.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"name": name}))
    return folder / "base", folder / "later"


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("part", [archive.PART, 30_000])
def test_a_later_checkpoint_comes_back_and_is_smaller(tmp_path, monkeypatch, part):
    monkeypatch.setattr(archive, "PART", part)
    base, later = checkpoints(tmp_path)
    alone = storage.pack(later, tmp_path / "alone")
    found = storage.pack(later, tmp_path / "x", base=base)
    storage.verify(tmp_path / "x")
    if part > 30_000:  # a, b and same; not those that differ in kind or value
        assert found["differences"] == 3 and alone["differences"] == 0
        assert found["packed"] < 0.75 * alone["packed"]
    storage.unpack(tmp_path / "x", tmp_path / "out", base=base)
    assert contents(tmp_path / "out") == contents(later)
    first = (tmp_path / "x").read_bytes()
    storage.pack(later, tmp_path / "x", base=base)
    assert (tmp_path / "x").read_bytes() == first
    shutil.move(base, tmp_path / "elsewhere")
    storage.unpack(tmp_path / "x", tmp_path / "again", base=tmp_path / "elsewhere")
    assert contents(tmp_path / "again") == contents(later)


def test_another_base_or_none_is_refused(tmp_path, capsys):
    base, later = checkpoints(tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "text").write_text("no tensors")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        storage.pack(later, tmp_path / "x", base=tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        storage.pack(later, tmp_path / "x", base=tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    wild = {"a": RANDOM.normal(0, 1, (300, 200)).astype(np.float32)}
    safetensors.numpy.save_file(wild, tmp_path / "other" / "1.safetensors")
    with pytest.raises(ValueError, match=r"no tensor of .* is closer"):
        storage.pack(later, tmp_path / "x", base=tmp_path / "other")
    assert not (tmp_path / "x").exists()
    packed, out = str(tmp_path / "x"), str(tmp_path / "out")
    assert cli.main(["pack", str(later), packed, "--base", str(base)]) == 0
    assert "3 part(s) are differences from" in capsys.readouterr().out
    assert cli.main(["unpack", packed, out]) == 2
    assert "packed against a base, 1.safetensors of digest" in capsys.readouterr().err
    assert cli.main(["unpack", packed, out, "--base", str(tmp_path / "other")]) == 2
    assert "is not the file that the archive was packed" in capsys.readouterr().err
    data = bytearray((base / "sub" / "2.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "sub" / "2.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"2\.safetensors .* is not the file"):
        storage.unpack(packed, out, base=base)
    (base / "sub" / "2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no sub/2\.safetensors"):
        storage.unpack(packed, out, base=base)
    storage.pack(later, tmp_path / "alone")
    with pytest.raises(ValueError, match="packed without a base"):
        storage.unpack(tmp_path / "alone", out, base=base)
    assert not (tmp_path / "out").exists()


def test_lies_about_the_base_are_refused(tmp_path):
    """Digests that are right, and a list of differences that is not."""
    base, later = checkpoints(tmp_path)
    storage.pack(later, tmp_path / "x", base=base)
    with storage.open_checkpoint(tmp_path / "x") as stored:
        metadata = stored.metadata
    tree = storage.load(tmp_path / "x", numpy=True)
    first = next(i for i, about in enumerate(metadata["archive"]) if "from" in about)
    for at, lie in ((0, 0), (1, "float64"), (2, "../x"), (3, 10**9), (3, -8), (3, "0")):
        wrong = json.loads(json.dumps(metadata))
        wrong["archive"][first]["from"][0][at] = lie
        storage.save(tmp_path / "y", tree, wrong)
        with pytest.raises(storage.FileDamaged, match="list of files is odd"):
            storage.unpack(tmp_path / "y", tmp_path / "out", base=base)
    wrong = json.loads(json.dumps(metadata))
    wrong["archive"][first]["from"][0][3] += 4
    storage.save(tmp_path / "y", tree, wrong)
    with pytest.raises(storage.FileDamaged, match="is not what was packed"):
        storage.unpack(tmp_path / "y", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_an_orbax_checkpoint_comes_back_with_tree_and_metadata(tmp_path, capsys):
    """Its directory holds files as any other: the same bytes, so the same arrays."""
    import orbax.checkpoint as ocp

    tree = {
        "layers": [{"kernel": jnp.asarray(weights(i, np.float32))} for i in range(2)],
        "bias": jnp.asarray(weights(3, ml_dtypes.bfloat16, (64,))),
        "step": jnp.asarray(7),
    }
    how = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape), tree
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
    assert cli.main(["pack", str(tmp_path / "orbax"), str(tmp_path / "x")]) == 0
    assert "Orbax has compressed the arrays" in capsys.readouterr().out
    assert cli.main(["unpack", str(tmp_path / "x"), str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "orbax")
    with ocp.PyTreeCheckpointer() as checkpointer:
        old = checkpointer.metadata(tmp_path / "orbax")
        new = checkpointer.metadata(tmp_path / "out")
        assert jax.tree.structure(new.item_metadata.tree) == jax.tree.structure(
            old.item_metadata.tree
        )
        assert new.custom_metadata == old.custom_metadata
        back = checkpointer.restore(tmp_path / "out", restore_args=how)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
    small = jc.compress(tree["layers"][0], "symmetric(bits=4)")
    jc.save_orbax(tmp_path / "ours", small)
    storage.pack(tmp_path / "ours", tmp_path / "x")
    storage.unpack(tmp_path / "x", tmp_path / "ours_back")
    back = jc.restore_orbax(tmp_path / "ours_back")
    assert type(back["kernel"]) is jc.Quantized
    assert jax.tree.structure(back) == jax.tree.structure(small)
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(small), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()

"""Write the golden files of format 3, which every later version must read.

    python scripts/write_golden_files.py FOLDER

Write into an empty folder, and copy what is new: a checkpoint of shards that is written
over one that exists gets new names.

`digests.json` keeps the digest of every dense array, of every file, and of what the
compressors of this machine make of a fixed text: files are the same bytes wherever that
is the same.
"""

import hashlib
import json
import pathlib
import sys
import tempfile
import zlib
from collections.abc import Mapping
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import zstandard
from golden_trees import TREES

import jaxcompress as jc
from jaxcompress.storage import archive, checkpoint

VERSIONS = {"jaxcompress": "0.2.0", "jax": "0.10.2", "flax": "0.12.0"}
PROBE = bytes(range(256)) * 8 + b"probe " * 99

SHARDED = "shards"


def write_all(folder):
    """Write every golden file but `digests.json`."""
    with mock.patch.object(checkpoint, "versions", lambda: VERSIONS):
        for name, (make, coding) in TREES.items():
            tree, metadata = make(np.random.default_rng(20)), {"golden": name}
            checkpoint.save(
                folder / f"{name}.safetensors", tree, metadata, coding=coding
            )
        tree = {f"layer_{i}": np.arange(300 * i, dtype="i4") for i in range(5)}
        sharded = folder / f"{SHARDED}.safetensors"
        checkpoint.save(sharded, tree, {"golden": "shards"}, max_shard_bytes=4000)
        with tempfile.TemporaryDirectory() as scratch:
            old, new = (
                write_directory(pathlib.Path(scratch), x) for x in ("old", "new")
            )
            archive.pack(old, folder / "archive.safetensors")
            archive.pack(new, folder / "archive_of_differences.safetensors", base=old)


def write_directory(parent, name):
    """A small checkpoint directory; "new" differs little from "old"."""
    rng, root = np.random.default_rng(4), parent / name
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "config.json").write_text('{"a": 1}\n')
    (root / "empty.txt").write_bytes(b"")
    weights, table = (
        rng.normal(0, 0.02, (40, 60)).astype("f4"),
        rng.integers(0, 99, 600),
    )
    if name == "new":
        weights[::3] *= np.float32(1.0000002)
        table[::50] += 1
    raw = weights.astype(jnp.bfloat16)
    tensors = {"half": ("BF16", raw), "ids": ("I64", table), "weight": ("F32", weights)}
    header, data = {}, b""
    for key, (code, x) in tensors.items():
        span = [len(data), len(data) + x.nbytes]
        header[key] = {"dtype": code, "shape": list(x.shape), "data_offsets": span}
        data += x.tobytes()
    text = json.dumps(header).encode()
    file = root / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return root


def dense_digests(tree):
    """The digest of every dense array, by its path; NaN is one NaN where it is cast."""
    out = {}

    def walk(x, path):
        if isinstance(x, Mapping):
            for key, child in x.items():
                walk(child, (*path, str(key)))
        elif isinstance(x, list | tuple):
            for i, child in enumerate(x):
                walk(child, (*path, str(i)))
        elif x is not None:
            x = np.asarray(x)
            if x.dtype.name == "bfloat16":
                x = (x.view("u2").astype("u4") << 16).view("f4")
            elif jnp.issubdtype(x.dtype, jnp.integer) and not hasattr(np, x.dtype.name):
                x = x.astype("i4")
            elif not hasattr(np, x.dtype.name):
                x = np.where(x == x, x.astype("f4"), np.float32(np.nan))
            digest = hashlib.blake2b(x.tobytes(), digest_size=8).hexdigest()
            out["/".join(path)] = [x.dtype.name, list(x.shape), digest]

    walk(tree, ())
    return out


def probes():
    """What this machine's compressors make of a fixed text."""
    frames = zlib.compress(PROBE, 9), zstandard.ZstdCompressor(level=3).compress(PROBE)
    return [hashlib.blake2b(x, digest_size=8).hexdigest() for x in frames]


def file_digests(folder):
    paths = sorted(folder.glob("*.safetensors*"))
    return {
        path.name: hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        for path in paths
    }


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    write_all(folder)
    names = [*TREES, SHARDED]
    dense = {}
    for name in names:
        tree = checkpoint.load(folder / f"{name}.safetensors", numpy=True)
        tree = nn.meta.unbox(jc.materialize(tree))
        dense[name] = dense_digests(tree)
    record = {"probes": probes(), "files": file_digests(folder), "dense": dense}
    (folder / "digests.json").write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

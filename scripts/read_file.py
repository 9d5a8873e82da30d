"""Read a file that jaxcompress wrote, with NumPy and zstandard alone.

It shows that docs/format.md, whose sections its own follow, suffices: nothing of
jaxcompress or JAX is imported. `load(path)` gives the tree, each leaf as a dense array.
NumPy lacks bfloat16 and floats of 8 and 4 bits: these come back as float32.

    python scripts/read_file.py model.safetensors
    python scripts/read_file.py archive.safetensors --unpack folder [--base folder]
"""

import argparse
import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
from read_codings import cast, from_bits, itemsize, plain, read_stream, require
from read_leaves import LEAVES


def digest(data):
    return hashlib.blake2b(data, digest_size=16).digest()


def arrays_of(path):
    """`__about__`, (bytes, coding) of each array by name, and the seal of one file."""
    data = memoryview(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(bytes(data[8:start]))
    head = entries.pop("__metadata__", {})
    require(
        (head.get("format"), head.get("format_version")) == ("jaxcompress", "3"), path
    )
    ends = {k: entry["data_offsets"] for k, entry in entries.items()}
    names = sorted(ends, key=lambda k: (k == "__checksums__", ends[k]))
    parts = {k: data[start + ends[k][0] : start + ends[k][1]] for k in names}
    seal = bytes(parts.pop("__checksums__"))
    rows = [*map(digest, parts.values()), digest(data[:start])]
    require(b"".join(rows) == seal[:-16], f"digests of {path}")
    require(digest(seal[:-16]) == seal[-16:], f"the seal of {path}")
    about = json.loads(zlib.decompress(parts.pop("__about__")))
    codings = json.loads(head.get("codings", "{}"))
    how = {names[row]: name for name, listed in codings.items() for row in listed}
    return about, {k: (part, how.get(k)) for k, part in parts.items()}, seal[-16:]


class Store:
    """The arrays of a file, or of an index and its shards; as unsigned `words`."""

    def __init__(self, path, words=False):
        path, self.words, self.known = Path(path), words, {}
        if not path.exists():
            path = path.with_name(path.name + ".index.json")
        if path.name.endswith(".index.json"):
            index = json.loads(path.read_bytes())
            head, self.arrays = index["metadata"], {}
            checksum, head["checksum"], self.about = head["checksum"], "", head["about"]
            text = json.dumps(index, separators=(",", ":"), ensure_ascii=False)
            require(digest(text.encode()).hex() == checksum, f"the checksum of {path}")
            for name, seal in head["seals"].items():
                _, arrays, found = arrays_of(path.with_name(name))
                require(found.hex() == seal, f"{name} is of another index")
                self.arrays |= arrays
        else:
            self.about, self.arrays, _ = arrays_of(path)
        if self.about.get("needs"):
            raise NotImplementedError(f"{path} needs {self.about['needs']}")

    def read(self, name, dtype, shape):
        (data, coding), size = self.arrays[name], itemsize(dtype)
        if coding is None:
            words = np.frombuffer(data, f"<u{size}" if size < 16 else "V16")
        elif coding == "halves":
            words = read_stream(data, coding, 2, math.prod(shape)).astype("<u4") << 16
        else:
            words = read_stream(data, coding, size, math.prod(shape))
        return (words if self.words else from_bits(words, dtype)).reshape(shape)

    def value(self, node, path=()):
        """What a node of the tree stands for, every leaf dense."""
        if node is None:
            return None
        if "dict" in node:
            return {k: self.value(x, (*path, str(k))) for k, x in node["dict"]}
        for name, make in (("list", list), ("tuple", tuple)):
            if name in node:
                items = enumerate(node[name])
                return make(self.value(x, (*path, str(i))) for i, x in items)
        if "same" in node:
            return self.known[node["same"]]
        if "box" in node:
            return self.value(node["value"], path)
        name = "/".join(x.replace("~", "~0").replace("/", "~1") for x in path)
        if "array" in node:
            found = self.read(name, node["array"], node["shape"])
        elif node.get("leaf") not in LEAVES or "dense" not in node:
            raise NotImplementedError(f"{name} is {str(node)[:80]}")
        else:
            within = node["stored"] if "stored" in node else node["fields"]
            parts = {k: self.value(x, (*path, k)) for k, x in within.items()}
            static = {k: plain(x) for k, x in node["static"].items()}
            dtype, shape = node["dense"]
            found = cast(LEAVES[node["leaf"]](parts, static), dtype)
            require(list(found.shape) == shape, f"the shape of {name}")
        self.known[name] = found
        return found


def load(path):
    store = Store(path)
    return store.value(store.about["tree"])


def unpack_archive(path, folder, base=None):
    """Write the files of an archive; `base` is the folder it was packed against."""
    store = Store(path, words=True)
    files = store.value(store.about["tree"])["files"]
    for about, parts in zip(store.about["metadata"]["archive"], files, strict=True):
        for i, dtype, file, start in about.get("from", []):
            size = parts[i][0].size * itemsize(dtype)
            there = np.fromfile(Path(base, file), "u1", size, offset=start)
            parts[i] = add_difference(np.stack(parts[i]), there, "float" in dtype)
        data = b"".join(part.tobytes() for part in parts)
        require(digest(data).hex() == about["digest"], about["path"])
        target = Path(folder, about["path"])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def add_difference(rows, there, floating):
    """Words from bytes of folded differences `[bytes, numbers]` and those of a base."""
    kind = np.dtype(f"<u{len(rows)}")
    top = kind.type(8 * kind.itemsize - 1)

    def turned(words):  # magnitudes below zero counted from the other end
        return np.where(
            (words >> top > 0) & floating, words ^ kind.type((1 << int(top)) - 1), words
        )

    folded = np.ascontiguousarray(rows.T).view(kind)[:, 0]
    half = folded >> kind.type(1)
    return turned(
        np.where(folded & kind.type(1) > 0, ~half, half) + turned(there.view(kind))
    )


def show(value, name=""):
    """Print names, dtypes and shapes of a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, x in items:
        if isinstance(x, dict | list | tuple):
            show(x, f"{name}{key}/")
        elif x is not None:
            print(f"{name}{key}: {x.dtype} {x.shape}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument(
        "--unpack", metavar="FOLDER", help="write the files of an archive"
    )
    parser.add_argument("--base", help="the folder that the archive was packed against")
    args = parser.parse_args()
    if args.unpack:
        unpack_archive(args.path, args.unpack, args.base)
    else:
        show({"tree": load(args.path)})

"""What do files do that are not what was written? Ten thousand of them.

Files of coded arrays, of coded leaves and of a packed directory are altered: bits
flipped, bytes replaced, cut short, pieces moved, numbers in headers changed, headers
made enormous. Digests would find nearly all of it; so half of the alterations are made
behind them: the digests are written anew over what was altered. Each file must raise a
clear error or give back the right arrays (where digests hold) or arrays of the right
shape (where they were forged), in bounded memory.

    python experiments/lossless_faults.py
"""

import collections
import dataclasses
import json
import resource
import struct
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from command import parse

import jaxcompress as jc
from jaxcompress import storage
from jaxcompress.reporting import append_lines
from jaxcompress.storage import tensors


@dataclasses.dataclass(frozen=True)
class Config:
    count: int = 10_000
    seed: int = 0
    memory: int = 3_000  # megabytes of addresses beyond those in use at the start
    fast: bool = False  # three hundred
    results: str = "experiments/results/lossless_faults.jsonl"


def sources(folder: Path) -> dict[str, tuple[bytes, Any]]:
    """Files by name, and the trees that they hold."""
    random = np.random.default_rng(0)
    w = random.normal(0, 0.05, (160, 130)) * np.exp(random.normal(0, 1, (160, 1)))
    w = w.astype(np.float32)
    codes = np.rint(random.normal(0, 3, (70, 90))).astype(np.int8)
    plain = {
        "bfloat16": w.astype(ml_dtypes.bfloat16),
        "float32": w,
        "float16": w.astype(np.float16),
        "codes": codes,
        "ids": np.arange(3000, dtype=np.int32),
    }
    coded = jc.compress(
        {"a": {"kernel": w}, "b": {"kernel": w[:, :64]}},
        jc.chain(
            [("a/.*", "symmetric(bits=4, block=16)"), ("b/.*", "code_floats()")],
            "entropy_code()",
            "code_floats()",
        ),
    )
    path = folder / "x"
    found = {}
    for name, tree in (("plain", plain), ("leaves", coded)):
        storage.save(path, tree)
        found[name] = path.read_bytes(), jax.tree.map(np.asarray, jc.materialize(tree))
    (folder / "in").mkdir()
    (folder / "in" / "config.json").write_text('{"layers": 12}\n' * 500)
    (folder / "in" / "weights.bin").write_bytes(w.tobytes())
    storage.pack(folder / "in", path)
    found["archive"] = path.read_bytes(), None
    return found


def altered(data: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    """One way to alter a file, and what it gives."""
    ways = ("bit", "byte", "cut", "swap", "header", "zeros", "tail", "length", "grow")
    way = str(random.choice(ways))
    out = bytearray(data)
    head = 8 + int.from_bytes(data[:8], "little")
    at = int(random.integers(0, len(out)))
    if way == "bit":
        out[at] ^= 1 << int(random.integers(0, 8))
    elif way == "byte":
        out[at] = int(random.integers(0, 256))
    elif way == "cut":
        out = out[:at]
    elif way == "swap":
        other, size = int(random.integers(0, len(out))), int(random.integers(1, 64))
        one, two = out[at : at + size], out[other : other + size]
        out[at : at + len(two)], out[other : other + len(one)] = two, one
    elif way == "header":  # a digit of a size, an offset, a shape
        digits = [i for i in range(8, head) if 48 <= out[i] < 58]
        out[int(random.choice(digits))] = int(random.integers(48, 58))
    elif way == "zeros":
        out[at : at + 40] = bytes(len(out[at : at + 40]))
    elif way == "tail":  # behind the header: lists of numbers, tables, indices
        at = head + int(random.integers(0, min(400, len(out) - head)))
        out[at] ^= 1 << int(random.integers(0, 8))
    elif way == "length":
        out[:8] = struct.pack("<Q", int(random.choice([0, 7, head * 2, 10**8, 2**63])))
    else:
        out += bytes(int(random.integers(1, 100)))
    return way, bytes(out)


def sealed(data: bytes) -> bytes | None:
    """The file with digests that fit it; None where its header says nothing."""
    head = 8 + int.from_bytes(data[:8], "little")
    try:
        entries = json.loads(data[8:head])
        entries.pop("__metadata__")
        spans = sorted(x["data_offsets"] for x in entries.values())[:-1]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    try:
        rows = [tensors.digest(data[head + i : head + j]) for i, j in spans]
    except (TypeError, ValueError):
        return None
    rows.append(tensors.digest(data[:head]))
    rows.append(tensors.digest(b"".join(rows)))
    return data[: max(0, len(data) - 16 * len(rows))] + b"".join(rows)


def run(config: Config) -> list[dict[str, Any]]:
    """Counts of what became of the files."""
    count = 300 if config.fast else config.count
    random = np.random.default_rng(config.seed)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = sources(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        old = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + config.memory * 10**6, old[1]))
        try:
            counts = _count(folder, given, count, random)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, old)
    row = {
        "experiment": "lossless_faults",
        "files": count,
        **dict(sorted(counts.items())),
        "memory_limit_mb": config.memory,
        "processor_seconds": time.process_time() - start,
        "jax": metadata.version("jax"),
    }
    print(json.dumps(row, indent=1))
    return [row]


def _count(
    folder: Path,
    given: dict[str, tuple[bytes, Any]],
    count: int,
    random: np.random.Generator,
) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    path, names = folder / "mutated", list(given)
    for number in range(count):
        kind = names[number % len(names)]
        data, wanted = given[kind]
        way, bad = altered(data, random)
        forged = number // len(names) % 2 == 1
        if forged:
            bad = sealed(bad) or bad
        path.write_bytes(bad)
        try:
            if kind == "archive":
                storage.unpack(path, folder / f"out{number}")
                outcome = "unpacked"
            else:
                tree = jc.materialize(storage.load(path))
                same = _same(tree, wanted)
                if not same and not forged:
                    raise RuntimeError(f"{kind} {way} {number}: wrong, and unnoticed")
                outcome = "right" if same else "other numbers behind forged digests"
        except (ValueError, OSError) as error:
            if not str(error):
                raise
            outcome = f"refused: {type(error).__name__}"
        counts[outcome] += 1
        counts["forged digests" if forged else "digests as written"] += 1
    return counts


def _same(tree: Any, wanted: Any) -> bool:
    if jax.tree.structure(tree) != jax.tree.structure(wanted):
        return False
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True)
    return all(
        one.dtype == two.dtype and np.asarray(one).tobytes() == two.tobytes()
        for one, two in pairs
    )


if __name__ == "__main__":
    config = parse(Config, __doc__)
    append_lines(config.results, run(config))

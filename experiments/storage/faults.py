"""What do files do that are not what was written? Ten thousand of them.

Files of coded arrays, of coded leaves (levels of `rate_distortion` and masks among
them), shards of one save, and archives, alone and against a base, are altered: bits
flipped, bytes replaced, cut short, pieces moved, numbers in headers changed, values of
their JSON replaced, the first and last bytes of coded streams changed. Digests would
find nearly all of it; so half of the alterations are made behind them: the digests are
written anew over what was altered.

Each file must raise an error that names it or give back what was written; where digests
were forged, it may give other numbers. Memory is bounded.

    python -m experiments.storage.faults
"""

import collections
import contextlib
import dataclasses
import functools
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import Clock
from experiments.storage.alterations import altered, forged
from jaxcompress import storage

NAME = "x.safetensors"
ROWS = 5, 65  # read alone


@dataclasses.dataclass(frozen=True)
class Config:
    count: int = 10_000
    seed: int = 0
    memory: int = 100  # megabytes of addresses beyond those in use at the start
    fast: bool = False  # three hundred
    results: str = "experiments/storage/results/faults.jsonl"


class Source(NamedTuple):
    """Files by name; how they are read from a directory; and what they hold."""

    files: dict[str, bytes]
    read: Callable[[Path], Any]
    wanted: Any


def load(folder: Path) -> Any:
    """Load a file and make it dense."""
    return jax.tree.map(np.asarray, jc.materialize(storage.load(folder / NAME)))


def load_rows(folder: Path) -> Any:
    """Read a part of each array; digests of chunks, not of arrays, find alterations."""
    with storage.open_checkpoint(folder / NAME) as stored:
        return {name: stored.rows(name, *ROWS) for name in stored.names}


def unpack(folder: Path, base: Path | None = None) -> Any:
    """Unpack an archive: the bytes of its files by name; an error leaves nothing."""
    out = folder / "out"
    before = os.listdir(folder)
    try:
        storage.unpack(folder / NAME, out, base=base)
    except (ValueError, OSError) as error:
        if os.listdir(folder) != before:
            raise RuntimeError("something was left of what did not unpack") from error
        raise
    found = contents(out)
    shutil.rmtree(out)
    return found


def contents(folder: Path) -> dict[str, np.ndarray]:
    """Read the bytes of all files of a folder, by their relative names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(x.relative_to(folder)): np.fromfile(x, np.uint8) for x in files}


def sources(folder: Path) -> dict[str, Source]:
    """Write one file of each kind; a base stays in the directory."""
    random = np.random.default_rng(0)
    w = random.normal(0, 0.05, (160, 128)) * np.exp(random.normal(0, 1, (160, 1)))
    w = w.astype(np.float32)
    plain = {
        "bfloat16": w.astype(ml_dtypes.bfloat16),
        "float32": w,
        "float16": w.astype(np.float16),
        "codes": np.rint(random.normal(0, 3, (70, 90))).astype(np.int8),
        "ids": np.arange(3000, dtype=np.int32),
    }
    # Of each method one leaf; then coded, as the command line does it.
    methods = {
        "leaves": ("symmetric(bits=4, block=16)", "code_floats()"),
        "levels": ("rate_distortion(rate=2.05)",),
        "masks": ("magnitude(sparsity=0.9)", "magnitude(nm='2:4')"),
    }
    trees = {"plain": plain}
    for kind, stages in methods.items():
        rules = [(f"{i}/.*", stage) for i, stage in enumerate(stages)]
        tree = {str(i): {"kernel": w[:, : 128 // (i + 1)]} for i in range(len(stages))}
        recipe = jc.chain(rules, "entropy_code()", "code_floats()")
        trees[kind] = jc.compress(tree, recipe)

    found = {}

    def add(kind: str, write: Callable[[Path], Any], read: Any, wanted: Any) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            write(Path(name, NAME))
            files = {path.name: path.read_bytes() for path in Path(name).iterdir()}
        found[kind] = Source(files, read, wanted)

    for kind, tree in trees.items():
        dense = jax.tree.map(np.asarray, jc.materialize(tree))
        add(kind, functools.partial(storage.save, params=tree), load, dense)
    some = plain | {"leaf": trees["leaves"]["0"]["kernel"]}
    rows = {
        name: np.asarray(jc.materialize(x))[slice(*ROWS)] for name, x in some.items()
    }
    add("rows", functools.partial(storage.save, params=some), load_rows, rows)
    save = functools.partial(storage.save, params=plain)
    for kind, options in {
        "fast": {"coding": "decode"},
        "shards": {"max_shard_bytes": 100_000},
    }.items():
        add(kind, functools.partial(save, **options), load, plain)

    later = {"w": (w * (1 + 1e-6 * random.normal(0, 1, w.shape))).astype(w.dtype)}
    for name, tree in (("base", {"w": w}), ("later", later)):
        (folder / name / "sub").mkdir(parents=True)
        (folder / name / "config.json").write_text('{"layers": 12}\n' * 500)
        save_file(tree, folder / name / "sub" / NAME)
    for kind, base in {"archive": None, "against a base": folder / "base"}.items():
        pack = functools.partial(storage.pack, folder / "later", base=base)
        read = functools.partial(unpack, base=base)
        add(kind, pack, read, contents(folder / "later"))
    return found


def run(config: Config) -> list[dict[str, Any]]:
    """Alter files and read them; one row counts what became of them."""
    count = 300 if config.fast else config.count
    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = sources(folder)
        place = folder / "altered"
        for kind, source in given.items():  # so that what they need is compiled
            _write(source.files, place)
            if not _same(source.read(place), source.wanted):
                raise RuntimeError(f"{kind} did not come back as it was")
        with _bounded(config.memory) as memory:
            kinds = _count(place, given, count, np.random.default_rng(config.seed))
    total = sum(kinds.values(), collections.Counter())
    row = {
        "experiment": "lossless_faults",
        "files": count,
        **dict(sorted(total.items())),
        "by_kind": {kind: dict(sorted(some.items())) for kind, some in kinds.items()},
        "largest_file": max(len(x) for s in given.values() for x in s.files.values()),
        "memory_limit_mb": config.memory,
        **memory,
        "processor_seconds": clock.processor_seconds,
    }
    results = Results(config, experiment="lossless_faults")
    results.add(row)
    return results.rows


@contextlib.contextmanager
def _bounded(megabytes: int) -> Iterator[dict[str, float]]:
    """Bound the addresses beyond those in use; says how much memory became resident."""
    found: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    held, used = _status("VmRSS"), _status("VmSize")
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 10**6, old[1]))
    try:
        yield found
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    found["resident_at_start_mb"] = held / 1e6
    found["resident_growth_mb"] = (_status("VmHWM") - held) / 1e6


def _status(key: str) -> int:
    """Read bytes, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def _count(
    place: Path, given: dict[str, Source], count: int, random: np.random.Generator
) -> dict[str, collections.Counter]:
    """Count for each kind how often it ended how."""
    counts = {kind: collections.Counter() for kind in given}
    for number in range(count):
        kind = list(given)[number % len(given)]
        source = given[kind]
        name = str(random.choice(sorted(source.files)))
        way, bad = altered(source.files[name], random)
        files = source.files | {name: bad}
        behind = number // len(given) % 2 == 1
        if behind:
            files = forged(files)
        what = f"{kind} {number}: {way} of {name}, digests {'forged' * behind}"
        _write(files, place)
        try:
            outcome = _outcome(source.read(place), source.wanted)
        except (ValueError, OSError) as error:
            if not str(error):
                raise RuntimeError(f"{what}: an error without a text") from error
            outcome = f"refused: {type(error).__name__}"
            if str(place.parent) not in str(error):  # of a leaf that was loaded
                outcome += " without the file's name"
        except Exception as error:
            raise RuntimeError(f"{what}: {error!r}") from error
        # Reading rows alone reads, and checks, not all of a file.
        refused = outcome.startswith("refused")
        if not behind and not refused and (kind, outcome) != ("rows", "right"):
            raise RuntimeError(f"{what}: unnoticed, {outcome}")
        end = outcome if refused or outcome == "right" else f"{outcome}, forged"
        counts[kind][end] += 1
        counts[kind]["forged digests" if behind else "digests as written"] += 1
    return counts


def _write(files: dict[str, bytes], place: Path) -> None:
    """Make these the files of a directory."""
    place.mkdir(exist_ok=True)
    for name in set(os.listdir(place)) - files.keys():
        (place / name).unlink()
    for name, data in files.items():
        (place / name).write_bytes(data)


def _outcome(found: Any, wanted: Any) -> str:
    if _same(found, wanted):
        return "right"
    leaves = jax.tree.leaves(wanted)
    kinds = [[(x.shape, x.dtype) for x in y] for y in (jax.tree.leaves(found), leaves)]
    if kinds[0] != kinds[1]:
        return "other shapes"
    return "other bytes" if leaves[0].dtype == np.uint8 else "other numbers"


def _same(found: Any, wanted: Any) -> bool:
    if jax.tree.structure(found) != jax.tree.structure(wanted):
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(
        (one.shape, one.dtype) == (two.shape, two.dtype)
        and one.tobytes() == two.tobytes()
        for one, two in pairs
    )


if __name__ == "__main__":
    run(parse(Config, __doc__))

"""How small, and how fast, are a model's weights without loss, beside other coders?

All weights of a `.safetensors` file as bfloat16, float16 and float32. Bits per weight
are those of files; every coder gets the same bytes, takes its turn in each round, and
gives them back. Processor seconds of one thread; ratios to ZipNN are of the same round.
The decoder in XLA runs on the layers as a scanned model holds them, stacked.

Fresh memory costs as much as decoding: ZipNN is twice as fast where the C library
keeps what it was given back, as other coders in the process, or a setting, make it:

    export MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000

    python -m experiments.coding.lossless MODEL.safetensors
    python -m experiments.coding.lossless MODEL.safetensors --sizes  # no clocks
"""

import contextlib
import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import jaxcompress as jc
from experiments.coding.other_coders import Coder, peers, programs
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import timed
from jaxcompress.coding import array_codecs, chunked_stream, code_floats
from jaxcompress.coding.floats import chunks as float_chunks
from jaxcompress.coding.threads import in_order
from jaxcompress.storage import save

KINDS = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = ""  # a file; without one, weights made up
    rounds: int = 7
    kinds: str = ",".join(KINDS)
    threads: int = 1  # for ours, where more than one is measured
    only: str = ""  # peers to measure, separated by ","; all of them by default
    sizes: bool = False  # bits only, those of command lines on the path too
    fast: bool = False  # made-up weights of a fortieth of the size, two rounds
    results: str = "experiments/coding/results/lossless.jsonl"


def weights(config: Config) -> dict[str, np.ndarray]:
    """Load or draw floating-point tensors by name."""
    if config.model:
        found = load_file(config.model)
        return {name: x for name, x in found.items() if x.dtype == np.float32}
    random = np.random.default_rng(0)
    made = {"embedding": random.normal(0, 0.05, (1500, 384))}
    for i in range(2):
        made[f"layer.{i}.kernel"] = random.normal(0, 0.04, (256, 384))
    scale = np.exp(random.normal(0, 0.3, 4000))
    return {
        name: (x * scale[: len(x), None]).astype(np.float32) for name, x in made.items()
    }


def ours(tensors: list[np.ndarray], threads: int, fast: bool) -> Coder:
    """Make our coder: chunks in memory, as files hold them, without checksums."""

    def encode(_: bytes) -> list[tuple[str | None, list[bytes]]]:
        made = []
        for array in tensors:
            how = array_codecs.choose(array, fast=fast)
            if how is None:
                made.append((None, [array.tobytes()]))
                continue
            width = float_chunks.block_width(array.shape)
            step = float_chunks.chunk_words(width)
            words = array.reshape(-1).view(f"u{array.dtype.itemsize}")
            starts = range(0, words.size, step)

            def work(
                start: int, words: Any = words, how: str = how, width: int = width
            ) -> bytes:
                part = words[start : start + float_chunks.chunk_words(width)]
                return chunked_stream.encode_chunk(part, how, width)

            made.append((how, list(in_order(work, starts, threads=threads))))
        return made

    def decode(coded: list[tuple[str | None, list[bytes]]]) -> list[np.ndarray]:
        out = []
        for array, (how, chunks) in zip(tensors, coded, strict=True):
            if how is None:
                out.append(np.frombuffer(chunks[0], array.dtype))
                continue
            width = float_chunks.block_width(array.shape)
            step = float_chunks.chunk_words(width)
            words = np.empty(array.size, f"u{array.dtype.itemsize}")

            def work(
                job: tuple[int, bytes],
                words: Any = words,
                how: str = how,
                step: int = step,
                width: int = width,
            ) -> None:
                part = words[job[0] * step : (job[0] + 1) * step]
                chunked_stream.decode_chunk(job[1], how, width, part)

            for _ in in_order(work, enumerate(chunks), threads=threads):
                pass
            out.append(words.view(array.dtype))
        return out

    def size(coded: list[tuple[str | None, list[bytes]]]) -> int:
        return sum(len(chunk) for _, chunks in coded for chunk in chunks)

    return encode, decode, size


@contextlib.contextmanager
def one_core(wanted: bool) -> Iterator[None]:
    """Keep to one processor, where the system can; XLA makes no other thread then.

    If JAX has begun no work before.
    """
    if not wanted or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def file_bits(tensors: dict[str, np.ndarray], fast: bool = False) -> float:
    """Count the bits per weight of the file that `save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        save(path, tensors, coding="decode" if fast else "size")
        return 8 * path.stat().st_size / sum(x.size for x in tensors.values())


def only_sizes(config: Config, source: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Measure bits per weight alone; a row per kind and coder."""
    results = Results(config, experiment="lossless_sizes")
    for kind in config.kinds.split(","):
        tensors = {name: x.astype(jnp.dtype(kind)) for name, x in source.items()}
        data = b"".join(x.tobytes() for x in tensors.values())
        count = sum(x.size for x in tensors.values())
        found = {"ours": file_bits(tensors)}
        if kind != "float16":
            found["ours, fast"] = file_bits(tensors, fast=True)
        for name, (encode, _, size) in peers(data, kind).items():
            found[name] = 8 * size(encode(bytearray(data))) / count
        found |= {name: row[0] for name, row in programs(tensors).items()}
        for name, bits in found.items():
            results.add({"kind": kind, "coder": name, "file_bits": bits})
    return results.rows


def stacked(tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Stack the large tensors of all layers."""
    groups: dict[str, list[np.ndarray]] = {}
    for name, x in tensors.items():
        if x.ndim == 2 and x.size > 50_000:
            groups.setdefault(re.sub(r"\d+", "*", name), []).append(x)
    return [x[0] if len(x) == 1 else np.stack(x) for x in groups.values()]


def in_xla(tensors: dict[str, np.ndarray], rounds: int, fast: bool) -> dict[str, Any]:
    """Measure gigabytes per processor second in XLA, and bits per weight in memory."""
    decode = jax.jit(lambda leaf: leaf.materialize())
    dense = stacked(tensors)
    coded = [code_floats(x, speed="decode" if fast else "size") for x in dense]
    spent, each = [], {}
    for leaf, x in zip(coded, dense, strict=True):
        word = f"u{x.dtype.itemsize}"
        if not (np.asarray(decode(leaf)).view(word) == x.view(word)).all():
            raise ValueError(f"XLA did not give an array of shape {x.shape} back")
    for _ in range(rounds):
        total = 0.0
        for leaf, x in zip(coded, dense, strict=True):
            _, _, seconds = timed(lambda leaf=leaf: decode(leaf))
            total += seconds
            best = each.get(x.shape, math.inf)
            each[x.shape] = min(best, seconds / x.nbytes)
        spent.append(total)
    size = sum(x.nbytes for x in dense)
    return {
        "xla_gb_s": size / np.median(spent) / 1e9,
        "xla_gb_s_best": size / min(spent) / 1e9,
        "xla_gb_s_worst": size / max(spent) / 1e9,
        "xla_best_by_shape": {
            "x".join(map(str, shape)): 1 / seconds / 1e9
            for shape, seconds in each.items()
        },
        "memory_bits": 8 * jc.nbytes(coded) / sum(x.size for x in dense),
    }


def run(config: Config) -> list[dict[str, Any]]:
    """Measure all coders on each kind of weights; a row per kind and coder."""
    with one_core(config.threads == 1):
        return measure(config)


def measure(config: Config) -> list[dict[str, Any]]:
    """Code and decode by every coder in turn, for some rounds."""
    if config.fast:
        config = dataclasses.replace(config, model="", rounds=2, kinds="bfloat16")
    source = weights(config)
    if config.sizes:
        return only_sizes(config, source)
    results = Results(
        config,
        experiment="lossless",
        weights=sum(x.size for x in source.values()),
        rounds=config.rounds,
        threads=config.threads,
        only=config.only,
        memory_kept=bool(os.environ.get("MALLOC_TRIM_THRESHOLD_")),
    )
    for kind in config.kinds.split(","):
        tensors = {name: x.astype(jnp.dtype(kind)) for name, x in source.items()}
        data = b"".join(x.tobytes() for x in tensors.values())
        count = sum(x.size for x in tensors.values())
        listed = list(tensors.values())
        coders = {"ours": ours(listed, config.threads, False)}
        if kind != "float16":
            coders["ours, fast"] = ours(listed, config.threads, True)
        only = config.only.split(",")
        others = peers(data, kind).items()
        coders |= {k: x for k, x in others if not config.only or k in only}
        spent: dict[str, list[list[float]]] = {name: [[], []] for name in coders}
        passed: dict[str, list[list[float]]] = {name: [[], []] for name in coders}
        sizes = {}
        for number in range(config.rounds):
            for name, (encode, decode, size) in coders.items():
                given = bytearray(data)  # a copy, as ZipNN writes to what it is given
                coded, *forth = timed(lambda encode=encode, given=given: encode(given))
                back, *hence = timed(lambda decode=decode, coded=coded: decode(coded))
                for way, times in enumerate((forth, hence)):
                    passed[name][way].append(times[0])
                    spent[name][way].append(times[1])
                sizes[name] = size(coded)
                if number == 0 and _bytes(back) != data:
                    raise ValueError(f"{name} did not give {kind} back")
                del coded, back
        base = np.array(spent.get("ZipNN", spent["ours"]))
        for name, (forth, back) in spent.items():
            row = {
                "kind": kind,
                "coder": name,
                "bits": 8 * sizes[name] / count,
                **_speeds("encode", len(data), forth, base[0]),
                **_speeds("decode", len(data), back, base[1]),
                "encode_passed_mb_s": len(data) / np.median(passed[name][0]) / 1e6,
                "decode_passed_mb_s": len(data) / np.median(passed[name][1]) / 1e6,
            }
            if name.startswith("ours") and config.threads == 1:
                fast = name != "ours"
                row["file_bits"] = file_bits(tensors, fast)
                row |= in_xla(tensors, config.rounds, fast)
            results.add(row)
        for name, (bits, forth, back) in programs(tensors).items():
            if config.only and name not in only:
                continue
            results.add(
                {
                    "kind": kind,
                    "coder": name,
                    "bits": bits,
                    **_speeds("encode", len(data), [forth], np.median(base[0])),
                    **_speeds("decode", len(data), [back], np.median(base[1])),
                }
            )
    return results.rows


def _bytes(back: Any) -> bytes:
    if isinstance(back, list):
        return b"".join(x.tobytes() for x in back)
    return back.tobytes() if isinstance(back, np.ndarray) else bytes(back)


def _speeds(
    name: str, size: int, spent: list[float], base: np.ndarray
) -> dict[str, float]:
    ratios = base / np.array(spent)
    return {
        f"{name}_mb_s": size / np.median(spent) / 1e6,
        f"{name}_mb_s_best": size / min(spent) / 1e6,
        f"{name}_to_zipnn": float(np.median(ratios)),
        f"{name}_to_zipnn_least": float(ratios.min()),
        f"{name}_to_zipnn_most": float(ratios.max()),
    }


if __name__ == "__main__":
    run(parse(Config, __doc__))

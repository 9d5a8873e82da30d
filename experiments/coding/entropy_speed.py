"""How small, and how fast, is the coder beside the standard library's compressors?

The same codes as bytes through zlib and lzma (and zstandard where it is installed).
Coders take turns for several rounds, so that other work on the machine slows all
alike; processor seconds, best of the rounds. Encoding is on the host, decoding in XLA.

    python -m experiments.coding.entropy_speed --fast
"""

import dataclasses
import importlib.util
import lzma
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import timed
from jaxcompress.coding import code_floats, entropy_code
from jaxcompress.coding.integers.leaf import stored_bytes


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 2048
    columns: int = 2048
    rounds: int = 5
    fast: bool = False  # 512 rows, two rounds
    results: str = "experiments/coding/results/entropy_speed.jsonl"


def arrays(rows: int, columns: int) -> dict[str, np.ndarray]:
    """Draw Gaussian weights of unequal rows as codes and numbers; a sparse mask."""
    random = np.random.default_rng(0)
    scale = np.exp(random.normal(0, 0.2, (rows, 1)))
    weights = (random.normal(0, 0.04, (rows, columns)) * scale).astype(np.float32)
    small = np.clip(np.rint(weights * 55), -8, 7).astype(np.int8) + np.int8(8)
    large = np.clip(np.rint(weights * 800), -128, 127).astype(np.int8)
    return {
        "4-bit codes": small.astype(np.uint8),
        "8-bit codes": large,
        "mask, 2 % set": np.abs(weights) > 0.098,
        "bfloat16": weights.astype(jax.numpy.bfloat16),
    }


def peers() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """Collect other coders: name to (compress, decompress)."""
    found = {
        "zlib 6": (zlib.compress, zlib.decompress),
        "lzma 1": (lambda x: lzma.compress(x, preset=1), lzma.decompress),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        packer, reader = zstandard.ZstdCompressor(3), zstandard.ZstdDecompressor()
        found["zstd 3"] = (packer.compress, reader.decompress)
    return found


def ours(array: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Make calls that encode an array, and decode the result."""
    method = code_floats if array.dtype == jax.numpy.bfloat16 else entropy_code
    decode = jax.jit(lambda leaf: leaf.materialize())
    return lambda: method(array), decode


def run(config: Config) -> list[dict[str, Any]]:
    """Measure bits per number and megabytes a second; a row per array and coder."""
    if config.fast:
        config = dataclasses.replace(config, rows=512, rounds=2)
    results = Results(config)
    for name, array in arrays(config.rows, config.columns).items():
        data = array.tobytes()
        encode, decode = ours(array)
        coders = {"ours": (encode, decode)}
        for peer, (pack, unpack) in peers().items():
            coders[peer] = (lambda pack=pack, data=data: pack(data), unpack)
        best = {coder: [np.inf, np.inf] for coder in coders}
        sizes = {}
        decode(encode())  # compiles
        for _ in range(config.rounds):
            for coder, (forth, back) in coders.items():
                coded, _, spent = timed(forth)
                best[coder][0] = min(best[coder][0], spent)
                result, _, spent = timed(lambda back=back, coded=coded: back(coded))
                best[coder][1] = min(best[coder][1], spent)
                same = result if coder != "ours" else np.asarray(result).tobytes()
                if same != data:
                    raise ValueError(f"{coder} did not give {name} back")
                sizes[coder] = stored_bytes(coded) if coder == "ours" else len(coded)
        for coder, (forth, back) in best.items():
            results.add(
                {
                    "array": name,
                    "coder": coder,
                    "bits": 8 * sizes[coder] / array.size,
                    "encode_mb_s": len(data) / max(forth, 1e-9) / 1e6,
                    "decode_mb_s": len(data) / max(back, 1e-9) / 1e6,
                    "encode_ratio": best["ours"][0] / max(forth, 1e-9),
                    "decode_ratio": best["ours"][1] / max(back, 1e-9),
                    "numbers": array.size,
                }
            )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

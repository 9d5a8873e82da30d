"""What does lossless coding add to quantized weights, in bytes of files?

For every tensor of two axes: 8 bits per output channel, 4 bits in blocks of 128, and
one uniform step for the whole tensor, which is what rate-distortion theory asks for
where codes are entropy-coded. Files hold codes and scales: packed, as `save` codes them
by itself, and behind `entropy_code` and `code_floats`. With `--rates`, the levels of
`rate_distortion` too (without moments), packed and as its leaves hold them.

    python -m experiments.coding.quantized_codes MODEL.safetensors
    python -m experiments.coding.quantized_codes SmolLM2.gguf --layers 4
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from jaxcompress.coding import code_floats, entropy_code, pack_bits
from jaxcompress.reporting import track
from jaxcompress.tree.paths import roots


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"  # or a file
    layers: int = 0  # of a model with layers, the first so many; 0 for everything
    rates: tuple[float, ...] = (0.0,)  # of rate_distortion; 0 for none
    fast: bool = False  # two tensors
    results: str = "experiments/coding/results/quantized_codes.jsonl"


def tensors(config: Config) -> dict[str, np.ndarray]:
    """Load float tensors `[outputs, inputs]` by name."""
    if config.model.endswith(".safetensors"):
        found = load_file(config.model)
    else:
        _, params, _ = jc.models.load(config.model, scan=False)
        names = dict(roots(params))
        kept = {f"layer_{i}" for i in range(config.layers)}
        found = {
            name: np.asarray(jc.materialize(x)).T
            for name, x in names.items()
            if x.ndim == 2 and (not kept or name.split("/")[0] in kept)
        }
    found = {
        name: np.ascontiguousarray(x, np.float32)
        for name, x in found.items()
        if x.ndim == 2 and x.dtype != np.int64 and x.size >= 4096
    }
    return dict(list(found.items())[:2]) if config.fast else found


def quantized(x: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Quantize one tensor to codes and scales."""
    if kind == "8 bits per channel":
        scale = np.abs(x).max(axis=1, keepdims=True) / 127
    elif kind == "4 bits, blocks of 128":
        blocks = x.reshape(len(x), -1, 128)
        scale = np.abs(blocks).max(axis=2, keepdims=True) / 7
        codes = np.rint(blocks / np.where(scale > 0, scale, 1)).reshape(x.shape)
        return {"codes": codes.astype(np.int8), "scale": scale[..., 0]}
    else:
        scale = np.full((1, 1), x.std() / 3.0, np.float32)
    codes = np.rint(x / np.where(scale > 0, scale, 1)).clip(-128, 127)
    return {"codes": codes.astype(np.int8), "scale": scale}


def file_bytes(tree: Any, *, coded: bool) -> int:
    """Count the bytes of the file of a tree, coded without loss or not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        jc.save(path, tree, coding="size" if coded else "none")
        return path.stat().st_size


def packed(part: dict[str, np.ndarray], bits: int) -> dict[str, Any]:
    """Pack codes in as many bits as they have, as a quantized leaf holds them."""
    codes = (part["codes"].astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    return {"codes": pack_bits(codes, bits), "scale": part["scale"]}


def entropies(parts: dict[str, dict[str, np.ndarray]], window: int) -> float:
    """Count order-0 bits per code, each window with a table of its own, free.

    More than this a model that adapts as it goes can't gain; it pays for learning.
    """
    bits = count = 0.0
    for part in parts.values():
        flat = part["codes"].reshape(-1).astype(np.int64) + 128
        for start in range(0, flat.size, window):
            seen = np.bincount(flat[start : start + window])
            seen = seen[seen > 0].astype(np.float64)
            bits += float(seen @ np.log2(seen.sum() / seen))
        count += flat.size
    return bits / count


def run(config: Config) -> list[dict[str, Any]]:
    """Measure each way to quantize; a row for each."""
    given = tensors(config)
    results = Results(config, experiment="lossless_codes")
    for kind in ("8 bits per channel", "4 bits, blocks of 128", "one step per tensor"):
        some = {
            name: x
            for name, x in given.items()
            if "128" not in kind or x.shape[1] % 128 == 0
        }
        count = sum(x.size for x in some.values())
        parts = {name: quantized(x, kind) for name, x in some.items()}
        clock = time.process_time()
        coded = {
            name: {
                "codes": entropy_code(part["codes"]),
                "scale": code_floats(part["scale"]),
            }
            for name, part in parts.items()
        }
        seconds = time.process_time() - clock
        for name, part in parts.items():
            back = jc.materialize(coded[name])
            if any((np.asarray(back[key]) != part[key]).any() for key in part):
                raise ValueError(f"{name} did not come back")
        bits = 4 if kind.startswith("4") else 8
        plain = {name: packed(part, bits) for name, part in parts.items()}
        codes = {name: leaf["codes"] for name, leaf in coded.items()}
        noise = sum(
            float(((_dense(parts[name], x) - x) ** 2).sum()) for name, x in some.items()
        )
        power = sum(float((x**2).sum()) for x in some.values())
        results.add(
            {
                "model": Path(config.model).name,
                "layers": config.layers,
                "kind": kind,
                "weights": count,
                "signal_to_noise_db": 10 * np.log10(power / noise),
                "bits_packed": 8 * file_bytes(plain, coded=False) / count,
                "bits_saved_plainly": 8 * file_bytes(plain, coded=True) / count,
                "bits_entropy_coded": 8 * file_bytes(coded, coded=True) / count,
                "bits_of_codes_alone": 8 * file_bytes(codes, coded=True) / count,
                "entropy_by_tensor": entropies(parts, 1 << 40),
                "entropy_by_window_of_16384": entropies(parts, 1 << 14),
                "encode_mb_s": count / seconds / 1e6,
            }
        )
    for rate in filter(None, config.rates):
        results.add(levels_row(config, given, rate))
    return results.rows


def levels_row(
    config: Config, given: dict[str, np.ndarray], rate: float
) -> dict[str, Any]:
    """Measure levels that were made for an entropy coder, with it and without."""
    method = jc.rate_distortion(rate=rate)
    clock = time.process_time()
    found = {name: method(x.T) for name, x in track(given.items(), "quantizing")}
    seconds = time.process_time() - clock
    plain, noise = {}, 0.0
    for name, leaf in found.items():
        levels = np.asarray(leaf.levels.materialize()).astype(np.int32)
        levels -= levels.min()
        bits = int(levels.max()).bit_length()
        plain[name] = {"codes": pack_bits(levels, bits), "steps": leaf.steps}
        noise += float(((np.asarray(leaf.materialize()).T - given[name]) ** 2).sum())
    count = sum(x.size for x in given.values())
    power = sum(float((x**2).sum()) for x in given.values())
    codes = {name: leaf.levels for name, leaf in found.items()}
    return {
        "model": Path(config.model).name,
        "layers": config.layers,
        "kind": f"rate_distortion(rate={rate})",
        "weights": count,
        "signal_to_noise_db": 10 * np.log10(power / noise),
        "bits_packed": 8 * file_bytes(plain, coded=False) / count,
        "bits_saved_plainly": 8 * file_bytes(plain, coded=True) / count,
        "bits_entropy_coded": 8 * file_bytes(found, coded=True) / count,
        "bits_of_codes_alone": 8 * file_bytes(codes, coded=True) / count,
        "quantize_mb_s": count / seconds / 1e6,
    }


def _dense(part: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    codes, scale = part["codes"].astype(np.float32), part["scale"]
    if scale.shape[1] > 1:
        return (codes.reshape(*scale.shape, -1) * scale[..., None]).reshape(x.shape)
    return codes * scale


if __name__ == "__main__":
    run(parse(Config, __doc__))

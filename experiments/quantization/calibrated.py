"""What do calibrated methods cost a real model, beside rounding to nearest?

Calibrates on the beginning of a text, compresses every linear layer (`--embedding`: the
tied embedding too), saves, loads back, and compares with the original on the end of the
text and on a second text, the docstrings of the standard library. Bits are those of
the compressed weights in the file, scales and zero points included, without lossless
coding. One JSON line per method and text, appended as it is measured; rows that the
results hold already are left out:

    python -m experiments.quantization.calibrated SmolLM2.gguf text.txt --bits 3
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load, quality
from experiments.common.results import Results
from experiments.common.texts import cut, full_windows, split
from experiments.common.timing import Clock
from jaxcompress import reporting
from jaxcompress.calibration.moment_files import moments_from_arrays, moments_to_arrays
from jaxcompress.evaluation import Apply
from jaxcompress.tree.equality import same_bits

# Methods by name; {b} is the number of bits. "blockwise" ones see the compressed
# prefix, the others moments of the original model.
METHODS = {
    "nearest": "asymmetric(bits={b}, block=128)",
    "nearest, full range": "symmetric(bits={b}, block=128, full_range=True)",
    "hqq": "hqq(bits={b}, block=64)",
    "gptq": "gptq(bits={b}, block=128, grid='asymmetric', search=False)",
    "gptq, searched steps": "gptq(bits={b}, block=128, grid='asymmetric')",
    "gptq, blockwise": "gptq(bits={b}, block=128, grid='asymmetric', search=False)",
    "awq": "awq(bits={b}, block=128)",
    "learned": "learned(bits={b}, block=128, grid='asymmetric')",
    "mixed": "mixed_channels(bits={b}, fraction=0.02, fine_bits=8, block=128, "
    "grid='asymmetric')",
}
FORMATS = {  # of about four bits
    "nf4": "nf4(block=64)",
    "mxfp4": "mxfp4(search=True)",
    "nvfp4": "nvfp4()",
    "gptq on nvfp4": "gptq(grid='nvfp4')",
}
WITHOUT_DATA = ("nearest", "hqq", "nf4", "mxfp4", "nvfp4")


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    bits: int = 4
    only: str = ""  # names of methods, separated by ";"; all of these bits by default
    embedding: bool = False  # compress the tied embedding too, to the same bits
    planned: str = ""  # a JSON file of rules, measured as "planned"
    drift: float = 0.0  # of it that "blockwise" targets make up for
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    calibration: int = 64  # windows
    windows: int = 4  # of each text
    tokens: int = 512  # in a window
    cache: str = ""  # directory for moments, which take longer than the rest
    moments: bool = False  # only make the cache of moments
    fast: bool = False  # the reference model and little text
    results: str = "experiments/quantization/results/calibrated.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the methods of one number of bits that the results lack."""
    names = list(METHODS) + list(FORMATS if config.bits == 4 else {})
    if config.fast:
        names = ["nearest", "gptq", "gptq, blockwise"]
        config = dataclasses.replace(
            config, model="reference", bits=3, calibration=8, windows=2, tokens=256
        )
    names = config.only.split(";") if config.only else names
    names = ["planned"] if config.planned else names
    original = load(config.model)
    calibration, batches = texts(config, original.tokenizer)
    results = Results(config, model=original.name)
    if config.moments:
        one_shot(config, original.model, original.params, calibration)
        return results.rows
    moments = None
    for name in names:
        data = 0 if name.startswith(WITHOUT_DATA) else config.calibration
        labels = {
            "method": label(config, name),
            "calibration_tokens": data * config.tokens,
        }
        if all(
            results.holds(model=original.name, text=text, **labels) for text in batches
        ):
            continue
        recipe = rules(config, name)
        clock = Clock()
        if "blockwise" in name:
            small = jc.compress_blockwise(
                original.model,
                original.params,
                recipe,
                calibration,
                drift=config.drift,
                progress=True,
            )
        else:
            if moments is None and data:
                moments = one_shot(config, original.model, original.params, calibration)
                clock = Clock()
            small = jc.compress(original.params, recipe, moments)
        took = {
            "compress_seconds": clock.seconds,
            "compress_processor_seconds": clock.processor_seconds,
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            jc.save(path, small)
            back = jc.load(path)
            if not same_bits(small, back):
                raise ValueError(f"{name}: the file did not come back bit for bit")
            sizes = stored(path, back)
        del small
        ready = jc.models.stack_layers(jax.jit(jc.materialize)(back))
        del back
        for text, each in batches.items():
            found = jc.compare(
                Apply(original.scanned),
                original.dense,
                ready,
                reporting.track(each, name),
            )
            results.add(
                {
                    **labels,
                    "recipe": recipe,
                    "text": text,
                    **sizes,
                    **quality(found),
                    **took,
                    "peak_bytes": reporting.peak_memory(),
                }
            )
    return results.rows


def label(config: Config, name: str) -> str:
    """Name a method with what the configuration adds to it."""
    everywhere = ", embedding too" if config.embedding else ""
    if "blockwise" in name and config.drift:
        name += f", drift {config.drift:g}"
    return f"{name}, {config.bits} bits{everywhere}"


def rules(config: Config, name: str) -> list[Any]:
    """Build the recipe of a method: all kernels, and the embedding if asked for."""
    if name == "planned":
        return json.loads(Path(config.planned).read_text(encoding="utf-8"))
    method = (METHODS | FORMATS)[name].format(b=config.bits)
    found: list[Any] = [(".*kernel", method)]
    return [*found, (".*embedding", method)] if config.embedding else found


def texts(config: Any, tokenizer: Any) -> tuple[list[np.ndarray], dict[str, list]]:
    """Cut batches of calibration tokens, and batches of each text to measure on.

    Raises:
        ValueError: if the text has fewer tokens to calibrate on than are asked for.
    """
    parts = split(config.text, also=config.also, fraction=config.fraction, packaged=0.2)
    size = min(16, config.calibration)
    calibration = full_windows(
        tokenizer,
        parts.calibration,
        tokens=config.tokens,
        limit=config.calibration,
        batch=size,
    )
    if len(calibration) * size < config.calibration // size * size:
        raise ValueError(
            f"{calibration.size} tokens to calibrate on, "
            f"{config.calibration * config.tokens} asked for; give a longer text"
        )
    batches = {
        name: cut(tokenizer, text, tokens=config.tokens, limit=config.windows)
        for name, text in parts.measured.items()
    }
    return list(calibration), batches


def one_shot(
    config: Any, model: Any, params: Any, batches: list[np.ndarray]
) -> dict[str, jc.Moments]:
    """Collect moments of the original model; the cache keeps parts of them."""
    total: dict[str, jc.Moments] = {}
    for number, batch in enumerate(batches):
        name = f"{Path(config.model).stem}-{config.tokens}-{number:03}.safetensors"
        path = Path(config.cache) / name if config.cache and not config.fast else None
        if path is not None and path.exists():
            with jc.open_checkpoint(path) as file:
                tree = jax.tree.map(file.read, file.tree)["moments"]
            found = {key: moments_from_arrays(x) for key, x in tree.items()}
        else:
            found = jc.collect_moments(model, params, [batch])
        if path is not None and not path.exists():
            kept = {key: moments_to_arrays(m) for key, m in found.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            jc.save(path, {"moments": kept})
        total = {key: total[key] + m if key in total else m for key, m in found.items()}
    return total


def stored(path: Path, params: Any) -> dict[str, float]:
    """Measure the file, and bits per weight of what is compressed in it."""
    with jc.open_checkpoint(path) as file:
        described = {name: file.describe(name) for name in file.names}
        leaves = [name for name, (kind, *_) in described.items() if kind != "array"]
        weights = sum(int(np.prod(described[name][1])) for name in leaves)
        bits = 8 * sum(file.nbytes(name) for name in leaves) / weights
    size = reporting.measure(params, path)
    return {
        "bits_per_compressed_weight": bits,
        "compressed_weights": weights,
        "file_bytes": size.file_bytes,
        "bits_per_weight": size.bits_per_weight,
    }


if __name__ == "__main__":
    run(parse(Config, __doc__))

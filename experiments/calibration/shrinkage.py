"""How far should errors be fed along the correlations of the calibration text?

The first layers of a model by each method and shrinkage of the second moments, the rest
in float32: divergence on the end of the text that was calibrated on, and on others of
other kinds. One JSON line per row and text; rows that the results hold are left out:

    python -m experiments.calibration.shrinkage SmolLM2.gguf text.txt
"""

import dataclasses
from typing import Any

import jax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load
from experiments.common.results import Results
from experiments.common.timing import Clock
from experiments.quantization import calibrated
from experiments.rate_distortion.models import compared

METHODS = (
    "gptq(bits=3, block=64, grid='asymmetric')",
    "rate_distortion(rate=3.05, states=8)",
    "alps(sparsity=0.5)",
)


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    methods: str = ";".join(METHODS)
    shrinkages: tuple[float, ...] = (0.0, 0.1)
    layers: int = 6  # the first ones
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings,plays"  # further texts to measure on
    calibration: int = 64  # windows
    windows: int = 8  # of each text
    tokens: int = 512  # in a window
    fast: bool = False  # one layer of the reference model, little text
    results: str = "experiments/calibration/results/shrinkage.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the methods and shrinkages that the results lack; a row for each text."""
    if config.fast:
        config = dataclasses.replace(
            config,
            methods=METHODS[0],
            layers=1,
            also="docstrings",
            calibration=4,
            windows=2,
            tokens=256,
        )
    original = load(config.model)
    calibration, batches = calibrated.texts(config, original.tokenizer)
    model, params = jc.models.fewer_layers(
        original.model, original.params, range(config.layers)
    )
    results, moments = Results(config), None
    for method in config.methods.split(";"):
        for shrinkage in config.shrinkages:
            label = {
                "model": original.name,
                "layers": config.layers,
                "calibration_tokens": config.calibration * config.tokens,
                "variant": method,
                "shrinkage": shrinkage,
            }
            if results.holds(**label):
                continue
            moments = moments or jc.collect_moments(model, params, calibration)
            clock = Clock()
            recipe = [(".*kernel", f"{method[:-1]}, shrinkage={shrinkage})")]
            ready = jax.jit(jc.materialize)(jc.compress(params, recipe, moments))
            about = {"compress_processor_seconds": clock.processor_seconds}
            layers = {name: x for name, x in ready.items() if name.startswith("layer_")}
            stacked = jc.models.stack_layers(original.params | layers)
            compared(
                *(results, label, original.scanned, original.dense, stacked),
                *(batches, about),
            )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

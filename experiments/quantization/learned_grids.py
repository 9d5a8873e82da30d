"""What does learning the grid gain, and which way of rounding learns best?

Quantizes the layers' kernels to nearest, with error feedback, and learned on the
expected output error with each kind of rounding, and with the width found too; compares
all with the float model, on text that was not used for calibration. One JSON line per
row; the reference model by default, or a model and a text whose end is measured on:

    python -m experiments.quantization.learned_grids SmolLM2.gguf text.txt --block 128
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import quality
from experiments.common.results import Results
from experiments.common.texts import cut, full_windows, split
from jaxcompress.evaluation import Apply

KERNELS = r"layers/.*kernel"


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    bits: int = 3
    block: int = 64
    steps: int = 60  # of descent
    calibration: int = 64  # windows
    windows: int = 16  # of text to measure on
    tokens: int = 512  # in a window
    only: str = ""  # methods whose text holds this
    fast: bool = False  # one method, a few windows
    results: str = "experiments/quantization/results/learned_grids.jsonl"


def methods(config: Config) -> list[str]:
    """List the recipes of the rows."""
    options = f"bits={config.bits}, block={config.block}"
    descent = f"block={config.block}, grid='asymmetric', steps={config.steps}"
    found = [
        f"asymmetric({options})",
        f"gptq({options}, grid='asymmetric')",
        *(
            f"learned(bits={config.bits}, {descent}, rounding='{rounding}')"
            for rounding in ("nearest", "offsets", "relaxed", "coordinates")
        ),
        f"learned(bits='auto', cost=0.03, {descent})",
    ]
    return [method for method in found if config.only in method]


def run(config: Config) -> list[dict[str, Any]]:
    """Measure each method; a row for each."""
    if config.fast:
        config = dataclasses.replace(
            config,
            model="reference",
            text="",
            tokens=64,
            calibration=8,
            windows=4,
            steps=4,
            only="rounding='coordinates'",
        )
    model, params, tokenizer = jc.models.load(config.model, scan=True)
    parts = split(config.text, also="")
    seen = full_windows(
        tokenizer, parts.calibration, tokens=config.tokens, limit=config.calibration
    )
    (measured,) = parts.measured.values()
    batches = cut(tokenizer, measured, tokens=config.tokens, limit=config.windows)
    moments = jc.collect_moments(model, params, list(seen), where=KERNELS)
    layout = {name: jc.Layout((0,), (1,), (2,)) for name in moments}
    results = Results(config)
    for method in methods(config):
        clock = time.process_time()
        small = jc.compress(params, [(KERNELS, method)], moments, layouts=layout)
        jax.block_until_ready(small)
        seconds = time.process_time() - clock
        nodes = jax.tree.leaves(small, is_leaf=lambda x: isinstance(x, jc.Quantized))
        held = [x for x in nodes if isinstance(x, jc.Quantized)]
        ready = jax.jit(jc.materialize)(small)
        report = jc.compare(Apply(model), params, ready, batches)
        results.add(
            {
                "model": Path(config.model).name,
                "method": method,
                "bits_per_weight": 8 * jc.nbytes(held) / sum(x.size for x in held),
                "widths": sorted({x.bits for x in held}),
                **quality(report),
                "calibration_tokens": int(seen.size),
                "processor_seconds": seconds,
            }
        )
        del small, held, nodes, ready
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

"""What does compression block by block take: time, peak memory, straight from disk?

Error feedback on every linear layer of a model, calibration included, with its weights
read from the file as their block comes. Run it in a process of its own, so that the
peak is that of this work:

    python -m experiments.calibration.blockwise SmolLM2.gguf text.txt
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import Clock
from jaxcompress import reporting
from jaxcompress.models.bundled_text import heldout_text


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = ""
    text: str = ""
    recipe: str = "gptq(bits=4, block=128)"
    calibration: int = 64  # windows
    tokens: int = 512  # in a window
    store: str = ""  # directory of finished blocks
    fast: bool = False  # the reference model, one window
    results: str = "experiments/calibration/results/blockwise.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure seconds, the peak of memory and the errors reported; one row."""
    if config.fast:
        config = dataclasses.replace(config, calibration=1, store="")
        model, weights, tokenizer = jc.models.load("reference")
        text = heldout_text()
    else:
        model, weights, tokenizer = jc.models.open_weights(config.model)
        text = jc.tokenization.read_text(config.text)
    count = config.calibration * config.tokens
    ids = np.array(tokenizer.encode(text[: 8 * count])[:count])
    batches = list(ids.reshape(-1, min(4, config.calibration), config.tokens))
    before = reporting.peak_memory()
    clock = Clock()
    report = []
    small = jc.compress_blockwise(
        model,
        weights,
        [(".*kernel", config.recipe)],
        batches,
        store=config.store or None,
        record=report,
        progress=True,
    )
    errors = [row.output_error for row in report if row.output_error is not None]
    results = Results(config, experiment="blockwise")
    row = {
        "model": Path(config.model).name or "reference",
        "recipe": config.recipe,
        "calibration_tokens": count,
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "peak_bytes": reporting.peak_memory(),
        "peak_bytes_before": before,
        "layers": len(errors),
        "mean_output_error": float(np.mean(errors)),
        "result_bytes": jc.nbytes(small),
    }
    results.add(row)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

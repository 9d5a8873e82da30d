"""What do curvatures cost: the whole model's, and those of one block at a time?

One stage a process, so that its peak of memory is its own:

    python -m experiments.calibration.curvatures SmolLM2.gguf text.txt --stage moments

The stages are forward, gradient, moments, curvatures and blockwise. `forward` and
`gradient` are what the others are compared with: the logits of every window, and the
gradient of their loss with respect to all weights. `curvatures` is `measure_curvatures`
on moments of one window, so that its own time is seen; `blockwise` is
`measure_curvatures_blockwise` from the file, moments included.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import Clock
from jaxcompress import reporting
from jaxcompress.models.bundled_text import heldout_text

STAGES = ("forward", "gradient", "moments", "curvatures", "blockwise")


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = ""
    text: str = ""
    stage: str = "blockwise"  # or all, of a small model
    calibration: int = 64  # windows
    tokens: int = 512  # in a window
    fast: bool = False  # the reference model, two windows, every stage
    results: str = "experiments/calibration/results/curvatures.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure seconds and the peak of memory of a stage; a row for each."""
    stages = [config.stage]
    if config.fast:
        config = dataclasses.replace(config, calibration=2, tokens=64)
        stages = list(STAGES)
    results = Results(config, experiment="curvatures")
    for stage in stages:
        results.add(measure(config, stage))
    return results.rows


def measure(config: Config, stage: str) -> dict[str, Any]:
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; one of {', '.join(STAGES)} is wanted")
    if config.fast:
        model, weights, tokenizer = jc.models.load("reference")
        text = heldout_text()
    else:
        source = jc.models.open_weights if stage == "blockwise" else jc.models.load
        model, weights, tokenizer = source(config.model)
        text = jc.tokenization.read_text(config.text)
    count = config.calibration * config.tokens
    ids = np.array(tokenizer.encode(text[: 8 * count])[:count], np.int32)
    batches = [{"tokens": row} for row in ids.reshape(-1, 1, config.tokens)]
    apply = jc.evaluation.Apply(model)
    moments = None
    if stage == "curvatures":
        moments = jc.collect_moments(model, weights, batches[:1])
    before = reporting.peak_memory()
    clock = Clock()
    work(stage, model, apply, weights, batches, moments)
    return {
        "model": Path(config.model).name or "reference",
        "stage": stage,
        "calibration_tokens": count,
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "peak_bytes": reporting.peak_memory(),
        "peak_bytes_before": before,
    }


def work(
    stage: str, model: Any, apply: Any, weights: Any, batches: list, moments: Any
) -> None:
    """Do what a stage does, to the end."""
    key = jax.random.key(0)
    if stage == "moments":
        jax.block_until_ready(jc.collect_moments(model, weights, batches))
    elif stage == "curvatures":
        found = jc.measure_curvatures(apply, weights, batches, moments, key=key)
        jax.block_until_ready(found)
    elif stage == "blockwise":
        with tempfile.TemporaryDirectory() as folder:
            jc.measure_curvatures_blockwise(
                model, weights, batches, store=folder, key=key, progress=True
            )
    else:

        @jax.jit
        def loss(weights: Any, tokens: jax.Array) -> jax.Array:
            logits = apply(weights, tokens)[:, :-1]
            scores = jax.nn.log_softmax(logits.astype(jnp.float32))
            return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

        step = loss if stage == "forward" else jax.jit(jax.grad(loss))
        for batch in batches:
            jax.block_until_ready(step(weights, batch["tokens"]))


if __name__ == "__main__":
    run(parse(Config, __doc__))

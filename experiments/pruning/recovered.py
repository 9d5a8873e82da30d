"""How much of what pruning costs does a little training bring back, and in what order?

Prunes the kernels of the reference model's layers and trains what is left for some
steps, pruned weights held at zero, to give the logits of the dense model on the sources
of the running interpreter's standard library (files of the packaged held-out text, and
near copies, left out). Half of the weights: by ALPS and by magnitude, before and after.
Four fifths: at once and then train; prune, train, repeat; and gradually while training,
all with the same number of steps. One JSON line per row, appended as it is done; rows
that the results hold already are not run again:

    python -m experiments.pruning.recovered
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import training_tokens
from experiments.pruning import pruned
from jaxcompress.evaluation import Apply
from jaxcompress.evaluation.language import divergence
from jaxcompress.training.optimizers import (
    cubic_sparsity,
    gradual_pruning,
    keep_masked_zero,
)

KERNELS = r"layers/.*kernel"
ROWS = (
    ("alps", (0.5,)),
    ("magnitude", (0.5,)),
    ("magnitude", (0.8,)),
    ("magnitude", (0.5, 0.7, 0.8)),
    ("gradual", (0.8,)),
)


@dataclasses.dataclass(frozen=True)
class Config(pruned.Config):
    steps: int = 150
    batch: int = 4  # windows of `tokens` in a step
    rate: float = 1e-3
    results: str = "experiments/pruning/results/recovered.jsonl"


def windows_of(tokenizer: Any, config: Config) -> np.ndarray:
    """Cut library files into windows for all steps: `[steps, batch, tokens]`."""
    wanted = config.steps * config.batch * config.tokens
    found = training_tokens(tokenizer, 8 * wanted)
    return found[:wanted].reshape(-1, config.batch, config.tokens)


def train(
    model: Any,
    params: Any,
    teacher: Any,
    optimizer: optax.GradientTransformation,
    windows: np.ndarray,
) -> Any:
    """Train by a step on each of the windows `[steps, batch, tokens]`."""
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params: Any, state: Any, teacher: Any, tokens: jax.Array) -> Any:
        target = model.apply({"params": teacher}, tokens)

        def loss(params: Any) -> jax.Array:
            return divergence(target, model.apply({"params": params}, tokens)).mean()

        value, slopes = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(slopes, state, params)
        return optax.apply_updates(params, updates), state, value

    for tokens in windows:
        params, state, value = step(params, state, teacher, tokens)
    if not np.isfinite(value):
        raise ValueError(f"training diverged: a loss of {value}; lower the rate")
    return params


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rows that the results lack, in order."""
    todo = ROWS
    if config.fast:
        config = dataclasses.replace(
            config, calibration=4, windows=4, tokens=64, steps=6, batch=2
        )
        todo = ROWS[3:]
    model, dense, tokenizer = jc.models.load("reference", scan=True)
    inputs, batches = pruned.inputs_of(tokenizer, config)
    layout = jc.find_layouts(model, dense, inputs[0])
    windows = windows_of(tokenizer, config)
    results = Results(config)

    def compare(params: Any) -> Any:
        return jc.compare(Apply(model), dense, params, batches)

    def adam(steps: int, last: optax.GradientTransformation) -> Any:
        rate = optax.warmup_cosine_decay_schedule(
            0, config.rate, min(10, steps // 4), steps
        )
        return optax.chain(optax.adam(rate), last)

    for method, sparsities in todo:
        held = results.holds(method=method, sparsities=sparsities)
        if held or config.only not in method:
            continue
        clock = time.process_time()
        params, before = dense, None
        if method == "gradual":
            schedule = cubic_sparsity(sparsities[-1], stop=config.steps * 7 // 10)
            scores = functools.partial(jc.masks.magnitude_scores, where=KERNELS)
            last = gradual_pruning(scores, schedule, every=5, layouts=layout)
            params = train(model, params, dense, adam(len(windows), last), windows)
        else:
            moments = None
            if method == "alps":
                moments = jc.collect_moments(model, dense, inputs, where=KERNELS)
            for sparsity, part in zip(
                sparsities, np.array_split(windows, len(sparsities)), strict=True
            ):
                rules = [(KERNELS, f"{method}(sparsity={sparsity})")]
                small = jc.compress(params, rules, moments, layouts=layout)
                masks = jc.masks.of(small)
                params = jax.jit(jc.materialize)(small)
                before = before or compare(params)
                last = keep_masked_zero(masks)
                params = train(model, params, dense, adam(len(part), last), part)
        report = compare(params)
        found = jax.tree_util.tree_leaves_with_path(params["layers"])
        kernels = [x for place, x in found if place[-1].key == "kernel"]
        nonzero = sum(int(jnp.count_nonzero(x)) for x in kernels)
        row = {
            "method": method,
            "sparsities": sparsities,
            "zeros": 1 - nonzero / sum(x.size for x in kernels),
            "steps": len(windows),
            "training_tokens": windows.size,
            "tokens": report.tokens,
            "dense_perplexity": report.dense.perplexity,
            "first_perplexity": before and before.small.perplexity,
            "first_kl": before and before.kl,
            "perplexity": report.small.perplexity,
            "ratio": report.small.perplexity / report.dense.perplexity,
            "kl": report.kl,
            "kl_standard_error": report.kl_standard_error,
            "processor_seconds": time.process_time() - clock,
            "rate": config.rate,
        }
        results.add(row)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__, leave_out=("model", "text", "fraction")))

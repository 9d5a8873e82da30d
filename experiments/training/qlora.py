"""How fast does QLoRA fit a model to a new text, its weights in 4-bit codes?

Kernels are quantized by `nf4(block=64)` and frozen; LoRA products train on the first
part of a text. The loss on the rest is measured every `--every` steps, beside that of
the float model and of the codes alone. One JSON line for each point of the curve:

    python -m experiments.training.qlora reference heldout
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import smollm2
from experiments.common.results import Results
from experiments.common.texts import docstrings
from jaxcompress.distillation import init_state
from jaxcompress.evaluation import Apply, LanguageModelMetrics, windows
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.training import ADAPTERS, lora, merge

TEXTS = {"heldout": heldout_text, "docstrings": docstrings}
KERNELS = ".*_proj/kernel"


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"  # or "smollm2", or a file
    text: str = "heldout"  # or "docstrings"
    recipe: str = "nf4(block=64)"
    rank: int = 8
    rate: float = 1e-3  # of Adam; falls linearly to zero
    steps: int = 60
    every: int = 10  # steps between points of the curve
    tokens: int = 256  # in a window
    batch: int = 4  # windows in a step
    windows: int = 8  # of held-out text, at most
    fast: bool = False  # two steps of short windows
    results: str = "experiments/training/results/qlora.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Train one model on one text; a row for each point of the curve."""
    if config.fast:
        config = dataclasses.replace(
            config, steps=2, every=1, tokens=32, batch=2, windows=2
        )
    file = smollm2() if config.model == "smollm2" else config.model
    model, params, tokenizer = jc.models.load(file, scan=True)
    apply_fn = Apply(model)
    ids = np.asarray(tokenizer.encode(TEXTS[config.text]()), np.int32)
    cut = 4 * len(ids) // 5
    train, rest = ids[:cut], ids[cut:]
    heldout = windows(rest, config.tokens, 4, limit=config.windows)
    layouts = jc.find_layouts(model, params, {"tokens": heldout[0]["tokens"]})
    small = jc.compress(params, [(KERNELS, config.recipe)], layouts=layouts)
    tree = lora(small, rank=config.rank, where=KERNELS, key=jax.random.key(0))
    metrics = LanguageModelMetrics(apply_fn)
    results = Results(config, model=config.model, text=config.text)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
        del key
        tokens = batch["tokens"]
        logits = apply_fn(params, tokens)[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return each.mean(), {}

    trainable, _ = jc.partition(tree, ADAPTERS)
    constant = {
        "trained": sum(x.size for x in jax.tree.leaves(trainable)),
        "mebibytes": jc.nbytes(small) / 2**20,
        "mebibytes_float": jc.nbytes(params) / 2**20,
        "loss_float": jc.evaluate(metrics, params, heldout)["loss"],
        "config": dataclasses.asdict(config),
    }
    optimizer = optax.adam(optax.linear_schedule(config.rate, 0.0, config.steps))
    state = init_state(tree, optimizer, where=ADAPTERS, key=jax.random.key(1))
    step = jc.make_train_step(loss_fn, optimizer, where=ADAPTERS)
    random, seen, clock = np.random.default_rng(0), [], time.process_time()
    for number in range(config.steps + 1):
        if number % config.every == 0 or number == config.steps:
            results.add(
                {
                    "steps": number,
                    "training_tokens": number * config.batch * config.tokens,
                    "loss": jc.evaluate(metrics, state.params, heldout)["loss"],
                    "training_loss": float(np.mean(seen)) if seen else None,
                    "processor_seconds": time.process_time() - clock,
                    **constant,
                }
            )
            seen = []
        if number < config.steps:
            starts = random.integers(0, len(train) - config.tokens, config.batch)
            batch = train[starts[:, None] + np.arange(config.tokens)]
            state, measured = step(state, {"tokens": batch})
            seen.append(float(measured["loss"]))
    merged = jc.evaluate(metrics, merge(state.params), heldout)["loss"]
    print(f"merged into dense weights: {merged:.4f}")
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

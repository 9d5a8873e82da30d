"""What does exactness cost? Cross entropy of the integer model beside the float model.

The same windows of text go through the float model and through `textcoding.exact`; the
integer logits of a shorter prefix, alone in its batch and step by step through a cache,
are compared bit by bit with those of the batch.

    python -m experiments.textcoding.exact_price reference
    python -m experiments.textcoding.exact_price SmolLM2.gguf wikitext2-valid.txt
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import Clock, timed
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.models.loading import load
from jaxcompress.textcoding import exact, self_test


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""  # held-out text of the reference model where there is none
    windows: int = 4
    tokens: int = 512  # in a window
    steps: int = 8  # through a cache
    fast: bool = False  # one short window
    results: str = "experiments/textcoding/results/exact_price.jsonl"


@jax.jit
def bits(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Compute the bits of each token but the first, `[tokens - 1]`."""
    scores = jax.nn.log_softmax(logits[:-1])
    chosen = jnp.take_along_axis(scores, tokens[1:, None], axis=-1)[:, 0]
    return -chosen / math.log(2)


def run(config: Config) -> list[dict[str, Any]]:
    """Compare bits per token of both models, and integers of prefixes; one row."""
    if config.fast:
        config = dataclasses.replace(config, windows=1, tokens=64, steps=2)
    model, params, tokenizer = load(config.model, scan=False)
    text = Path(config.text).read_text(encoding="utf-8") if config.text else ""
    wanted = config.windows * config.tokens
    ids = tokenizer.encode((text or heldout_text())[: 8 * wanted])[:wanted]
    ids = np.asarray(ids, np.int32).reshape(config.windows, config.tokens)
    clock = Clock()
    integers = exact(model, params, context=config.tokens)
    export_seconds, clock = clock.seconds, Clock()
    self_test(integers)
    self_test_seconds = clock.seconds
    integers = integers.widen()
    apply_float = jax.jit(lambda p, t: model.apply({"params": p}, t)[0])
    apply_exact = jax.jit(lambda m, t: m.apply(t)[0])
    step = jax.jit(lambda m, t, cache: m.apply(t, cache))
    floats, exacts, seconds = [], [], {"float": [], "exact": []}
    for row in ids:
        logits, spent, _ = timed(lambda row=row: apply_float(params, row[None]))
        seconds["float"].append(spent)
        floats.append(np.asarray(bits(logits, row)))
        logits, spent, _ = timed(lambda row=row: apply_exact(integers, row[None]))
        seconds["exact"].append(spent)
        exacts.append(np.asarray(bits(logits * (math.log(2) / 4096), row)))
    prefix = config.tokens // 2 - 3
    cache = integers.init_cache(2, config.tokens)
    other, cache = step(integers, np.stack([row[::-1], row])[:, :prefix], cache)
    same = bool((other[1] == logits[:prefix]).all())
    for i in range(prefix, prefix + config.steps):
        one = np.stack([row[::-1], row])[:, i : i + 1]
        other, cache = step(integers, one, cache)
        same &= bool((other[1, 0] == logits[i]).all())
    before, after = np.mean(floats), np.mean(exacts)
    row = {
        "model": Path(config.model).name,
        "text": Path(config.text).name or "heldout",
        "windows": config.windows,
        "tokens": config.tokens,
        "bits_per_token_float": float(before),
        "bits_per_token_exact": float(after),
        "price": float(after / before - 1),
        "same_integers": same,
        "export_seconds": export_seconds,
        "self_test_seconds": self_test_seconds,
        "window_seconds": {name: min(times) for name, times in seconds.items()},
    }
    results = Results(config, experiment="exact_price")
    results.add(row)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

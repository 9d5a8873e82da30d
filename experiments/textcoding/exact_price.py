"""What does exactness cost? Cross entropy of the integer model beside the float model.

The same windows of text go through the float model and through `textcoding.exact`; the
integer logits of a shorter prefix, alone in its batch and step by step through a cache,
are compared bit by bit with those of the batch.

    python -m experiments.textcoding.exact_price reference
    python -m experiments.textcoding.exact_price SmolLM2.gguf --text wikitext2-valid.txt
"""

import argparse
import dataclasses
import json
import math
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    """Bits of each token but the first, `[tokens - 1]`."""
    scores = jax.nn.log_softmax(logits[:-1])
    chosen = jnp.take_along_axis(scores, tokens[1:, None], axis=-1)[:, 0]
    return -chosen / math.log(2)


def run(config: Config) -> dict[str, Any]:
    """Bits per token of both models, and whether prefixes gave the same integers."""
    if config.fast:
        config = dataclasses.replace(config, windows=1, tokens=64, steps=2)
    model, params, tokenizer = load(config.model, scan=False)
    text = Path(config.text).read_text(encoding="utf-8") if config.text else ""
    wanted = config.windows * config.tokens
    ids = tokenizer.encode((text or heldout_text())[: 8 * wanted])[:wanted]
    ids = np.asarray(ids, np.int32).reshape(config.windows, config.tokens)
    clock = time.perf_counter()
    integers = exact(model, params, context=config.tokens)
    export_seconds = time.perf_counter() - clock
    clock = time.perf_counter()
    self_test(integers)
    self_test_seconds = time.perf_counter() - clock
    integers = integers.widen()
    apply_float = jax.jit(lambda p, t: model.apply({"params": p}, t)[0])
    apply_exact = jax.jit(lambda m, t: m.apply(t)[0])
    step = jax.jit(lambda m, t, cache: m.apply(t, cache))
    floats, exacts, seconds = [], [], {"float": [], "exact": []}
    for row in ids:
        clock = time.perf_counter()
        logits = apply_float(params, row[None]).block_until_ready()
        seconds["float"].append(time.perf_counter() - clock)
        floats.append(np.asarray(bits(logits, row)))
        clock = time.perf_counter()
        logits = apply_exact(integers, row[None]).block_until_ready()
        seconds["exact"].append(time.perf_counter() - clock)
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
    return {
        "experiment": "exact_price",
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


def record(result: dict[str, Any], path: str) -> None:
    """Append a result, with what it was measured on, as one line of JSON."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = result | {
        "commit": done.stdout.strip(),
        "device": jax.devices()[0].device_kind,
        "versions": {name: metadata.version(name) for name in ("jax", "flax")},
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=2))


def parse(config_type: type, description: str) -> Any:
    """A configuration from the command line; every field has a default."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    for i, field in enumerate(dataclasses.fields(config_type)):
        kind = type(field.default)
        if kind is bool:
            parser.add_argument(f"--{field.name}", action="store_true")
        elif i == 0:
            parser.add_argument(field.name, nargs="?", default=field.default)
        else:
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    return config_type(**vars(parser.parse_args()))


if __name__ == "__main__":
    chosen = parse(Config, __doc__)
    record(run(chosen), chosen.results)

"""How much of what low rank lost does distillation bring back?

Factorizes the kernels of the reference model's layers to eight tenths of their
parameters, by the inputs' moments, then trains the factors and the norms towards the
float model's predictions on the text it was trained on. Measured on the held-out text:
divergence from the float model before and after, and the part of it that came back, for
each seed of the batches. One JSON line per row:

    python experiments/recovered_rank.py
"""

import argparse
import dataclasses
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from distilled_depth import batch_at, training_tokens
from nearest import commit

import jaxcompress as jc
from jaxcompress import demo, distillation, reporting
from jaxcompress.evaluation import Apply, windows

KERNELS = r"layers/.*kernel"
METHOD = "svd(keep=0.8)"


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 120
    rate: float = 3e-4  # of Adam, falling linearly to zero
    tokens: int = 128  # in a window
    batch: int = 4  # windows in a step
    calibration: int = 64  # windows of 256 tokens
    windows: int = 24  # of held-out text, 256 tokens each
    seeds: int = 1
    fast: bool = False  # two steps
    folder: str = ""  # for checkpoints
    results: str = "experiments/results/recovered.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """The rows of the table, one a seed."""
    if config.fast:
        config = dataclasses.replace(
            config, steps=2, tokens=32, batch=2, calibration=4, windows=2
        )
    model, params, tokenizer = jc.models.load("reference", scan=True)
    apply = Apply(model)
    text = training_tokens(tokenizer, 50_000 if config.fast else 2_000_000)
    ids = tokenizer.encode(demo.heldout_text())
    heldout = windows(ids, 256, 4, limit=config.windows)
    seen = text[: config.calibration * 256].reshape(-1, 4, 256)
    moments = jc.collect_moments(model, params, list(seen), select=KERNELS)
    layout = jc.layout(model, params, jnp.asarray(heldout[0]["tokens"]))
    rows: list[dict[str, Any]] = []

    def measure(small: Any) -> Any:
        dense = jax.jit(jc.materialize)(small)
        return jc.compare(apply, params, dense, heldout)

    start = jc.compress(
        params, [(KERNELS, METHOD), (".*", None)], moments, layout=layout
    )
    before = measure(start)
    # The embedding is not compressed, and stays.
    optimizer = jc.optimizers.by_name(
        [
            ("embed/.*", None),
            (".*", optax.adam(optax.linear_schedule(config.rate, 0.0, config.steps))),
        ]
    )
    step = jc.make_train_step(distillation.soft_labels(apply, apply, params), optimizer)
    for seed in range(config.seeds):
        clock = time.process_time()
        state = distillation.train(
            step,
            distillation.init_state(
                start, optimizer, dtype=jnp.float32, key=jax.random.key(seed)
            ),
            lambda number, seed=seed: batch_at(
                number, text, config.tokens, config.batch, seed
            ),
            steps=config.steps,
            folder=(Path(config.folder) / str(seed) if config.folder else None),
            every=40,
            report=lambda number, metrics: (
                print(number, round(metrics["loss"], 4), flush=True)
                if number % 20 == 0
                else None
            ),
        )
        small = distillation.cast_like(state.params, start)
        seconds = time.process_time() - clock
        after = measure(small)
        tokens = config.steps * config.batch * config.tokens
        back = (before.kl - after.kl) / before.kl
        row = {
            "method": METHOD,
            "seed": seed,
            "layers_bytes": jc.nbytes(start["layers"]),
            "dense_layers_bytes": jc.nbytes(params["layers"]),
            "kl_before": before.kl,
            "kl_after": after.kl,
            "kl_standard_error": after.kl_standard_error,
            "loss_before": before.small.loss,
            "loss_after": after.small.loss,
            "teacher_loss": before.dense.loss,
            "fraction_recovered": back,
            "training_tokens": tokens,
            "heldout_tokens": after.tokens,
            "processor_seconds": seconds,
            "commit": commit(),
            "jax": metadata.version("jax"),
            "device": jax.devices()[0].device_kind,
            "shared": True,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        if config.results:
            Path(config.results).parent.mkdir(parents=True, exist_ok=True)
            reporting.append_lines(config.results, rows[-1:])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Config):
        if field.type is bool or field.type == "bool":
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            kind = type(field.default)
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    run(Config(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()

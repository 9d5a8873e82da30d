"""How much memory does a compressed model need to run, plainly and streaming?

Compiles one forward pass of a Llama-like model with float32 parameters, with compressed
ones, and with compressed ones inside `low_memory()`, looped and scanned, and reads the
sizes that XLA reserves: parameters, and temporaries (activations, dequantized weights).
Nothing is run and no weight is made: all of it works on shapes. The largest weight, in
float32, is the least that a model with dense matrix products can do with.

    python -m experiments.running.low_memory --fast
"""

import contextlib
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import smollm2_like
from experiments.common.results import Results

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of SmolLM2-135M by default."""

    recipe: str = "symmetric(bits=4, block=64)"
    vocabulary: int = 49152
    width: int = 576
    layers: int = 30
    mlp_width: int = 1536
    tokens: int = 128
    seed: int = 0
    fast: bool = False  # a smaller model of 6 layers
    results: str = "experiments/running/results/low_memory.jsonl"


def sizes(model: Any, params: Any, tokens: Any, context: Any) -> dict[str, float]:
    """Measure MiB of parameters and of temporaries of the compiled forward pass."""

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        with context():
            return model.apply({"params": params}, tokens)

    start = time.perf_counter()
    memory = jax.jit(forward).lower(params, tokens).compile().memory_analysis()
    return {
        "parameters_mib": jc.nbytes(params) / MIB,
        "temporary_mib": memory.temp_size_in_bytes / MIB,
        "compile_seconds": time.perf_counter() - start,
    }


def run(config: Config) -> list[dict[str, Any]]:
    """Compile each model in each way; a row for each."""
    if config.fast:
        config = dataclasses.replace(
            config, vocabulary=2048, width=256, layers=6, mlp_width=1024
        )
    tokens = jax.ShapeDtypeStruct((1, config.tokens), jnp.int32)
    results = Results(config, experiment="low_memory")
    for scan in (False, True):
        model = smollm2_like(config, scan=scan)
        key = jax.random.key(config.seed)
        params = jax.eval_shape(model.init, key, tokens)["params"]
        layout = jc.find_layouts(model, params, {"tokens": tokens})

        def shrink(params: Any, layout: Any = layout) -> Any:
            return jc.compress(params, config.recipe, layouts=layout)

        small = jax.eval_shape(shrink, params)
        largest = max(x.size for x in jax.tree.leaves(params["embed"]))
        for way, held, context in (
            ("float32", params, contextlib.nullcontext),
            ("compressed", small, contextlib.nullcontext),
            ("low memory", small, jc.low_memory),
        ):
            results.add(
                {
                    "model": "scanned" if scan else "looped",
                    "way": way,
                    **sizes(model, held, tokens, context),
                    "largest_weight_mib": 4 * largest / MIB,
                    "config": dataclasses.asdict(config),
                }
            )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

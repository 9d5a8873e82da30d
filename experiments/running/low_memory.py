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
import subprocess
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments.common.command import parse
from jaxcompress.models.transformer import Transformer
from jaxcompress.reporting import append_lines

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
    """MiB of parameters and of temporaries of the compiled forward pass."""

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
    """One row per model (looped, scanned) and way to run it."""
    if config.fast:
        config = dataclasses.replace(
            config, vocabulary=2048, width=256, layers=6, mlp_width=1024
        )
    tokens = jax.ShapeDtypeStruct((1, config.tokens), jnp.int32)
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = []
    for scan in (False, True):
        model = Transformer(
            vocab_size=config.vocabulary,
            width=config.width,
            layers=config.layers,
            heads=config.width // 64,
            kv_heads=1,
            head_size=64,
            mlp_width=config.mlp_width,
            scan=scan,
        )
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
            ("streaming", small, jc.low_memory),
        ):
            rows.append(
                {
                    "experiment": "streaming_memory",
                    "model": "scanned" if scan else "looped",
                    "way": way,
                    **sizes(model, held, tokens, context),
                    "largest_weight_mib": 4 * largest / MIB,
                    "config": dataclasses.asdict(config),
                    "commit": commit.stdout.strip(),
                    "versions": {"jax": jax.__version__, "flax": flax.__version__},
                    "device": jax.devices()[0].device_kind,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table of the rows."""
    print(
        f"jax {jax.__version__}; largest weight {rows[0]['largest_weight_mib']:.1f} MiB"
    )
    print(f"{'model':10}{'way':12}{'parameters MiB':>16}{'temporary MiB':>15}")
    for row in rows:
        kept = f"{row['parameters_mib']:16.1f}{row['temporary_mib']:15.1f}"
        print(f"{row['model']:10}{row['way']:12}{kept}")


if __name__ == "__main__":
    config = parse(Config, __doc__)
    rows = run(config)
    show(rows)
    append_lines(config.results, rows)

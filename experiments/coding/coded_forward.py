"""What does it take to run a model whose weights stay coded in memory?

One forward pass with the weights as they are, with coded weights, and with coded
weights inside `low_memory()`, which decodes each layer where it is used: time, bytes of
the weights held, and the temporaries that XLA reserves. The logits must be the same
bit for bit.

    python -m experiments.coding.coded_forward reference
    python -m experiments.coding.coded_forward MODEL.gguf --tokens 512
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import Clock, interleaved

RECIPES = {
    "as they are": None,
    "code_floats()": "code_floats()",
    "code_floats(speed='decode')": "code_floats(speed='decode')",
}


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    tokens: int = 256
    rounds: int = 7
    fast: bool = False  # one layer, two rounds of 32 tokens
    results: str = "experiments/coding/results/coded_forward.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure each way to hold the weights and to run them; a row for each."""
    model, params, _ = jc.models.load(config.model)
    if config.fast:
        config = dataclasses.replace(config, tokens=32, rounds=2)
        model, params = jc.models.fewer_layers(model, params, (0,))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    size = sum(x.size for x in jax.tree.leaves(params))
    tokens = jnp.arange(config.tokens, dtype=jnp.int32)[None] % 512
    results = Results(config, experiment="coded_forward")
    wanted = None
    for name, recipe in RECIPES.items():
        held = params if recipe is None else jc.compress(params, recipe)
        for streamed in (False, True) if recipe else (False,):
            context = jc.low_memory if streamed else contextlib.nullcontext

            def forward(held: Any, tokens: jax.Array, context: Any = context) -> Any:
                with context():
                    return model.apply({"params": held}, tokens)

            clock = Clock()
            compiled = jax.jit(forward).lower(held, tokens).compile()
            compilation = clock.seconds
            logits = np.asarray(compiled(held, tokens))
            wanted = logits if wanted is None else wanted
            if logits.tobytes() != wanted.tobytes():
                raise ValueError(f"{name}: other logits than those of the weights")
            call = functools.partial(compiled, held, tokens)
            spent = interleaved([call], config.rounds, warm=False)[:, 0, 0]
            memory = compiled.memory_analysis()
            results.add(
                {
                    "model": config.model.rsplit("/", 1)[-1],
                    "weights": name,
                    "streaming": streamed,
                    "tokens": config.tokens,
                    "bits_per_weight": 8 * jc.nbytes(held) / size,
                    "milliseconds": 1e3 * float(np.median(spent)),
                    "milliseconds_best": 1e3 * spent.min(),
                    "temporary_mb": memory.temp_size_in_bytes / 1e6,
                    "compile_seconds": compilation,
                }
            )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

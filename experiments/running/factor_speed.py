"""How fast does a layer multiply by thin factors instead of its dense kernel?

One `nn.Dense` of a width with float32 weights, once dense and once as `svd(rank=...)`
inside `jc.compressed_matmul()`, called in turn on the same inputs, for several rounds,
so that other work on the machine slows both alike. Ratios are medians of the rounds'
ratios, below 1 where the factors are faster; operations are those of the compiled
programs.

    python -m experiments.running.factor_speed
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import interleaved


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 2048
    rank: int = 512
    rows: tuple[int, ...] = (1, 8, 64, 512)
    rounds: int = 41
    fast: bool = False  # a narrower layer, three rounds
    results: str = "experiments/running/results/factor_speed.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Time each number of inputs; a row for each."""
    if config.fast:
        config = dataclasses.replace(config, width=256, rank=64, rows=(8,), rounds=3)
    model = nn.Dense(config.width)
    keys = jax.random.split(jax.random.key(0), 4)
    left = jax.random.normal(keys[0], (config.width, config.rank)) / config.rank
    right = jax.random.normal(keys[1], (config.rank, config.width))
    bias = jax.random.normal(keys[2], (config.width,))
    small = {"kernel": jc.LowRank(left, right), "bias": bias}
    dense = jax.jit(jc.materialize)(small)

    @jax.jit
    def plain(params: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x)

    @jax.jit
    def by_factors(params: Any, x: jax.Array) -> jax.Array:
        with jc.compressed_matmul():
            return model.apply({"params": params}, x)

    results = Results(config, experiment="factor_speed")
    for count in config.rows:
        x = jax.random.normal(keys[3], (count, config.width))
        error = jnp.abs(plain(dense, x) - by_factors(small, x)).max()
        seconds = interleaved(
            [
                lambda x=x: plain(dense, x),
                lambda x=x: by_factors(small, x),
                lambda x=x: plain(small, x),
            ],
            config.rounds,
        )
        ratios = np.median(seconds[:, 1:] / seconds[:, :1], axis=0)
        middle = np.median(seconds, axis=0)
        operations = [
            f.lower(params, x).compile().cost_analysis()["flops"]
            for f, params in ((plain, dense), (by_factors, small))
        ]
        results.add(
            {
                "width": config.width,
                "rank": config.rank,
                "rows": count,
                "rounds": config.rounds,
                "operations_ratio": operations[1] / operations[0],
                "ratio": float(ratios[0, 0]),
                "ratio_processor": float(ratios[0, 1]),
                "ratio_materialized": float(ratios[1, 0]),
                "seconds_dense": float(middle[0, 0]),
                "seconds_factors": float(middle[1, 0]),
                "largest_difference": float(error),
            }
        )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

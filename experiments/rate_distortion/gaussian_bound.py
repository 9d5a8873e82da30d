"""How near do coded levels come to the bound of rate-distortion theory?

Gaussian weights and three covariances of their inputs: bits per weight of the file
beside those that reverse water-filling allows at the distortion reached. One JSON line
per row:

    python -m experiments.rate_distortion.gaussian_bound
"""

import dataclasses
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results


@dataclasses.dataclass(frozen=True)
class Config:
    rates: str = "4.05,3.05,2.05"
    states: int = 128  # beside rounding and 8
    prior: float = 0.5  # beside none
    inputs: int = 192
    outputs: int = 2048
    fast: bool = False
    results: str = "experiments/rate_distortion/results/gaussian_bound.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure each covariance, states, prior and rate; a row for each."""
    if config.fast:
        config = dataclasses.replace(
            config, inputs=64, outputs=256, rates="2.05", prior=0.0
        )
    shape = config.inputs, config.outputs
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    results, priors = Results(config), sorted({0.0, config.prior})
    for name, covariance in covariances(config.inputs).items():
        for states, prior in itertools.product((0, 8, config.states), priors):
            for rate in map(float, config.rates.split(",")):
                clock = time.process_time()
                options = {"states": states, "damping": 1e-6, "prior": prior}
                found = beside_the_bound(x, covariance, rate=rate, **options)
                seconds = time.process_time() - clock
                results.add(
                    {
                        "covariance": name,
                        **options,
                        "shape": shape,
                        **found,
                        "processor_seconds": seconds,
                    }
                )
    return results.rows


def beside_the_bound(
    x: np.ndarray, covariance: np.ndarray, **options: Any
) -> dict[str, float]:
    """Measure bits of the file, and those that the bound allows at its distortion."""
    moments = jc.moments_from_covariance(jnp.asarray(covariance, jnp.float32))
    small = jc.rate_distortion(jnp.asarray(x), moments, shrinkage=0, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        jc.save(path, {"kernel": small})
        with jc.open_checkpoint(path) as file:
            bits = 8 * file.nbytes("kernel") / x.size
        loaded = jc.load(path)["kernel"]
    error = np.asarray(loaded.materialize(), np.float64) - x
    distortion = float(np.sum(error * (covariance @ error)) / x.size)
    least = bound(np.linalg.eigvalsh(covariance), distortion)
    return {
        "bits_per_weight": bits,
        "distortion": distortion,
        "bound": least,
        "gap": bits - least,
    }


def covariances(size: int) -> dict[str, np.ndarray]:
    """Build covariances of trace `size`: rotated, with outlier channels, a process."""
    rng = np.random.default_rng(0)
    turns = [np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2)]
    scales = np.exp(1.5 * rng.standard_normal(size))
    places = np.arange(size)
    found = {
        "rotated": (turns[0] * np.exp(np.linspace(0, -8, size))) @ turns[0].T,
        "outlier channels": scales[:, None]
        * ((turns[1] * np.exp(np.linspace(0, -4, size))) @ turns[1].T)
        * scales,
        "AR(0.95)": 0.95 ** np.abs(np.subtract.outer(places, places)),
    }
    return {name: x * size / np.trace(x) for name, x in found.items()}


def bound(variances: np.ndarray, distortion: float) -> float:
    """Reverse water-filling: bits per component at a mean squared error."""
    low, high = 0.0, float(variances.max())
    for _ in range(200):
        level = (low + high) / 2
        less = np.minimum(variances, level).mean() < distortion
        low, high = (level, high) if less else (low, level)
    return float(np.maximum(0, 0.5 * np.log2(variances / level)).mean())


if __name__ == "__main__":
    run(parse(Config, __doc__))

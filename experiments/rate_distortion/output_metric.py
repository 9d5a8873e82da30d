"""What could weighing the errors of outputs jointly gain over one weight per output?

Rate-distortion quantization knows one curvature per output. The divergence, to second
order, has a matrix there: outputs whose errors do the same can be made to cancel, by
feedback between them as between inputs (YAQA, arXiv 2505.22988), within a kernel or
over kernels that read the same inputs (query, key, value; gate, up). At a high rate
such feedback shapes the error to the inverse of that matrix. The matrix is measured on
some sequences, shrunk to its diagonal, and the shaped errors are counted on others:
bits per weight that one would save at equal divergence, beside one weight per output.
One JSON line per group of kernels and shrinkage, averaged over layers:

    python -m experiments.rate_distortion.output_metric SmolLM2.gguf text.txt \\
        --cache DIR
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.quantization import calibrated
from jaxcompress import reporting
from jaxcompress.calibration.error_feedback import inverse_factor
from jaxcompress.evaluation import Apply

SHRINKAGE = (0.9, 0.7, 0.5, 0.3, 0.1)  # towards the diagonal


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    layers: tuple[int, ...] = (0, 4, 14, 24, 29)
    groups: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down", "q k v")
    sequences: int = 128  # for measuring; as many to count on
    length: int = 128  # tokens
    calibration: int = 256  # windows, for the metric of inputs
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    tokens: int = 512  # in a window
    windows: int = 1
    cache: str = ""  # directory for moments
    fast: bool = False
    results: str = "experiments/rate_distortion/results/output_metric.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure each group of kernels at each shrinkage; a row for each."""
    if config.fast:
        small = {"layers": (1,), "groups": ("o", "q k v"), "sequences": 4}
        small |= {"calibration": 4, "tokens": 128, "model": "reference", "text": ""}
        config = dataclasses.replace(config, **small)
    model, params, tokenizer = jc.models.load(config.model, scan=False)
    calibration, _ = calibrated.texts(config, tokenizer)
    moments = calibrated.one_shot(config, model, params, calibration)
    groups = {
        (group, layer): [name_of(layer, x) for x in group.split()]
        for group in config.groups
        for layer in config.layers
    }
    names = sorted({name for each in groups.values() for name in each})
    factors = {
        name: inverse_factor(moments[name].second, damping=0.01) for name in names
    }
    del moments
    ids = np.concatenate(calibration).reshape(-1, config.length)
    ids = ids[:: max(1, len(ids) // (2 * config.sequences))][: 2 * config.sequences]

    @jax.jit
    def gradients(some: dict[str, jax.Array], row: jax.Array, key: jax.Array) -> Any:
        def score(some: dict[str, jax.Array]) -> jax.Array:
            tree = jax.tree_util.tree_map_with_path(
                lambda path, x: some.get("/".join(p.key for p in path), x), params
            )
            logits = Apply(model)(tree, row[None])[0].astype(jnp.float32)
            said = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            logs = jax.nn.log_softmax(logits)
            return jnp.take_along_axis(logs, said[:, None], axis=-1).sum()

        found = jax.grad(score)(some)
        return {name: factors[name] @ x for name, x in found.items()}

    @jax.jit
    def add(total: jax.Array, parts: list[jax.Array]) -> jax.Array:
        wide = jnp.concatenate(parts, axis=1)
        return total + wide.T @ wide

    flat = {name: leaf(params, name) for name in names}
    total: list[dict[Any, Any]] = [
        {
            key: jnp.zeros((sum(flat[n].shape[1] for n in each),) * 2)
            for key, each in groups.items()
        }
        for _ in range(2)
    ]
    for number, row in enumerate(reporting.track(ids, "gradients")):
        key = jax.random.fold_in(jax.random.key(0), number)
        found = gradients(flat, row, key)
        half = total[number % 2]
        for group, each in groups.items():
            half[group] = add(half[group], [found[n] for n in each])
    results = Results(config)
    for group in config.groups:
        halves = [[half[group, layer] for half in total] for layer in config.layers]
        separate = np.mean([-gain(*pair, None) for pair in halves])
        for shrinkage in SHRINKAGE:
            gains = [gain(*pair, shrinkage) for pair in halves]
            results.add(
                {
                    "model": Path(config.model).name,
                    "group": group,
                    "shrinkage": shrinkage,
                    "bits_saved": float(np.mean(gains)),
                    "least": float(np.min(gains)),
                    "most": float(np.max(gains)),
                    "bits_lost_without_weights": float(separate),
                    "layers": list(config.layers),
                    "tokens": config.sequences * config.length,
                }
            )
    return results.rows


def gain(measured: Any, held: Any, shrinkage: float | None) -> float:
    """Compute bits per weight over one weight per output; None: without any weights."""
    measured, held = (np.asarray(x, np.float64) for x in (measured, held))
    weights = (8 * np.diagonal(measured) + np.diagonal(measured).mean()) / 9
    logs = np.log(weights).mean()
    alone = np.exp(logs) * (np.diagonal(held) / weights).mean()
    if shrinkage is None:
        shaped = np.diagonal(held).mean()
    else:
        matrix = (1 - shrinkage) * measured + shrinkage * np.diag(weights)
        lower = np.linalg.cholesky(matrix)
        # Errors as the inverse of the matrix has them, of the same volume.
        inverse = np.linalg.inv(matrix)
        size = np.exp(2 * np.log(np.diagonal(lower)).mean())
        shaped = size * (held * inverse).sum() / len(held)
    return float(np.log2(alone / shaped) / 2)


def name_of(layer: int, short: str) -> str:
    """Name the kernel of a layer by its short name."""
    place = "attention" if short in "qkvo" else "mlp"
    return f"layer_{layer}/{place}/{short}_proj/kernel"


def leaf(params: Any, name: str) -> jax.Array:
    """Find an array by its name."""
    for part in name.split("/"):
        params = params[part]
    return params


if __name__ == "__main__":
    run(parse(Config, __doc__))

"""What does each piece of rate-distortion quantization gain, layer by layer?

Compresses the kernels of some layers in one way after the other and compares the error
of their outputs on inputs that were not calibrated on, at equal bits (a bit more counts
as a factor of four). One JSON line per way and rate: the geometric mean of the ratio to
the defaults, its smallest and its largest:

    python -m experiments.rate_distortion.pieces SmolLM2.gguf text.txt --cache DIR
"""

import dataclasses
import functools
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
from jaxcompress.calibration.error_feedback import damped, descend
from jaxcompress.coding.levels import contexts, trellis

OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "damping 0.001": {"damping": 0.001},
    "damping 0.03": {"damping": 0.03},
    "prior 0.5": {"prior": 0.5},
    "natural order": {"order": "natural"},
    "activation order": {"order": "activation"},
    "rounding": {"states": 0},
    "8 states": {"states": 8},
    "256 states": {"states": 256},
}
AFTERWARDS = ("rows rescaled", "columns rescaled", "a second sweep")


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    layers: str = "3,20"
    rates: str = "2.05,3.05"
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    calibration: int = 192  # windows
    held: int = 64  # windows after them, to measure on
    windows: int = 1  # of the texts to measure on, which are not used here
    tokens: int = 512  # in a window
    cache: str = ""  # directory for moments
    fast: bool = False  # one kernel of the reference model
    results: str = "experiments/rate_distortion/results/pieces.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure each way at each rate; a row for each."""
    if config.fast:
        small = {"layers": "1", "rates": "2.05", "calibration": 96, "held": 48}
        config = dataclasses.replace(config, tokens=64, **small)
    model, params, tokenizer = jc.models.load(config.model, scan=False)
    both = config.calibration + config.held
    whole = dataclasses.replace(config, calibration=both)
    batches, _ = calibrated.texts(whole, tokenizer)
    count = len(batches) * config.calibration // both
    start = functools.partial(calibrated.one_shot, whole, model, params)
    known = {"all": start(batches[:count]), "sixth": start(batches[: count // 6])}
    held = start_at(whole, model, params, batches, count)
    found: dict[tuple[str, float], list[float]] = {}
    names = [
        name
        for name in known["all"]
        if name.endswith("kernel")
        and name.split("/")[0] in {f"layer_{i}" for i in config.layers.split(",")}
    ]
    names = names[:1] if config.fast else names
    for name in reporting.track(names, "kernels"):
        x = functools.reduce(lambda tree, key: tree[key], name.split("/"), params)
        second = np.asarray(held[name].second, np.float64)
        x = x.reshape(second.shape[0], -1)
        for rate in map(float, config.rates.split(",")):
            losses = ways(x, known["all"][name], known["sixth"][name], second, rate)
            for way, loss in losses.items():
                found.setdefault((way, rate), []).append(loss / losses["as it is"])
    results = Results(config)
    for (way, rate), ratios in found.items():
        results.add(
            {
                "model": Path(config.model).name,
                "layers": config.layers,
                "way": way,
                "rate": rate,
                "loss_ratio": float(np.exp(np.mean(np.log(ratios)))),
                "least": min(ratios),
                "most": max(ratios),
                "kernels": len(ratios),
                "calibration_tokens": config.calibration * config.tokens,
            }
        )
    return results.rows


def start_at(
    config: Config, model: Any, params: Any, batches: list, first: int
) -> dict[str, jc.Moments]:
    """Subtract the moments of the batches before `first` from those of all."""
    whole = calibrated.one_shot(config, model, params, batches)
    before = calibrated.one_shot(config, model, params, batches[:first])
    after = {}
    for name, x in whole.items():
        if x.second is not None:
            share = before[name].count / x.count
            second = (x.second - share * before[name].second) / (1 - share)
            after[name] = dataclasses.replace(x, second=second)
    return after


def ways(
    x: jax.Array, moments: jc.Moments, fewer: jc.Moments, held: np.ndarray, rate: float
) -> dict[str, float]:
    """Measure the loss on other inputs by each way, at equal bits."""
    original = np.asarray(x, np.float64)

    def loss(weights: np.ndarray, bits: float) -> float:
        error = weights - original
        return float(np.sum(error * (held @ error))) * 4.0 ** (bits - rate)

    losses = {}
    for way, options in OPTIONS.items():
        leaf = jc.rate_distortion(x, moments, rate=rate, shrinkage=0, **options)
        losses[way] = loss(np.asarray(leaf.materialize(), np.float64), size(leaf))
        if way in ("as it is", "rounding"):
            after = afterwards(original, leaf, moments)
            suffix = "" if way == "as it is" else ", with rounding"
            for each, (weights, bits) in after.items():
                losses[each + suffix] = loss(weights, bits)
            if suffix:  # beside rounding alone
                for each in after:
                    losses[each + suffix] *= losses["as it is"] / losses[way]
    leaf = jc.rate_distortion(x, fewer, rate=rate, shrinkage=0)
    weights = np.asarray(leaf.materialize(), np.float64)
    return losses | {"a sixth of the tokens": loss(weights, size(leaf))}


def size(leaf: jc.RateCoded) -> float:
    """Count the bits per weight in a file."""
    stream = leaf.levels.stored()["stream"].nbytes
    return 8 * (stream + leaf.steps.nbytes) / leaf.size


def afterwards(
    x: np.ndarray, leaf: jc.RateCoded, moments: jc.Moments
) -> dict[str, tuple[np.ndarray, float]]:
    """Fit something again: weights and bits, without the numbers that it adds.

    The least-squares scale of each row or each column; or all levels, row after row,
    each row once more given all others.
    """
    second = damped(jnp.asarray(moments.second, jnp.float32), 0.01)
    metric = np.asarray(second, np.float64)
    levels = np.asarray(leaf.levels.materialize(), np.int32)
    weights = np.asarray(leaf.materialize(), np.float64)
    bits = size(leaf)
    rows = metric * (weights @ weights.T)
    rows += 1e-9 * np.trace(rows) / len(rows) * np.eye(len(rows))
    scales = np.linalg.solve(rows, np.sum(weights * (metric @ x), axis=1))
    columns = np.sum(weights * (metric @ x), axis=0)
    columns /= np.maximum(np.sum(weights * (metric @ weights), axis=0), 1e-30)
    states = leaf.levels.trellis
    steps = leaf.steps.astype(jnp.float32)
    again = swept(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(weights, jnp.float32),
        second,
        jnp.where(steps == 0, 1, steps),
        states=states,
    )
    safe = np.where(np.asarray(steps) == 0, 1, np.asarray(steps, np.float64))
    found = np.rint(np.asarray(again, np.float64) / safe[:, None]).astype(np.int32)
    more = [contexts.fit(each, 2 if states else 1).bits for each in (found, levels)]
    return {
        AFTERWARDS[0]: (weights * scales[:, None], bits),
        AFTERWARDS[1]: (weights * columns, bits),
        AFTERWARDS[2]: (found * safe[:, None], bits + (more[0] - more[1]) / x.size),
    }


@functools.partial(jax.jit, static_argnames=("states",))
def swept(
    x: jax.Array,
    weights: jax.Array,
    second: jax.Array,
    steps: jax.Array,
    *,
    states: int,
) -> jax.Array:
    """Sweep once over the rows by coordinate descent."""
    outputs = x.shape[1]
    count, places = trellis.walks(outputs)
    if count * places != outputs and states:
        raise ValueError(f"{outputs} outputs do not fill {count} walks")

    def replace(j: jax.Array, row: jax.Array) -> jax.Array:
        step = steps[jnp.minimum(j, x.shape[0] - 1)]
        row = row / step
        if not states:
            return step * jnp.round(row)
        found, _ = trellis.search(row.reshape(count, places).T, states)
        return step * found.T.reshape(-1).astype(row.dtype)

    return descend(x, weights, second, replace)


if __name__ == "__main__":
    run(parse(Config, __doc__))

"""How fast is error feedback beside the reference implementation's loop in PyTorch?

One square layer per width, the same weights and second moment: the inverse factor and
the rounding of all input rows, 4 bits in blocks of 128, activation order, steps given.
The rival is the algorithm of the GPTQ repository (github.com/IST-DASLab/gptq, 2022),
written here: blocks of 128 columns, a Cholesky factor of the inverse, in float32 as
there, and the same in NumPy. Rounds are interleaved, the least is taken:

    python -m experiments.quantization.gptq_speed
"""

import dataclasses
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import interleaved
from jaxcompress.quantization.gptq import feed_codes
from jaxcompress.quantization.grids import spread

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (576, 2048, 4096)
    rounds: int = 3
    fast: bool = False  # one small width, one round
    results: str = "experiments/quantization/results/gptq_speed.jsonl"


def case(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw weights `[inputs, outputs]`, and the moment of uneven, correlated inputs."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((width, width), np.float32)
    inputs = rng.standard_normal((2 * width, width), np.float32)
    inputs = inputs * np.exp(rng.standard_normal(width, np.float32) / 2)
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    return x, inputs.T @ inputs / len(inputs)


def by_numpy(x: np.ndarray, second: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """GPTQ in NumPy: the rounded weights; `x` and `steps` `[inputs, outputs]`."""
    order = np.argsort(-np.diag(second))
    w, s = x[order].T.copy(), steps[order].T
    h = second[np.ix_(order, order)]
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h), dtype=h.dtype)
    factor = np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)
    found = np.zeros_like(w)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        part, errors = w[:, start:stop].copy(), np.zeros_like(w[:, start:stop])
        local = factor[start:stop, start:stop]
        for i in range(stop - start):
            step = s[:, start + i]
            q = np.clip(np.rint(part[:, i] / step), -8, 7) * step
            error = (part[:, i] - q) / local[i, i]
            part[:, i:] -= np.outer(error, local[i, i:])
            errors[:, i], found[:, start + i] = error, q
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return found.T[np.argsort(order)]


def by_torch(x: Any, second: Any, steps: Any) -> Any:
    """GPTQ in PyTorch, as its authors wrote it."""
    import torch

    order = torch.argsort(torch.diag(second), descending=True)
    w, s = x[order].T.clone(), steps[order].T
    h = second[order][:, order]
    h = h + 0.01 * torch.mean(torch.diag(h)) * torch.eye(len(h))
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(h, upper=True)
    found = torch.zeros_like(w)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        part = w[:, start:stop].clone()
        errors = torch.zeros_like(part)
        local = factor[start:stop, start:stop]
        for i in range(stop - start):
            step = s[:, start + i]
            column = part[:, i]
            q = torch.clamp(torch.round(column / step), -8, 7) * step
            error = (column - q) / local[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(local[i, i:].unsqueeze(0))
            errors[:, i], found[:, start + i] = error, q
        w[:, stop:] -= errors.matmul(factor[start:stop, stop:])
    return found.T[torch.argsort(order)]


def run(config: Config) -> list[dict[str, Any]]:
    """Time one layer of each width; a row for each."""
    if config.fast:
        config = dataclasses.replace(config, widths=(256,), rounds=1)
    try:
        import torch
    except ModuleNotFoundError:
        torch = None
    results = Results(config, experiment="gptq_speed")
    for width in config.widths:
        x, second = case(width)
        start = jc.symmetric(jnp.asarray(x), bits=4, block=BLOCK)
        steps = spread(start.steps, BLOCK, width)
        weights, moment = jnp.asarray(x), jnp.asarray(second)
        wide = np.asarray(steps.scale)

        def ours() -> np.ndarray:
            codes = feed_codes(
                weights,  # noqa: B023
                moment,  # noqa: B023
                steps,  # noqa: B023
                grid="symmetric",
                bits=4,
                order="activation",
                damping=0.01,
            )
            return (np.asarray(codes, np.float32) - 8) * wide  # noqa: B023

        rivals: dict[str, Callable[[], np.ndarray]] = {"ours": ours}
        rivals["numpy"] = lambda: by_numpy(x, second, wide)  # noqa: B023
        if torch is not None:
            given = tuple(map(torch.from_numpy, (x, second, wide.copy())))
            rivals["torch"] = lambda: by_torch(*given).numpy()  # noqa: B023
        losses = {}
        for name, call in rivals.items():  # once before, for compilation and threads
            change = call() - x
            losses[name] = float(np.sum(change * (second @ change)))
        spent = interleaved(list(rivals.values()), config.rounds, warm=False)
        row: dict[str, Any] = {"width": width}
        for name, (wall, processor) in zip(rivals, spent.min(axis=0), strict=True):
            row[f"{name}_processor_seconds"] = processor
            row[f"{name}_seconds"] = wall
            row[f"{name}_layer_loss"] = losses[name]
        for name in list(rivals)[1:]:
            pair = row[f"{name}_processor_seconds"], row["ours_processor_seconds"]
            row[f"times_as_fast_as_{name}"] = pair[0] / pair[1]
        row |= {
            "rounds": config.rounds,
            "torch": metadata.version("torch") if torch is not None else None,
        }
        results.add(row)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

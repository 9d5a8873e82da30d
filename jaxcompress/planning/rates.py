"""`plan_rates`: one rate for the model, shared out over its leaves in closed form."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.moments import Moments, check_curvatures
from jaxcompress.calibration.output_feedback import (
    output_costs,
)
from jaxcompress.checks import check_concrete
from jaxcompress.coding.levels import rate_coded
from jaxcompress.planning.budget import byte_limit
from jaxcompress.planning.planned import Source, planned_leaves
from jaxcompress.quantization.order_of_inputs import prepare
from jaxcompress.quantization.rate_model import deviations, gaussian_bits
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import nbytes as held_bytes
from jaxcompress.tree.methods import precise
from jaxcompress.tree.paths import Entry
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Rule

ROW_BITS, COLUMN_BITS = 21, 5  # of side information
SMALLEST = 0.05  # bits above the side information: every leaf gets them
SMALLEST_COLUMN = 1e-9  # of the mean square of a slice
BINS = 16  # an octave of sizes is sorted into


@precise
def plan_rates(
    params: Source,
    moments: Mapping[str, Moments] | None = None,
    *,
    bits_per_weight: float | None = None,
    nbytes: int | str | None = None,
    fraction: float | None = None,
    layouts: Mapping[str, Layout] | None = None,
    where: str | None = None,
    states: int = 128,
    order: str = "pivoted",
    damping: float = 0.01,
    shrinkage: float = 0.1,
) -> list[Rule]:
    """Plan rates of `rate_distortion` that average to a budget, at the least
    divergence.

    At a variance `v` of a leaf's error each weight costs `log2(1 / v) / 2` bits and
    adds `curvature * v` to the divergence, which is least where that is the same for
    all leaves. What a leaf then costs is the entropy of Gaussian levels, each as large
    as its row and its column have them; those that the error exceeds cost next to
    nothing. One number is left, found by bisection.

    Args:
      params: pytree of arrays, concrete; or a path, or an open checkpoint, as in
        `compress_blockwise`: leaves are then read one at a time.
      moments: by kernel name, of `measure_curvatures`; without curvatures all errors
        count alike.
      bits_per_weight, nbytes, fraction: exactly one, as in `plan_bits`: bits per weight
        on average over the planned leaves, side information included, or its equal
        in bytes.
      layouts, where: as for `plan_bits`.
      states, order, damping: passed on to `rate_distortion`.
      shrinkage: the same. In files of SmolLM2 of 60 and 42 MB, 0.1 took 2 and 4 % of
        the divergence on the calibrated kind of text, 5 to 17 % on two others.

    Returns:
      Rules `(exact name, "rate_distortion(rate=...)")`, a rate for each slice of a
      stack.

    Raises:
      ValueError: a curvature that is missing or not positive, or a rate below the side
        information.

    Example:
      >>> plan = jc.planning.plan_rates(params, moments, bits_per_weight=3)
    """
    check_concrete(params, "plan_rates")
    select = functools.partial(
        planned_entries, moments=moments, where=where, layouts=layouts
    )
    with planned_leaves(params, select) as planned:
        values = [entry.value for entry in planned.entries]
        weights = sum(value.size for value in values)
        limit = byte_limit(
            "plan_rates",
            bits_per_weight=bits_per_weight,
            nbytes=nbytes,
            fraction=fraction,
            weights=weights,
            total=sum(held_bytes(value) for value in values),
        )
        rate = 8 * limit / weights if bits_per_weight is None else bits_per_weight
        problem = rate_problem(
            planned.entries,
            states=states,
            order=order,
            damping=damping,
            shrinkage=shrinkage,
            read=planned.read,
        )
    return problem.solve(rate)


@dataclasses.dataclass(frozen=True)
class RateProblem:
    """Leaves to share a rate out over, with all that does not depend on the rate.

    Args:
      names: of the leaves.
      slices: of each leaf, the number of a stack; 0 for a matrix.
      sizes: weights of each slice, float64 `[slices]`.
      spreads: of each slice, as `_spreads` returns them.
      floors: bits per weight of the side information of each slice.
      bends: log2 of what an error of each slice counts.
      options: of `rate_distortion`, besides the rate.
    """

    names: list[str]
    slices: list[int]
    sizes: np.ndarray
    spreads: list[tuple[np.ndarray, np.ndarray]]
    floors: np.ndarray
    bends: np.ndarray
    options: str

    def solve(self, rate: float) -> list[Rule]:
        """Return rules of this rate on average over the weights.

        Raises:
          ValueError: a rate below the side information, or above 12.
        """
        total = self.sizes.sum()
        least = float(self.floors @ self.sizes / total) + SMALLEST
        if not least < rate <= 12:
            raise ValueError(
                f"plan_rates takes {least:.3f} to 12 bits per weight for these leaves, "
                f"not {rate!r}; what describes their rows and columns takes the first"
            )
        low, high = -64.0, 64.0
        for _ in range(60):
            middle = (low + high) / 2
            above = self._rates(middle) @ self.sizes / total > rate
            low, high = (middle, high) if above else (low, middle)
        rates = np.round(np.minimum(self._rates(high), 12), 4)
        chosen, plan = iter(rates.tolist()), []
        for name, count in zip(self.names, self.slices, strict=True):
            each = tuple(itertools.islice(chosen, count)) if count else next(chosen)
            method = f"rate_distortion(rate={each}, {self.options})"
            plan.append((re.escape(name), method))
        return plan

    def _rates(self, level: float) -> np.ndarray:
        """Return the rate of each slice where an error costs `2**level`."""
        bits = [
            max(SMALLEST, shares @ gaussian_bits(logs - level + bend))
            for (logs, shares), bend in zip(self.spreads, self.bends, strict=True)
        ]
        return self.floors + np.array(bits)


@precise
def rate_problem(
    planned: Sequence[Entry],
    *,
    states: int,
    order: str,
    damping: float,
    shrinkage: float,
    read: Callable[[Entry], Entry] = lambda entry: entry,
) -> RateProblem:
    """Measure what `plan_rates` needs of leaves, once for any number of budgets.

    Args:
      planned: the leaves, with their moments.
      states, order, damping, shrinkage: as for `plan_rates`.
      read: from an entry to the one with its value.

    Raises:
      ValueError: a curvature that is missing or not positive.
    """
    measured = check_curvatures({entry.name: entry.moments for entry in planned})
    slices, sizes, spreads, floors, bends = [], [], [], [], []
    options = {"order": order, "damping": damping, "shrinkage": shrinkage}
    for entry in map(read, planned):
        matrix = entry.matrix()
        inputs, outputs = matrix.shape[-2:]
        count = entry.value.size // (inputs * outputs)
        slices.append(count if matrix.ndim > 2 else 0)
        bent = np.ones((count, outputs))
        if measured:
            bent, _ = output_costs(entry.moments, matrix, entry.name)
        scales = rate_coded.column_scales(bent)
        finer = rate_coded.SCALES[scales]
        matrix = matrix.reshape(count, inputs, outputs) / finer[:, None]
        spreads += _spreads(matrix, entry.moments, **options)
        sizes += [inputs * outputs] * count
        column = COLUMN_BITS + rate_coded.scale_bits(rate_coded.packed_scales(scales))
        floors += [ROW_BITS / outputs + column / inputs] * count
        bends += list(
            0.5 * np.log2((bent * finer.astype(np.float64) ** 2).mean(axis=1))
        )
    return RateProblem(
        [entry.name for entry in planned],
        slices,
        np.array(sizes, np.float64),
        spreads,
        np.array(floors),
        np.array(bends),
        f"states={states}, "
        + ", ".join(f"{key}={value!r}" for key, value in options.items()),
    )


def _spreads(
    x: jax.Array, moments: Moments | None, **options: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the sizes that each slice's levels have at a scale of one, as log2.

    Returns:
      Sizes, and the share of the levels that has each.
    """
    second = getattr(moments, "second", None)
    flat = x.reshape(-1, *x.shape[-2:]).astype(jnp.float32)
    if second is not None:
        second = second.reshape(-1, *second.shape[-2:])
    spreads = []
    for i, each in enumerate(flat):
        one = None if second is None else second[i]
        target, factor, _ = prepare(each, one, **options)
        rows = deviations(target, factor)
        if rows is None:
            spreads.append((np.array([-100.0]), np.ones(1)))
            continue
        relative = np.square(np.asarray(target / factor.diagonal()[:, None]))
        relative = (relative * np.exp2(-2 * rows)[:, None]).mean(axis=0)
        columns = np.log2(np.maximum(relative, SMALLEST_COLUMN)) / 2
        places = np.rint(BINS * (rows[:, None] + columns)).astype(np.int64)
        counts = np.bincount((places - places.min()).reshape(-1))
        logs = (places.min() + np.arange(counts.size)) / BINS
        spreads.append((logs, counts / counts.sum()))
    return spreads

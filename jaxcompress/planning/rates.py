"""`plan_rates`: one rate for the model, shared out over its leaves in closed form."""

import itertools
import re
from collections.abc import Mapping

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
from jaxcompress.quantization.rate_distortion import prepare
from jaxcompress.quantization.rate_model import deviations, gaussian_bits
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import nbytes as held_bytes
from jaxcompress.tree.methods import precise
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Params, Rule

ROW_BITS, COLUMN_BITS = 21, 5  # of side information
SMALLEST = 0.05  # bits above the side information: every leaf gets them
SMALLEST_COLUMN = 1e-9  # of the mean square of a slice
BINS = 16  # an octave of sizes is sorted into


@precise
def plan_rates(
    params: Params,
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
) -> list[Rule]:
    """Plan rates of `rate_distortion` that average to a budget, at the least
    divergence.

    At a variance `v` of a leaf's error each weight costs `log2(1 / v) / 2` bits and
    adds `curvature * v` to the divergence, which is least where that is the same for
    all leaves. What a leaf then costs is the entropy of Gaussian levels, each as large
    as its row and its column have them; those that the error exceeds cost next to
    nothing. One number is left, found by bisection.

    Args:
      params: pytree of arrays, concrete.
      moments: by kernel name, of `measure_curvatures`; without curvatures all errors
        count alike.
      bits_per_weight, nbytes, fraction: exactly one, as in `plan_bits`: bits per weight
        on average over the planned leaves, side information included, or its equal
        in bytes.
      layouts, where: as for `plan_bits`.
      states, order, damping: passed on to `rate_distortion`.

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
    planned = planned_entries(params, moments, where, layouts)
    limit = byte_limit(
        "plan_rates",
        bits_per_weight=bits_per_weight,
        nbytes=nbytes,
        fraction=fraction,
        weights=sum(entry.value.size for entry in planned),
        total=sum(held_bytes(entry.value) for entry in planned),
    )
    rate = bits_per_weight
    if rate is None:
        rate = 8 * limit / sum(entry.value.size for entry in planned)
    measured = check_curvatures({entry.name: entry.moments for entry in planned})
    slices, sizes, spreads, floors, bends = [], [], [], [], []
    for entry in planned:
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
        spreads += _spreads(matrix, entry.moments, order, damping)
        sizes += [inputs * outputs] * count
        column = COLUMN_BITS + rate_coded.scale_bits(rate_coded.packed_scales(scales))
        floors += [ROW_BITS / outputs + column / inputs] * count
        bends += list(
            0.5 * np.log2((bent * finer.astype(np.float64) ** 2).mean(axis=1))
        )
    sizes = np.array(sizes, np.float64)
    least = float(np.dot(floors, sizes) / sizes.sum()) + SMALLEST
    if not least < rate <= 12:
        raise ValueError(
            f"plan_rates takes {least:.3f} to 12 bits per weight for these leaves, not "
            f"{rate!r}; what describes their rows and columns takes the first"
        )

    def rates(level: float) -> np.ndarray:
        slice_rates = [
            floor + max(SMALLEST, shares @ gaussian_bits(logs - level + bend))
            for (logs, shares), bend, floor in zip(spreads, bends, floors, strict=True)
        ]
        return np.array(slice_rates)

    low, high = -64.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        above = rates(middle) @ sizes / sizes.sum() > rate
        low, high = (middle, high) if above else (low, middle)
    options = f"states={states}, order={order!r}, damping={damping}"
    chosen, plan = iter(np.round(np.minimum(rates(high), 12), 4).tolist()), []
    for entry, count in zip(planned, slices, strict=True):
        each = tuple(itertools.islice(chosen, count)) if count else next(chosen)
        method = f"rate_distortion(rate={each}, {options})"
        plan.append((re.escape(entry.name), method))
    return plan


def _spreads(
    x: jax.Array, moments: Moments | None, order: str, damping: float
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
        target, factor, _ = prepare(each, one, order=order, damping=damping)
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

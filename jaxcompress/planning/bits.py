"""`plan_bits`: each leaf its own method, bits and block, from one budget."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress.calibration.damage import divergence, entry_layout, relative_square
from jaxcompress.calibration.moments import check_curvatures
from jaxcompress.checks import check_concrete
from jaxcompress.planning.allocation import Curve, allocate, total_loss
from jaxcompress.planning.budget import byte_limit
from jaxcompress.progress import each_item
from jaxcompress.tree.compress import chain, compress
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import nbytes as held_bytes
from jaxcompress.tree.paths import Entry
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Method, Params, Rule

CANDIDATES = tuple(
    f"symmetric(bits={bits}, block=64, full_range=True)" for bits in range(2, 9)
)
CODING = ("entropy_code()", "code_floats()")


def plan_bits(
    params: Params,
    moments: Mapping[str, Any] | None = None,
    *,
    bits_per_weight: float | None = None,
    nbytes: int | str | None = None,
    fraction: float | None = None,
    sensitivities: Mapping[str, float] | None = None,
    candidates: Sequence[Method | str | None] = CANDIDATES,
    layouts: Mapping[str, Layout] | None = None,
    where: str | None = None,
    coded: bool = False,
    progress: bool | Callable[[list[str]], Iterable[str]] = False,
) -> Any:
    """A recipe that gives each leaf the candidate of least damage within a budget.

    Every candidate is tried on every leaf, and its bytes and its relative squared error
    are measured. The damage is that error times the leaf's sensitivity, and damages add
    up; or, with curvatures and without sensitivities, what its errors add to the
    divergence from the model, to second order. The choice is exact on the convex hulls
    of the leaves' curves (that of the Lagrangian), then what is left is filled
    greedily; the same candidate everywhere is considered too, so the plan is never
    worse by this measure.

    Args:
      params: pytree of arrays and leaves; concrete.
      bits_per_weight, nbytes, fraction: exactly one: what the planned leaves may take
        together, in bits per weight, in bytes (an integer or "60MB"), or as a fraction
        of the bytes they take now.
      sensitivities: by name, of `measure_sensitivities`; None: all equal, or what the
        curvatures say.
      candidates: methods or their strings; None keeps a leaf as it is.
      moments: by kernel name, for methods that need them. A leaf that has a second
        moment is judged by its output error, another by its weight error:
        sensitivities must have been measured with the same moments. With curvatures,
        of `measure_curvatures`, nothing else need be measured.
      layouts: by kernel name, as for `compress`.
      where: plan the leaves whose names it fully matches; None: those that a method
        takes by default.
      coded: count bytes after lossless coding (streams and tables as they stand in the
        file; a file adds its header), not as held in memory. Slower.
      progress: as in `compress`.

    Returns:
      Rules `(exact name, candidate)`; a chain of these and the coding if `coded`.

    Raises:
      ValueError: a budget out of range or below what the smallest candidates take, no
        candidates, a sensitivity that is missing, negative or not finite, without
        sensitivities curvatures that some leaves lack or that are all zero, what
        `compress` raises.
      TypeError: params under a trace.

    Source: damages that add up as `sensitivity * error`, HIGGS (Malinovskii et al.
    2024, arXiv 2411.17525, theorem 1).
    """
    check_concrete(params, "plan_bits")
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"plan_bits takes a list of candidates, not {candidates!r}")
    layouts, candidates = layouts or {}, list(candidates)
    planned = planned_entries(params, moments, where)
    weights = _weights(planned, sensitivities)
    curved = sensitivities is None and check_curvatures(
        {entry.name: entry.moments for entry in planned}
    )
    damage = divergence if curved else relative_square
    turns = iter(
        each_item([entry.name for entry in planned], progress, label="planning")
    )
    costs = np.zeros((len(planned), len(candidates)), np.int64)
    losses = np.zeros((len(planned), len(candidates)))
    for i, entry in enumerate(planned):
        next(turns, None)
        for j, candidate in enumerate(candidates):
            small = _compressed(entry, candidate, layouts, coded)
            costs[i, j] = held_bytes(small)
            losses[i, j] = weights[entry.name] * damage(entry, small, layouts)
    for _ in turns:
        pass
    weights_count = sum(entry.value.size for entry in planned)
    limit = byte_limit(
        "plan_bits",
        bits_per_weight=bits_per_weight,
        nbytes=nbytes,
        fraction=fraction,
        weights=weights_count,
        total=sum(held_bytes(entry.value) for entry in planned),
    )
    picks = _choose(costs, losses, limit, weights_count)
    rules: list[Rule] = [
        (re.escape(entry.name), candidates[pick])
        for entry, pick in zip(planned, picks, strict=True)
    ]
    return chain(rules, *CODING) if coded else rules


def _weights(
    planned: list[Entry], sensitivities: Mapping[str, float] | None
) -> dict[str, float]:
    names = [entry.name for entry in planned]
    if sensitivities is None:
        return dict.fromkeys(names, 1.0)
    for name in names:
        value = sensitivities.get(name)
        if value is None:
            raise ValueError(
                f"{name}: no sensitivity; measure it with the same pattern, or plan "
                "fewer leaves with where=..."
            )
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(
                f"{name}: a sensitivity of {value}; it must be finite and not "
                "negative. Measure a divergence from the original model, not a loss "
                "that may fall"
            )
    return {name: float(sensitivities[name]) for name in names}


def _compressed(
    entry: Entry, candidate: Any, layout: Mapping[str, Layout], coded: bool
) -> Any:
    name = entry.name
    stages = [[(re.escape(name), candidate)], *(CODING if coded else ())]
    moments = None if entry.moments is None else {name: entry.moments}
    # One leaf as a tree of its own; a slash in a key is a slash in a name.
    kinds = entry_layout(entry, layout)
    small = compress({name: entry.value}, chain(*stages), moments, layouts=kinds)
    return small[name]


def _choose(
    costs: np.ndarray, losses: np.ndarray, limit: int, weights: int
) -> list[int]:
    """The candidate of each leaf, `[leaves, candidates]` to indices of candidates."""
    curves, kept = [], []
    for cost, loss in zip(costs, losses, strict=True):
        order = [int(j) for j in np.lexsort((loss, cost))]
        useful: list[int] = []
        for j in order:  # from the smallest: what costs more must lose less
            if not useful or loss[j] < loss[useful[-1]]:
                useful.append(j)
        kept.append(useful)
        curves.append(Curve(cost[useful], loss[useful]))
    least = sum(int(curve.costs[0]) for curve in curves)
    if limit < least:
        raise ValueError(
            f"the budget of {limit} bytes is below the {least} that the smallest "
            f"candidates take, {8 * least / weights:.3f} bits per weight; raise it, or "
            "add a smaller candidate"
        )
    chosen = allocate(curves, limit)
    best = [useful[pick] for useful, pick in zip(kept, chosen, strict=True)]
    lost = total_loss(curves, chosen)
    for j in range(costs.shape[1]):
        if costs[:, j].sum() <= limit and losses[:, j].sum() < lost:
            best, lost = [j] * len(curves), losses[:, j].sum()
    return best

"""`plan_bits`: each leaf its own method, bits and block, from one budget."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.moments import check_curvatures, require
from jaxcompress.planning.allocation import Curve, allocate, total_loss
from jaxcompress.tree import layouts
from jaxcompress.tree.compress import chain, choose, compress
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import dense, nbytes
from jaxcompress.tree.paths import Entry, entries, map_entries
from jaxcompress.types import Method, Params, Rule

CANDIDATES = tuple(
    f"symmetric(bits={bits}, block=64, full_range=True)" for bits in range(2, 9)
)
CODING = ("entropy_code()", "code_floats()")


def plan_bits(
    params: Params,
    *,
    budget: float | int,
    sensitivities: Mapping[str, float] | None = None,
    candidates: Sequence[Method | str | None] = CANDIDATES,
    moments: Mapping[str, Any] | None = None,
    layout: Mapping[str, Layout] | None = None,
    pattern: str | None = None,
    coded: bool = False,
    progress: Callable[[list[str]], Iterable[str]] = iter,
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
      budget: what the planned leaves may take together: a fraction of their bytes now
        (a float, above 0 and at most 1), or bytes (an int).
      sensitivities: by name, of `measure_sensitivities`; None: all equal, or what the
        curvatures say.
      candidates: methods or their strings; None keeps a leaf as it is.
      moments: by kernel name, for methods that need them. A leaf that has a second
        moment is judged by its output error, another by its weight error:
        sensitivities must have been measured with the same moments. With curvatures,
        of `measure_curvatures`, nothing else need be measured.
      layout: by kernel name, as for `compress`.
      pattern: plan the leaves whose names it fully matches; None: those that a method
        takes by default.
      coded: count bytes after lossless coding (streams and tables as they stand in the
        file; a file adds its header), not as held in memory. Slower.
      progress: wraps the list of leaves, as in `compress`.

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
    layout, candidates = layout or {}, list(candidates)
    planned = planned_entries(params, moments, pattern)
    weights = _weights(planned, sensitivities)
    curved = sensitivities is None and check_curvatures(
        {entry.name: entry.moments for entry in planned}
    )
    damage = _divergence if curved else _relative_square
    turns = iter(progress([entry.name for entry in planned]))
    costs = np.zeros((len(planned), len(candidates)), np.int64)
    losses = np.zeros((len(planned), len(candidates)))
    for i, entry in enumerate(planned):
        next(turns, None)
        for j, candidate in enumerate(candidates):
            small = _compressed(entry, candidate, layout, coded)
            costs[i, j] = nbytes(small)
            losses[i, j] = weights[entry.name] * damage(entry, small, layout)
    for _ in turns:
        pass
    limit = _limit(budget, sum(nbytes(entry.value) for entry in planned))
    picks = _choose(costs, losses, limit, sum(entry.value.size for entry in planned))
    rules: list[Rule] = [
        (re.escape(entry.name), candidates[pick])
        for entry, pick in zip(planned, picks, strict=True)
    ]
    return chain(rules, *CODING) if coded else rules


def measure_sensitivities(
    loss_fn: Callable[[Params], Any],
    params: Params,
    *,
    sizes: Sequence[float] = (0.1, 0.2),
    moments: Mapping[str, Any] | None = None,
    layout: Mapping[str, Layout] | None = None,
    pattern: str | None = None,
    key: jax.Array,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> dict[str, float]:
    """How much a loss grows per relative squared error of each leaf, the others exact.

    Gaussian noise is added to one leaf at a time, and the growth of the loss regressed
    on the squared relative size of the noise, through zero. It calls `loss_fn`
    `1 + leaves * len(sizes)` times.

    Args:
      loss_fn: of parameters, a number; a divergence from the original model, as
        `lambda tree: compare(apply_fn, params, tree, batches).kl`.
      params: concrete.
      sizes: of the noise, relative to the leaf (norm over norm; of the layer's outputs
        where the leaf has a second moment). About those of the errors to come: 0.2 is
        what 3 bits make, 0.1 is 4.
      moments, layout, pattern: as for `plan_bits`.
      key: of the noise.
      progress: wraps the list of leaves, as in `compress`.

    Returns:
      Sensitivities by name, in units of the loss.

    Raises:
      ValueError: sizes out of range, a loss that is not finite.
    """
    check_concrete(params, "measure_sensitivities")
    if not sizes or not all(np.isfinite(size) and size > 0 for size in sizes):
        raise ValueError(
            f"measure_sensitivities takes sizes of noise above 0, not {sizes!r}"
        )
    layout = layout or {}
    found: dict[str, float] = {}
    base = float(loss_fn(params))
    planned = planned_entries(params, moments, pattern)
    turns = iter(progress([entry.name for entry in planned]))
    for number, entry in enumerate(planned):
        next(turns, None)
        x = dense(entry.value)
        noise = jax.random.normal(jax.random.fold_in(key, number), x.shape, jnp.float32)
        unit = _relative_square(entry, x + noise.astype(x.dtype), layout)
        growth = []
        for size in sizes:
            scaled = x + (noise * (size / unit**0.5)).astype(x.dtype)
            noisy = map_entries(
                lambda e, name=entry.name, new=scaled: (
                    new if e.name == name else e.value
                ),
                params,
            )
            growth.append(float(loss_fn(noisy)) - base)
        squares = np.square(np.asarray(sizes, np.float64))
        slope = float(squares @ np.asarray(growth) / (squares @ squares))
        if not np.isfinite(slope):
            raise ValueError(
                f"{entry.name}: the loss is {base} without noise and "
                f"{[base + g for g in growth]} with noise of sizes {list(sizes)}; "
                "make sizes smaller, or look for NaN in the batches"
            )
        found[entry.name] = slope
    for _ in turns:
        pass
    return found


def check_concrete(params: Params, name: str) -> None:
    """Raises TypeError under a trace."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
        raise TypeError(
            f"{name} reads values on the host, so it can't run under jit, vmap or "
            "scan; plan outside and use the recipe inside"
        )


def _weight(x: Any, moments: Any = None) -> Any:
    """A method that changes nothing; what it takes by default is what is planned."""
    del moments
    return x


def planned_entries(params: Params, moments: Any, pattern: str | None) -> list[Entry]:
    """The leaves whose names the pattern matches, or that a method takes by default."""
    chosen, _ = choose(params, _weight if pattern is None else [(pattern, _weight)])
    return [entry for entry in entries(params, moments) if entry.name in chosen]


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
                "fewer leaves with pattern=..."
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
    small = compress(
        {name: entry.value}, chain(*stages), moments, layout=_layout(entry, layout)
    )
    return small[name]


def _layout(entry: Entry, layout: Mapping[str, Layout]) -> dict[str, Layout]:
    if entry.depth and entry.value.ndim == 3:
        return {entry.name: Layout((0,), (1,), (2,))}
    return {entry.name: layout[entry.name]} if entry.name in layout else {}


def _relative_square(entry: Entry, value: Any, layout: Mapping[str, Layout]) -> float:
    """Squared error over squared size, of the layer's outputs where moments are known.

    Measured in float64 sums of float32 products; 0 for an all-zero leaf.
    """
    error, size = (x.sum() for x in _output_squares(entry, value, layout))
    return float(error / size) if size > 0 else 0.0


def _divergence(entry: Entry, value: Any, layout: Mapping[str, Layout]) -> float:
    """Nats per token that an error costs, by the curvatures of its outputs."""
    error, _ = _output_squares(entry, value, layout)
    return float(np.sum(error * np.asarray(entry.moments.curvatures, np.float64)))


def _output_squares(
    entry: Entry, value: Any, layout: Mapping[str, Layout]
) -> list[np.ndarray]:
    """Squares of error and weights, `[..., outputs]`, as `_squares` has them."""
    second = getattr(entry.moments, "second", None)
    if second is None and getattr(entry.moments, "curvatures", None) is None:
        kind = Layout((), tuple(range(entry.value.ndim - 1)), (entry.value.ndim - 1,))
    else:
        kind = layouts.choose_layout(
            entry.name,
            entry.value.shape,
            _layout(entry, layout).get(entry.name),
            entry.moments,
            embedding=entry.embedding,
        )
    parts = [layouts.matricize(dense(x), kind) for x in (entry.value, value)]
    if getattr(entry.moments, "curvatures", None) is not None:
        require(entry.moments, parts[0], entry.name, fields=("curvatures",))
    return [np.asarray(x, np.float64) for x in _squares(*parts, second)]


@jax.jit
def _squares(
    x: jax.Array, value: jax.Array, second: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    found = []
    for part in (value.astype(jnp.float32) - wide, wide):
        moved = part
        if second is not None:
            moved = jnp.matmul(second, part, precision=jax.lax.Precision.HIGHEST)
        found.append(jnp.sum(part * moved, axis=-2))
    return found[0], found[1]


def _limit(budget: float | int, total: int) -> int:
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if number and isinstance(budget, int) and budget > 0:
        return budget
    if number and 0 < budget <= 1:
        return int(budget * total)
    raise ValueError(
        "plan_bits takes a budget as a fraction of bytes kept (a float above 0 and at "
        f"most 1) or as bytes (an int above 0), not {budget!r}"
    )


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

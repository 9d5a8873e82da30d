"""`plan_bits`: each leaf its own method, bits and block, from one budget."""

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress.calibration.damage import divergence, relative_square
from jaxcompress.calibration.moments import Moments, check_curvatures
from jaxcompress.checks import check_concrete
from jaxcompress.planning.allocation import choose_candidates, prefer_candidates
from jaxcompress.planning.budget import byte_limit
from jaxcompress.planning.planned import Source, planned_leaves
from jaxcompress.progress import each_item
from jaxcompress.tree.compress import chain, compress
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import nbytes as held_bytes
from jaxcompress.tree.paths import Entry, entries
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Method, Params, Progress, Recipe, Rule

CANDIDATES = tuple(
    f"symmetric(bits={bits}, block=64, full_range=True)" for bits in range(2, 9)
)
EMBEDDINGS = CANDIDATES[4:]  # 6 bits or more
BLIND = (
    "plan_bits got neither sensitivities nor curvatures: the plan rests on rounding "
    "errors alone, each weight alike, and knows nothing of what the model does with "
    "them. Pass moments=measure_curvatures(...) or "
    "sensitivities=measure_sensitivities(...)"
)
CODING = ("entropy_code()", "code_floats()")


def plan_bits(
    params: Source,
    moments: Mapping[str, Moments] | None = None,
    *,
    bits_per_weight: float | None = None,
    nbytes: int | str | None = None,
    fraction: float | None = None,
    sensitivities: Mapping[str, float] | None = None,
    candidates: Sequence[Method | str | None] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    where: str | None = None,
    coded: bool = False,
    progress: Progress = False,
) -> Recipe:
    """Plan a recipe that gives each leaf the candidate of least damage in a budget.

    Every candidate is tried on every leaf, and its bytes and its relative squared error
    are measured. The damage is that error times the leaf's sensitivity, and damages add
    up; or, with curvatures and without sensitivities, what its errors add to the
    divergence from the model, to second order. The choice is exact on the convex hulls
    of the leaves' curves (that of the Lagrangian), then what is left is filled
    greedily; the same candidate everywhere is considered too, so the plan is never
    worse by this measure.

    Without sensitivities and curvatures nothing tells how much a leaf matters. Then
    each weight counts alike (the sensitivity of a leaf is its number of weights), and
    those of an embedding that is also the head count twice. Embeddings keep 6 bits or
    more, unless `candidates` are given or the same candidate everywhere does less
    damage. A warning says so. An embedding is the head where its moments say that it is
    multiplied, too; without moments, the one of most rows is, unless the tree has
    another matrix with an axis of as many entries.

    Args:
      params: pytree of arrays and leaves; concrete. Or a path, or an open checkpoint,
        as in `compress_blockwise`: leaves are then read one at a time.
      bits_per_weight, nbytes, fraction: exactly one: what the planned leaves may take
        together, in bits per weight, in bytes (an integer or "60MB"), or as a fraction
        of the bytes they take now.
      sensitivities: by name, of `measure_sensitivities`; None: what the curvatures
        say, or numbers of weights.
      candidates: methods or their strings, in which None keeps a leaf as it is. Not
        given: nearest rounding at 2 to 8 bits in blocks of 64.
      moments: by kernel name, for methods that need them. A leaf that has a second
        moment is judged by its output error, another by its weight error:
        sensitivities must have been measured with the same moments. With curvatures,
        of `measure_curvatures`, nothing else need be measured.
      layouts: by kernel name, as for `compress`.
      where: plan the leaves whose names it fully matches; None: those that a method
        takes by default.
      coded: count bytes after lossless coding (streams and tables as stored in the
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

    Warns:
      UserWarning: neither sensitivities nor curvatures.

    Example:
      >>> candidates = ["symmetric(bits=3, block=32)", "symmetric(bits=4, block=32)"]
      >>> plan = jc.planning.plan_bits(params, bits_per_weight=4, candidates=candidates)

    Source: damages that add up as `sensitivity * error`, HIGGS (Malinovskii et al.
    2024, arXiv 2411.17525, theorem 1).
    """
    check_concrete(params, "plan_bits")
    free = candidates is None
    candidates = CANDIDATES if free else candidates
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"plan_bits takes a list of candidates, not {candidates!r}")
    candidates = list(candidates)
    select = functools.partial(
        planned_entries, moments=moments, where=where, layouts=layouts
    )
    with planned_leaves(params, select) as (planned, read, tree):
        curved = sensitivities is None and check_curvatures(
            {entry.name: entry.moments for entry in planned}
        )
        blind = sensitivities is None and not curved
        if blind:
            sensitivities = _sizes(tree, planned)
        weights = _weights(planned, sensitivities)
        damage = divergence if curved else relative_square
        costs = np.zeros((len(planned), len(candidates)), np.int64)
        losses = np.zeros((len(planned), len(candidates)))
        names = [entry.name for entry in planned]
        for i, _ in enumerate(each_item(names, progress, label="planning")):
            entry = read(planned[i])
            for j, candidate in enumerate(candidates):
                small = _compressed(entry, candidate, coded)
                costs[i, j] = held_bytes(small)
                losses[i, j] = weights[entry.name] * damage(entry, small)
    weights_count = sum(entry.value.size for entry in planned)
    limit = byte_limit(
        "plan_bits",
        bits_per_weight=bits_per_weight,
        nbytes=nbytes,
        fraction=fraction,
        weights=weights_count,
        total=sum(held_bytes(entry.value) for entry in planned),
    )
    picks = choose_candidates(costs, losses, limit, weights_count)
    if blind:
        warnings.warn(BLIND, UserWarning, stacklevel=2)
    if blind and free:
        fine = np.array([candidate in EMBEDDINGS for candidate in candidates])
        plain = np.array([not entry.embedding for entry in planned])
        allowed = plain[:, None] | fine
        picks = prefer_candidates(costs, losses, limit, allowed, picks)
    rules: list[Rule] = [
        (re.escape(entry.name), candidates[pick])
        for entry, pick in zip(planned, picks, strict=True)
    ]
    return chain(rules, *CODING) if coded else rules


def _sizes(params: Params, planned: list[Entry]) -> dict[str, float]:
    """Count weights by name, times the uses of each; see `plan_bits`."""
    widest = max((_rows(e) for e in planned if e.embedding), default=0)
    axes = [(e.name, e.value.shape) for e in entries(params) if e.value.ndim > 1]
    sizes = {}
    for entry in planned:
        uses, entry_moments = 1, entry.moments
        if entry.embedding and entry_moments is not None:
            uses += (
                entry_moments.second is not None and entry_moments.tokens is not None
            )
        elif entry.embedding and _rows(entry) == widest:
            others = (shape for name, shape in axes if name != entry.name)
            uses += not any(widest in shape for shape in others)
        sizes[entry.name] = float(entry.value.size * uses)
    return sizes


def _rows(entry: Entry) -> int:
    return entry.value.shape[-2]


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


def _compressed(entry: Entry, candidate: Any, coded: bool) -> Any:
    name = entry.name
    stages = [[(re.escape(name), candidate)], *(CODING if coded else ())]
    moments = None if entry.moments is None else {name: entry.moments}
    # One leaf as a tree of its own; a slash in a key is a slash in a name.
    has_layout = entry.depth > 0 or entry.caller_layout is not None
    layouts = {name: entry.layout} if has_layout else None
    small = compress({name: entry.value}, chain(*stages), moments, layouts=layouts)
    return small[name]

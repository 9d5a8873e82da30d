"""`plan_ranks`: the ranks of all layers from one budget."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from jaxcompress import checks
from jaxcompress.calibration.moments import Moments, check_curvatures
from jaxcompress.checks import check_concrete
from jaxcompress.factorization.svd import energies, svd
from jaxcompress.planning.allocation import Curve, allocate, total_loss
from jaxcompress.planning.budget import byte_limit
from jaxcompress.planning.planned import Source, planned_leaves
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.paths import Entry
from jaxcompress.tree.selection import bind
from jaxcompress.types import Params, Rule


@dataclasses.dataclass(frozen=True)
class _Spectrum(Curve):
    """Costs of the sizes of one leaf, in bytes, and the losses at them.

    The sizes are ranks 1, 2, ... as long as they save bytes, and last the dense leaf.
    """

    name: str

    @property
    def dense(self) -> int:
        """The index of the leaf as it is."""
        return len(self.costs) - 1


def plan_ranks(
    params: Source,
    moments: Mapping[str, Moments] | None = None,
    *,
    bits_per_weight: float | None = None,
    nbytes: int | str | None = None,
    fraction: float | None = None,
    layouts: Mapping[str, Layout] | None = None,
    where: str | None = None,
    relative: bool | None = None,
    damping: float = 1e-3,
) -> list[Rule]:
    """Plan the rank of each leaf that loses least within a budget.

    The next bytes are always spent where they save most loss; the loss of a leaf being
    convex in its rank, that is the best there is but for the last few bytes. A leaf
    that no rank makes smaller, and one for which factors would not pay, stays dense.
    Never worse than the same fraction for every leaf.

    Args:
      params: pytree of arrays and leaves; concrete. Or a path, or an open checkpoint,
        as in `compress_blockwise`: leaves are then read one at a time.
      bits_per_weight, nbytes, fraction: exactly one, as in `plan_bits`. In one dtype a
        fraction of bytes is one of weights. A leaf takes a rank of one at least.
      moments: by kernel name. With them the loss is the layers' expected squared
        output, else the squared weights; the ranks are for `svd` weighted likewise.
        With curvatures, of `measure_curvatures`, it is what the model's predictions
        lose, which compares layers by far the best.
      layouts: by kernel name, as for `compress`.
      where: plan the leaves whose names it fully matches; None: those that a method
        takes by default.
      relative: count each leaf's loss as a fraction of what its all-zero weights would
        lose. None: where there are no moments, since weights of different layers
        compare badly.
      damping: of the second moments, as in `svd`.

    Returns:
      Rules `(exact name, "svd(rank=...)" | None)`, a recipe for `compress` or a stage
      of a `chain`.

    Raises:
      ValueError: a budget out of range or too small for ranks of one, a leaf without
        moments or curvatures where others have them, curvatures that are all zero, a
        layout that is missing.
      TypeError: params under a trace.

    Example:
      >>> small = jc.compress(params, jc.planning.plan_ranks(params, fraction=0.5))
    """
    checks.fraction("plan_ranks", "damping", damping, zero=True)
    check_concrete(params, "plan_ranks")
    stage = svd(rank=1) if where is None else [(where, svd(rank=1))]
    weighted = moments is not None
    relative = not weighted if relative is None else relative

    def select(tree: Params) -> list[Entry]:
        return bind(tree, stage, moments, layouts).selected

    with planned_leaves(params, select) as (planned, read, _):
        check_curvatures({entry.name: entry.moments for entry in planned})
        leaves = [_spectrum(read(e), weighted, relative, damping) for e in planned]
    total = sum(int(leaf.costs[-1]) for leaf in leaves)
    least = sum(int(leaf.costs[0]) for leaf in leaves)
    limit = byte_limit(
        "plan_ranks",
        bits_per_weight=bits_per_weight,
        nbytes=nbytes,
        fraction=fraction,
        weights=sum(entry.value.size for entry in planned),
        total=total,
    )
    limit = min(limit, total)
    if limit < least:
        raise ValueError(
            f"the budget of {limit} bytes is below the {least} that the smallest ranks "
            f"take; the {len(leaves)} leaves take {total} now. Give at least "
            f"{least / total:.4f}, or plan fewer leaves with where=..."
        )
    picks = min(
        (allocate(leaves, limit), _uniform(leaves, limit)),
        key=lambda picks: total_loss(leaves, picks),
    )
    options = f"weighted={weighted}" + (f", damping={damping!r}" if weighted else "")
    return [
        (
            re.escape(leaf.name),
            None if pick == leaf.dense else f"svd(rank={pick + 1}, {options})",
        )
        for leaf, pick in zip(leaves, picks, strict=True)
    ]


def _spectrum(
    entry: Entry, weighted: bool, relative: bool, damping: float
) -> _Spectrum:
    x = entry.matrix()
    inputs, outputs = x.shape[-2:]
    if weighted and getattr(entry.moments, "second", None) is None:
        raise ValueError(
            f"{entry.name}: no second moment of its inputs, and a plan by loss can't "
            "weigh it against the others; choose the leaves that have one with "
            "where=..., or plan without moments"
        )
    try:
        gains = energies(x, entry.moments, weighted=weighted, damping=damping)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{entry.name}: {error}") from error
    gains = np.asarray(gains, np.float64)
    if not np.isfinite(gains).all():
        raise ValueError(
            f"{entry.name}: the weights are not finite, or the moments not positive "
            f"definite with damping={damping!r}; raise it, for instance to 0.01"
        )
    gains = gains.reshape((-1, gains.shape[-1])).sum(axis=0)
    copies = x.size // (inputs * outputs) * x.dtype.itemsize
    saving = (inputs * outputs - 1) // (inputs + outputs)  # the largest rank that saves
    after = np.cumsum(gains[::-1])[::-1]  # the loss with none but the first i ranks
    losses = np.append(after[1 : saving + 1], 0.0)
    if relative and after[0] > 0:
        losses = losses / after[0]
    ranks = np.arange(1, saving + 1, dtype=np.int64)
    costs = np.append(ranks * (inputs + outputs), inputs * outputs) * copies
    return _Spectrum(costs, losses, entry.name)


def _uniform(leaves: list[_Spectrum], limit: int) -> list[int]:
    """Return same fraction for every leaf; the smallest ranks where those cost more."""
    fixed = sum(int(leaf.costs[0]) for leaf in leaves if leaf.dense == 0)
    total = sum(int(leaf.costs[-1]) for leaf in leaves) - fixed
    share = (limit - fixed) / total if total else 1
    picks = []
    for leaf in leaves:
        reach = np.searchsorted(leaf.costs, share * leaf.costs[-1], side="right")
        picks.append(max(0, int(reach) - 1))
    cost = sum(int(leaf.costs[p]) for leaf, p in zip(leaves, picks, strict=True))
    return picks if cost <= limit else [0] * len(leaves)

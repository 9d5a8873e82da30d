"""One budget over many choices: which size of each part loses least together."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Curve:
    """Costs of the sizes of one part, and the losses at them.

    `costs`, integers, increase strictly; `losses`, floats, never increase.
    """

    costs: np.ndarray
    losses: np.ndarray


def allocate(curves: Sequence[Curve], limit: int) -> list[int]:
    """Return index of each curve's size: least total loss of the sizes on the hulls.

    Every part starts at its smallest size. The next units of cost are always spent on
    the step along a lower convex hull that saves most loss for its cost, which is the
    exact optimum (that of the Lagrangian) at each cost it passes through. A step that
    no longer fits is skipped, and what is left over at the end is given to whatever
    single enlargement still fits and saves most, off the hulls too.

    Args:
      curves: of the parts.
      limit: what they may cost together.

    Raises:
      ValueError: `limit` is below the sum of the smallest costs.
    """
    picks = [0] * len(curves)
    left = limit - sum(int(curve.costs[0]) for curve in curves)
    if left < 0:
        raise ValueError(f"a limit of {limit} is {-left} below the smallest sizes")
    steps = []
    for number, curve in enumerate(curves):
        for a, b in itertools.pairwise(hull(curve)):
            cost = int(curve.costs[b] - curve.costs[a])
            steps.append(((curve.losses[b] - curve.losses[a]) / cost, number, b, cost))
    full: set[int] = set()
    for slope, number, index, cost in sorted(steps):
        if slope == 0 or number in full:
            continue
        if cost > left:
            full.add(number)
            continue
        picks[number], left = index, left - cost
    while True:
        choices = [
            _largest_saving(c, p, left) for c, p in zip(curves, picks, strict=True)
        ]
        number = int(np.argmax([saved for saved, _ in choices])) if choices else 0
        if not choices or choices[number][0] <= 0:
            return picks
        new = choices[number][1]
        left -= int(curves[number].costs[new] - curves[number].costs[picks[number]])
        picks[number] = new


def _largest_saving(curve: Curve, pick: int, left: int) -> tuple[float, int]:
    """Find the option that saves most at the largest size that `left` still pays for;
    return the saving and its index.
    """
    reach = curve.costs[pick] + left
    index = int(np.searchsorted(curve.costs, reach, side="right")) - 1
    return float(curve.losses[pick] - curve.losses[index]), index


def hull(curve: Curve) -> list[int]:
    """Return indices of the lower convex hull: the efficient sizes, from the
    smallest.
    """
    costs, losses = curve.costs, curve.losses
    kept: list[int] = []
    for i in range(len(costs)):
        while len(kept) > 1:
            a, b = kept[-2:]
            # b is on or above the line from a to i
            slope = (losses[b] - losses[a]) * (costs[i] - costs[a])
            if slope < (losses[i] - losses[a]) * (costs[b] - costs[a]):
                break
            kept.pop()
        kept.append(i)
    return kept


def total_loss(curves: Sequence[Curve], picks: Sequence[int]) -> float:
    """Return the losses of these sizes, summed."""
    return sum(float(c.losses[p]) for c, p in zip(curves, picks, strict=True))


def choose_candidates(
    costs: np.ndarray, losses: np.ndarray, limit: int, weights: int
) -> list[int]:
    """Choose a candidate for each leaf: least total loss within the limit.

    The same candidate everywhere is considered too.

    Args:
      costs: int `[leaves, candidates]`, bytes; losses: float, alike.
      limit: of the total cost.
      weights: of all leaves; for the error alone.

    Returns:
      An index of a candidate for each leaf.

    Raises:
      ValueError: the limit is below what the smallest candidates cost.
    """
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


def prefer_candidates(
    costs: np.ndarray,
    losses: np.ndarray,
    limit: int,
    allowed: np.ndarray,
    picks: Sequence[int],
) -> list[int]:
    """Choose among the allowed candidates, if that is no worse than one for all.

    Args:
      costs, losses, limit: as for `choose_candidates`.
      allowed: bool `[leaves, candidates]`; each leaf has one or more.
      picks: returned where the allowed candidates do not fit, or lose more than the
        best single candidate, everywhere, that fits.
    """
    # What is not allowed costs and loses more than what is, so it is never taken.
    costly = np.where(allowed, costs, limit + 1)
    worst = np.where(allowed, losses, losses.max() + 1)
    if costly.min(axis=1).sum() > limit:
        return list(picks)
    better = choose_candidates(costly, worst, limit, 1)
    lost = losses[np.arange(len(better)), better].sum()
    fits = costs.sum(axis=0) <= limit
    uniform = losses[:, fits].sum(axis=0).min(initial=np.inf)
    return better if lost <= uniform else list(picks)

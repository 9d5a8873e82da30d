"""One budget over many choices: which size of each part loses least together."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Curve:
    """What each size of one part costs, and what is lost with it.

    `costs`, integers, increase strictly; `losses`, floats, never increase.
    """

    costs: np.ndarray
    losses: np.ndarray


def allocate(curves: Sequence[Curve], limit: int) -> list[int]:
    """The index of each curve's size: least total loss of the sizes on the hulls.

    Every part starts at its smallest size. The next units of cost always go to the
    step along a lower convex hull that saves most loss for its cost, which is the exact
    optimum (that of the Lagrangian) at each cost it passes through. A step that no
    longer fits is skipped, and what is left over at the end is given to whatever single
    enlargement still fits and saves most, off the hulls too.

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
        found = [
            _largest_saving(c, p, left) for c, p in zip(curves, picks, strict=True)
        ]
        number = int(np.argmax([saved for saved, _ in found])) if found else 0
        if not found or found[number][0] <= 0:
            return picks
        new = found[number][1]
        left -= int(curves[number].costs[new] - curves[number].costs[picks[number]])
        picks[number] = new


def _largest_saving(curve: Curve, pick: int, left: int) -> tuple[float, int]:
    """What the largest size that `left` still pays for saves, and its index."""
    reach = curve.costs[pick] + left
    index = int(np.searchsorted(curve.costs, reach, side="right")) - 1
    return float(curve.losses[pick] - curve.losses[index]), index


def hull(curve: Curve) -> list[int]:
    """Indices of the lower convex hull: the sizes worth taking, from the smallest."""
    costs, losses = curve.costs, curve.losses
    kept: list[int] = []
    for i in range(len(costs)):
        while len(kept) > 1:
            a, b = kept[-2:]
            # b lies on or above the line from a to i
            here = (losses[b] - losses[a]) * (costs[i] - costs[a])
            if here < (losses[i] - losses[a]) * (costs[b] - costs[a]):
                break
            kept.pop()
        kept.append(i)
    return kept


def total_loss(curves: Sequence[Curve], picks: Sequence[int]) -> float:
    """The losses of these sizes, summed."""
    return sum(float(c.losses[p]) for c, p in zip(curves, picks, strict=True))

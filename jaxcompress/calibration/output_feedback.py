"""Feedback across outputs: correlated output errors are made to cancel.

To second order the divergence grows by `tr(E^T S E H)`, with `S` the second moment of
the inputs and `H` the joint curvatures of the outputs. Input by input, as `feed_back`
works, each row of errors then costs `e H e^T` on its own; so the outputs of a row are
quantized in groups one after the other, and what earlier groups did wrong moves the
targets of later ones to where it costs least. Outputs that do alike (as those of one
attention head) are put in different groups: group `g` of `G` is outputs `g`, `g + G`,
`g + 2 G`, ...

Source: two-sided feedback as in YAQA (arXiv 2505.22988); groups, so that a trellis runs
along the outputs of each, are an addition.
"""

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxcompress.calibration.error_feedback import shrunk
from jaxcompress.calibration.moments import Moments, require
from jaxcompress.coding.levels import trellis
from jaxcompress.coding.levels.shrinkage import shrink_to_mean

SHRINKAGES = 0.1, 0.2, 0.35, 0.5, 0.7, 1.0  # towards the diagonal, to choose from
STEADY = 0.1  # of the mean curvature, added to each
LARGE = 1024  # outputs: shrinkage is chosen by fewer slices
GROUP = 48  # places of a walk in a group, about: each begins with little choice


class OutputFeedback(NamedTuple):
    """Feedback matrices: how errors of one group of outputs move the targets of later
    ones.

    Args:
      curvatures: float64 `[outputs]`, in natural order: what an output's error costs
        once later groups have compensated it.
      matrix: float32 `[outputs, outputs]`, the joint curvatures, group after group.
      moves: float32 `[groups, outputs, outputs / groups]`: errors of all outputs, in
        that order, times this is what the targets of a group move down by.
    """

    curvatures: np.ndarray
    matrix: np.ndarray
    moves: np.ndarray


def output_costs(
    moments: Moments | None, x: jax.Array, method: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the cost of an error of each output, and joint curvatures where they are
    of use.

    Raises as `require`, and ValueError for joint curvatures that are not positive
    definite.

    Returns:
      Costs float64 `[slices, outputs]`, feedback allowed for, None where moments do not
      know them; and joint curvatures `[slices, outputs, outputs]`, or None.
    """
    count, outputs = math.prod(x.shape[:-2]), x.shape[-1]
    if getattr(moments, "curvatures", None) is None:
        return None, None
    checked = require(moments, x, method, fields=("curvatures",))
    costs = np.asarray(checked.curvatures, np.float64).reshape(count, outputs)
    if checked.joint_curvatures is None:
        return costs, None
    require(moments, x, method, fields=("joint_curvatures",))
    joint = np.asarray(checked.joint_curvatures).reshape(count, outputs, outputs)
    if count_groups(outputs) == 1 or not joint.diagonal(0, 1, 2).any(axis=1).all():
        return costs, None
    return np.stack([output_feedback(each).curvatures for each in joint]), joint


def count_groups(outputs: int) -> int:
    """Return groups that outputs are split into; 1 where no split fits their walks."""
    count, places = trellis.walks(outputs)
    if count * places != outputs:
        return 1
    sizes = [n for n in range(GROUP // 2, 2 * GROUP + 1) if places % n == 0]
    best = min(sizes, key=lambda n: abs(math.log(n / GROUP)), default=places)
    return places // best


_one_at_a_time = threading.Lock()  # the linear algebra has threads of its own


def output_feedback(joint: np.ndarray) -> OutputFeedback:
    """Return feedback for joint curvatures `[outputs, outputs]`, symmetric and not all
    zero.

    Raises ValueError where they are not positive definite.
    """
    with _one_at_a_time:
        return _feedback(joint)


def _feedback(joint: np.ndarray) -> OutputFeedback:
    joint = np.asarray(joint, np.float64)
    outputs = len(joint)
    groups = count_groups(outputs)
    alone = np.diagonal(joint)
    order = np.arange(outputs).reshape(-1, groups).T.reshape(-1)
    steady = STEADY * alone.mean()
    matrix = joint[np.ix_(order, order)]
    matrix[np.diag_indices(outputs)] += steady
    # matrix = root root^T, upper triangular: later outputs have compensated errors.
    try:
        root = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "joint curvatures that are not positive definite; measure them with "
            "measure_curvatures, or leave them out"
        ) from error
    size = outputs // groups
    moves = np.zeros((groups, outputs, size))
    curvatures = np.empty(outputs)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        own = root[part, part]
        before = root[: part.start, part]
        moves[group, : part.start] = np.linalg.solve(own.T, before.T).T
        # What was added for steadiness is no cost.
        curvatures[order[part]] = np.square(own).sum(axis=1) - steady
    curvatures = np.maximum(curvatures, 1e-3 * steady)
    return OutputFeedback(
        curvatures, matrix.astype(np.float32), moves.astype(np.float32)
    )


def choose_shrinkage(halves: Sequence[np.ndarray]) -> float:
    """Return the shrinkage with which the curvatures of one half serve the other best.

    1, no feedback at all, is among those that are tried: what was measured on too few
    tokens does no harm.

    Args:
      halves: two of `[slices, outputs, outputs]`, measured on two sets of tokens. Some
        slices are enough to choose by.
    """
    count, outputs, _ = halves[0].shape
    some = np.linspace(0, count - 1, min(count, 4 if outputs <= LARGE else 1))
    pairs = [[half[i] for half in halves] for i in some.astype(int)]
    pairs = [pair for pair in pairs if all(half.diagonal().any() for half in pair)]

    def cost(measured: np.ndarray, held: np.ndarray, shrinkage: float) -> float:
        feedback = output_feedback(shrunk(measured, shrinkage))
        groups, _, size = feedback.moves.shape
        order = np.arange(outputs).reshape(-1, groups).T.reshape(-1)
        # Errors e of all outputs, group after group, are those before feedback, q, less
        # e times the moves: e = q T.
        solution = np.eye(outputs)
        for group in range(1, groups):
            start = group * size
            part = feedback.moves[group, :start]
            solution[:start, start : start + size] = -solution[:start, :start] @ part
        held = np.asarray(held, np.float64)[np.ix_(order, order)]
        counts = np.einsum("ij,ij->i", solution @ held, solution)
        costs = shrink_to_mean(feedback.curvatures[order], np)
        return float(np.log(costs).mean() + np.log((counts / costs).mean()))

    def total(shrinkage: float) -> float:
        return sum(cost(a, b, shrinkage) + cost(b, a, shrinkage) for a, b in pairs)

    return min(SHRINKAGES, key=total) if pairs else 1.0


def stretched(feedback: OutputFeedback, factors: np.ndarray) -> OutputFeedback:
    """Return the feedback for errors of `weights / factors`; factors `[outputs]`, in
    order.
    """
    groups = len(feedback.moves)
    by_group = factors.reshape(-1, groups).T
    flat = by_group.reshape(-1)
    return OutputFeedback(
        feedback.curvatures * factors**2,
        feedback.matrix * flat[:, None] * flat,
        feedback.moves * flat[:, None] / by_group[:, None],
    )

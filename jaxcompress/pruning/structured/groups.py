"""Groups: axes of several leaves that are one dimension, and its units."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from jaxcompress import checks
from jaxcompress.tree.names import match

Member = tuple[str, int] | tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes of several leaves that share one dimension, whose units are removed
    together.

    Args:
      members: `(pattern, axis)`: the leaves whose names the pattern fully matches, and
        which axis of them is the dimension (a negative one counts from the end). Or
        `(pattern, axis, repeats)`, where the axis holds the dimension several times
        over, one after the other: the inputs of a layer after an image is flattened,
        its places before its channels.
      units: how many there are; each owns equally many consecutive indices, in every
        leaf its own number (a key/value head, and the queries that share it). None:
        each index is a unit.

    Example:
      >>> members = [(".*/(gate|up)_proj/kernel", 1), (".*/down_proj/kernel", 0)]
      >>> neurons = jc.structured.Group(members)
    """

    members: tuple[Member, ...]
    units: int | None = None


class Place(NamedTuple):
    """An axis of one leaf in a group, `repeats` times `units` times `size` long."""

    name: str
    axis: int
    repeats: int
    units: int
    size: int

    @property
    def table(self) -> np.ndarray:
        """The indices that each unit owns, int32 `[units, repeats * size]`."""
        shape = (self.repeats, self.units, self.size)
        indices = np.arange(self.repeats * self.units * self.size, dtype=np.int32)
        return indices.reshape(shape).swapaxes(0, 1).reshape(self.units, -1)

    def indices(self, keep: np.ndarray) -> np.ndarray:
        """Return the indices of the units `keep`, in order."""
        return np.sort(self.table[keep].ravel())


Groups = Mapping[str, Group | Sequence[Member]] | Group | Sequence[Member]


def named_groups(groups: Groups) -> dict[str, Group]:
    """Return groups by name; one that is not in a mapping is called "".

    Raises ValueError on a group without members, TypeError on one of another form.
    """
    if not isinstance(groups, Mapping):
        groups = {"": groups}
    groups_by_name = {}
    for label, group in groups.items():
        if not isinstance(group, Group):
            if isinstance(group, str) or not isinstance(group, Sequence):
                raise TypeError(
                    f"{_said(label)} is a Group or a list of (pattern, axis), not "
                    f"{group!r}"
                )
            group = Group(tuple(tuple(member) for member in group))
        for member in group.members:
            whole = all(isinstance(number, int) for number in member[1:])
            if len(member) not in (2, 3) or not isinstance(member[0], str) or not whole:
                raise TypeError(
                    f"{_said(label)}: {member!r} is not (pattern, axis) or (pattern, "
                    "axis, repeats)"
                )
        if not group.members:
            raise ValueError(f"{_said(label)} has no members; list (pattern, axis)")
        groups_by_name[label] = group
    return groups_by_name


def find_places(
    shapes: Mapping[str, tuple[int, ...]], group: Group, label: str
) -> list[Place]:
    """Return every axis of every leaf that belongs to a group.

    Args:
      shapes: of all leaves, by name.
      group: as declared.
      label: name of the group, for messages.

    Raises:
      ValueError: a pattern that matches nothing, an axis that is not there or is listed
        twice, or axes whose lengths cannot be one dimension; the message names two
        leaves that disagree.
    """
    axes: dict[tuple[str, int], int] = {}
    for pattern, axis, *rest in group.members:
        try:
            names = match(pattern, shapes)
        except ValueError as error:
            raise ValueError(f"{_said(label)}: {error}") from error
        for name in names:
            ndim = len(shapes[name])
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"{_said(label)}: {name} of shape {shapes[name]} has no axis {axis}"
                )
            if (name, axis % ndim) in axes:
                raise ValueError(
                    f"{_said(label)}: axis {axis} of {name} is listed twice; let one "
                    "pattern match it"
                )
            axes[name, axis % ndim] = rest[0] if rest else 1
    places: list[Place] = []
    for (name, axis), repeats in axes.items():
        length, units = shapes[name][axis], group.units
        if units is None:  # one for each index of the first leaf
            units = places[0].units if places else length // max(repeats, 1)
        owned = repeats * units
        size = length // owned if owned > 0 else 0
        if size < 1 or size * owned != length or (group.units is None and size > 1):
            message = f"{_said(label)}: {name} has {length} along axis {axis}"
            if group.units is not None:
                message += f", no multiple of {units} units"
            if repeats != 1:
                message += f" that holds the dimension {repeats} times"
            if places:
                first, at, *_ = places[0]
                message += (
                    f", and {first} has {shapes[first][at]} along axis {at}: they "
                    "cannot share one dimension"
                )
            raise ValueError(
                f"{message}; correct the patterns, the axes or the number of units"
            )
        places.append(Place(name, axis, repeats, units, size))
    return places


def check_keep(keep: Any, units: int, label: str) -> np.ndarray:
    """Return the indices of the units that stay, int32 `[kept]`, once they are sound.

    Raises:
      ValueError: none, out of range, out of order, or given twice.
      TypeError: not integers, or a tracer: how many stay decides shapes.
    """
    if isinstance(keep, Tracer):
        raise TypeError(
            f"{_said(label)}: which units stay decides shapes, so it must be known "
            "outside jit, vmap or scan; pass a list or a NumPy array"
        )
    keep = np.asarray(keep)
    if not keep.size:
        raise ValueError(f"{_said(label)}: none of {units} units is kept; keep one")
    if keep.ndim != 1 or not np.issubdtype(keep.dtype, np.integer):
        raise TypeError(
            f"{_said(label)}: the units to keep are a list of integers, not "
            f"{keep.dtype} of shape {keep.shape}; of a boolean mask take "
            "np.flatnonzero"
        )
    if keep.min() < 0 or keep.max() >= units:
        raise ValueError(
            f"{_said(label)}: units to keep are {keep.min()} to {keep.max()}, and "
            f"there are {units}, from 0 to {units - 1}"
        )
    if np.any(np.diff(keep) <= 0):
        raise ValueError(
            f"{_said(label)}: units to keep must be in order, each once; pass "
            "np.unique(keep)"
        )
    return keep.astype(np.int32)


def choose_units(
    scores: Any, sparsity: float, *, scope: str = "group"
) -> dict[str, np.ndarray] | np.ndarray:
    """Choose the units of highest score, sorted: those that `remove_units` is to keep.

    Args:
      scores: `[units]`, or such by the names of groups (`score_units`); larger for
        units that matter more. Of equal ones the first stay.
      sparsity: fraction of the units to drop, at least 0 and below 1, rounded; every
        group keeps one unit at least.
      scope: "group": the same fraction of each. "global": the units of all groups
        compete, so their scores must be comparable.

    Raises:
      ValueError: an option out of range, scores that are NaN or infinite.

    Example:
      >>> jc.structured.choose_units(jnp.arange(4.0), sparsity=0.5).tolist()
      [2, 3]
    """
    one = not isinstance(scores, Mapping)
    arrays = {
        label: np.asarray(values, np.float64)
        for label, values in ({"": scores} if one else scores).items()
    }
    dropped = "a sparsity (the fraction to drop)"
    checks.fraction("choose_units", dropped, sparsity, zero=True)
    checks.one_of("choose_units", "scope", scope, ("group", "global"))
    for label, values in arrays.items():
        if values.ndim != 1 or not values.size or not np.all(np.isfinite(values)):
            raise ValueError(
                f"{_said(label)}: scores are finite numbers [units], these have shape "
                f"{values.shape}, {np.sum(~np.isfinite(values))} not finite"
            )
    if scope == "group":
        chosen = {
            label: _best(values, max(1, round((1 - sparsity) * len(values))))
            for label, values in arrays.items()
        }
    else:
        sizes = [len(values) for values in arrays.values()]
        pooled = np.concatenate([_first_kept(values) for values in arrays.values()])
        best = _best(pooled, max(len(sizes), round((1 - sparsity) * sum(sizes))))
        stays = np.isin(np.arange(len(pooled)), best)
        parts = np.split(stays, np.cumsum(sizes)[:-1])
        chosen = {
            label: np.flatnonzero(part)
            for label, part in zip(arrays, parts, strict=True)
        }
    return chosen[""] if one else chosen


def _best(values: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-values, kind="stable")[:count])


def _first_kept(values: np.ndarray) -> np.ndarray:
    """Score of which the first of the best is infinite, so that it stays."""
    values = values.copy()
    values[np.argmax(values)] = np.inf
    return values


def _said(label: str) -> str:
    return f"group {label!r}" if label else "the group"

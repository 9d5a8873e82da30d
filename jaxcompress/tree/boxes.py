"""Flax's own boxes around parameters: axis names for sharding."""

from typing import Any

import flax.linen as nn

TYPES = {
    "Partitioned": nn.Partitioned,
    "LogicallyPartitioned": nn.LogicallyPartitioned,
}


def describe(box: Any, name: str) -> tuple[str, list[Any]]:
    """Describe a box: its type, and the names of its axes as JSON knows them.

    Raises:
      TypeError: a box of another type; says how to remove it.
    """
    kind = type(box).__name__
    if TYPES.get(kind) is not type(box):
        raise TypeError(
            f"{name} is in a box of {type(box)}; files keep "
            f"{' and '.join(sorted(TYPES))}. Replace it by its value first"
        )
    names = [list(axis) if isinstance(axis, tuple) else axis for axis in box.names]
    return kind, names


def make(kind: str, names: list[Any], value: Any) -> Any:
    """Rebuild the box that `describe` described, around a value, without a mesh."""
    axes = tuple(tuple(axis) if isinstance(axis, list) else axis for axis in names)
    return TYPES[kind](value, names=axes)

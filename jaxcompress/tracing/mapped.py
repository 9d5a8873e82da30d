"""Axes along which lifted transforms of Flax map modules, as Flax itself tells."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcompress.tree.leaf import Leaf

Axes = dict[str, list[int]]  # axes of the original weight, by its name


@dataclasses.dataclass(frozen=True)
class _Names:
    """A name and where its axes are noted; equal to itself alone, as jit wants."""

    name: str
    sliced: Axes

    def __hash__(self) -> int:
        return id(self.sliced)

    def __eq__(self, other: Any) -> bool:
        return self.name == other.name and self.sliced is other.sliced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Noted(Leaf):
    """An array that notes along which of its axes `nn.vmap` and `nn.scan` slice it.

    `axes` are those of the original that are left.
    """

    value: jax.Array
    axes: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    names: _Names = dataclasses.field(metadata={"static": True})

    def materialize(self) -> jax.Array:
        return self.value

    def add_axis(self, index: int, params: dict) -> Leaf:
        index %= len(self.axes) + 1
        axes = (*self.axes[:index], None, *self.axes[index:])
        return dataclasses.replace(self, axes=axes)

    def remove_axis(self, index: int, params: dict) -> Leaf:
        index %= len(self.axes)
        noted = self.names.sliced.setdefault(self.names.name, [])
        axis = self.axes[index]
        if axis is not None and axis not in noted:
            noted.append(axis)
        axes = self.axes[:index] + self.axes[index + 1 :]
        return dataclasses.replace(self, axes=axes)


def mapped_axes(
    function: Callable[..., Any], weights: Mapping[str, Any], arguments: Any
) -> Axes:
    """Return the axes along which lifted transforms slice each weight.

    Computes nothing. Empty where the function takes nothing but arrays.
    """
    sliced: Axes = {}
    shapes = {
        name: Noted(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            tuple(range(len(x.shape))),
            _Names(name, sliced),
        )
        for name, x in weights.items()
    }
    # What fails here ran on arrays: such a function has no lifted transform to ask.
    with contextlib.suppress(Exception):
        jax.eval_shape(function, shapes, arguments)
    return sliced

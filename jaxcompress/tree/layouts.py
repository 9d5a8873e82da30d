"""Which axes of a kernel are stacked layers, inputs and outputs."""

import dataclasses
import math
from typing import Any

import jax

from jaxcompress.tree.leaves import Leaf, Reshaped


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of one kernel: `stack` (layers), `inputs` (contracted), `outputs`.

    Non-negative axes of the array as its layer stores it; together they are all axes.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


DENSE = Layout((), (0,), (1,))  # [inputs, outputs]
ROWS = Layout((), (1,), (0,))  # an embedding [rows, features]: blocks along features


def check_layout(name: str, shape: tuple[int, ...], layout: Layout) -> None:
    """Raises ValueError where a layout does not fit an array, naming the leaf."""
    axes = sorted(layout.stack + layout.inputs + layout.outputs)
    if axes != list(range(len(shape))) or not layout.inputs or not layout.outputs:
        raise ValueError(
            f"{name}: {layout} does not cover the axes of shape {shape} once each; "
            "make it with layout(model, params, batch)"
        )
    if layout.stack != tuple(range(len(layout.stack))):
        raise ValueError(
            f"{name}: stack axes {layout.stack}; stacked layers must lie along axis 0. "
            "Use variable_axes={'params': 0} in nn.scan or nn.vmap"
        )


def matricize(x: jax.Array, layout: Layout) -> jax.Array:
    """The array as `[..., inputs, outputs]`, stack axes first."""
    shape = [x.shape[axis] for axis in layout.stack]
    for axes in (layout.inputs, layout.outputs):
        shape.append(math.prod(x.shape[axis] for axis in axes))
    return x.transpose(layout.stack + layout.inputs + layout.outputs).reshape(shape)


def restore(leaf: Any, shape: tuple[int, ...], layout: Layout) -> Leaf | jax.Array:
    """The leaf of a matricized array of `shape`, standing in its original shape."""
    order = layout.inputs + layout.outputs
    stacked = len(layout.stack)
    if len(order) == 2 and order == (stacked, stacked + 1):
        return leaf
    back = tuple(order.index(axis) - len(order) for axis in range(stacked, len(shape)))
    return Reshaped(leaf, sizes=tuple(shape[axis] for axis in order), order=back)

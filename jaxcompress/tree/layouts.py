"""Which axes of a kernel are stacked layers, inputs and outputs."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from jaxcompress.tree.leaves import Arithmetic, Leaf, Reshaped, contract


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


class Product(NamedTuple):
    """A product along some axes of a stored kernel, as one with a stored matrix."""

    weight: Leaf  # [inputs, outputs]
    inputs: tuple[int, ...]  # which contracted axis each axis of the inputs is
    sizes: tuple[int, ...]  # that the outputs unfold into
    outputs: tuple[int, ...]  # which of these each other axis of the kernel is

    def multiply(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """`x` `[..., *contracted axes]` to `[..., *other axes]`, float32 or wider."""
        lead = x.ndim - len(self.inputs)
        x = x.transpose(*range(lead), *(lead + axis for axis in self.inputs))
        y = contract(x.reshape((*x.shape[:lead], -1)), self.weight, how)
        y = y.reshape(x.shape[:lead] + self.sizes)
        return y.transpose(*range(lead), *(lead + axis for axis in self.outputs))


def product(kernel: Leaf, axes: tuple[int, ...]) -> Product | None:
    """The product that contracts these axes of a kernel; None if it needs the array.

    Args:
      kernel: without stack axes.
      axes: non-negative, in the order in which the other operand has them.
    """
    if not isinstance(kernel, Reshaped):
        if len(kernel.shape) != 2 or axes != (0,):
            return None
        return Product(kernel, (0,), kernel.shape[1:], (0,))
    count, total = len(axes), len(kernel.sizes)
    where = [total + axis for axis in kernel.order]  # of each axis, once unfolded
    inputs = [where[axis] for axis in axes]
    folded = math.prod(kernel.sizes[:count])
    matrix = kernel.inner.shape
    if sorted(inputs) != list(range(count)) or matrix[0] != folded or len(matrix) != 2:
        return None
    return Product(
        kernel.inner,
        tuple(inputs.index(i) for i in range(count)),
        kernel.sizes[count:],
        tuple(place - count for axis, place in enumerate(where) if axis not in axes),
    )

"""Layouts: which axes of a kernel are stacked layers, inputs and outputs."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from jaxcompress.tree.generic_leaves import Reshaped
from jaxcompress.tree.leaf import Arithmetic, Leaf, contract


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of one kernel: `stack` (layers), `inputs` (contracted), `outputs`.

    Non-negative axes of the array as its layer stores it; together they are all axes.
    `Moments` hold the form of `trailing`, without the stack and with negative axes.

    Example:
      >>> jc.Layout(stack=(), inputs=(0,), outputs=(1, 2))
      Layout(stack=(), inputs=(0,), outputs=(1, 2))
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


DENSE = Layout((), (0,), (1,))  # [inputs, outputs]
ROWS = Layout((), (1,), (0,))  # an embedding [rows, features]: blocks along features


def check_layout(name: str, shape: tuple[int, ...], layout: Layout) -> None:
    """Raise ValueError where a layout does not fit an array, naming the leaf."""
    axes = sorted(layout.stack + layout.inputs + layout.outputs)
    if axes != list(range(len(shape))) or not layout.inputs or not layout.outputs:
        raise ValueError(
            f"{name}: {layout} does not cover the axes of shape {shape} once each; "
            "make it with find_layouts(model, params, batch)"
        )


def trailing(layout: Layout) -> Layout:
    """Return the layout of one slice of the stack, with negative axes.

    It stays true when stack axes are added, or sliced by `vmap`, `scan` or indexing.
    Stack axes that do not lead are part of it.
    """
    count = len(layout.stack) + len(layout.inputs) + len(layout.outputs)
    negative = lambda axes: tuple(a if a < 0 else a - count for a in axes)  # noqa: E731
    stack = () if is_leading(layout.stack) else negative(layout.stack)
    return Layout(stack, negative(layout.inputs), negative(layout.outputs))


def is_leading(stack: tuple[int, ...]) -> bool:
    """Return whether stack axes precede all others, in order."""
    return stack == tuple(range(len(stack)))


def leading(layout: Layout, ndim: int) -> Layout:
    """Return the layout of an array of `ndim` axes: the inverse of `trailing`.

    Axes before those that the layout names are stack axes.
    """
    slice_ = trailing(layout)
    count = len(slice_.stack) + len(slice_.inputs) + len(slice_.outputs)
    positive = lambda axes: tuple(a + ndim for a in axes)  # noqa: E731
    stack = (*range(ndim - count), *positive(slice_.stack))
    return Layout(stack, positive(slice_.inputs), positive(slice_.outputs))


def choose_layout(
    name: str,
    shape: tuple[int, ...],
    requested: Layout | None = None,
    moments: Any = None,
    *,
    embedding: bool = False,
) -> Layout:
    """Return the layout of a leaf: the one given, else its moments', else by its name.

    Only a matrix is understood by its name: `[inputs, outputs]`, an embedding
    `[rows, features]`.

    Args:
      name: of the leaf, for messages.
      shape: of the array as its layer stores it.
      given: what the caller passed for this leaf.
      moments: `Moments` of this leaf, which may know their layout.
      embedding: the name says that it is an embedding.

    Raises:
      ValueError: the layout given and the moments' differ, a layout does not fit the
        shape, or none is known.
    """
    seen = getattr(moments, "layout", None)
    if (
        requested is not None
        and seen is not None
        and trailing(requested) != trailing(seen)
    ):
        raise ValueError(
            f"{name}: the layout given is {requested}, but the moments were collected "
            f"with {leading(seen, len(shape))}; leave it out, or collect the moments "
            "with the model that uses the weight as the layout says"
        )
    layout = requested
    if layout is None and seen is not None:
        layout = leading(seen, len(shape))
    if layout is None and len(shape) == 2:
        layout = ROWS if embedding else DENSE
    if layout is None:
        raise ValueError(
            f"{name}: shape {shape} has {len(shape)} axes, and which are inputs, "
            "outputs or stacked layers is unknown; pass layouts=find_layouts(model, "
            f"params, batch), or {suggestion(name, shape)}"
        )
    check_layout(name, shape, layout)
    return layout


def suggestion(name: str, shape: tuple[int, ...]) -> str:
    """Return the `layouts=` to write for a weight whose inputs precede its outputs."""
    axes = range(len(shape))
    guess = Layout(tuple(axes[:-2]), (axes[-2],), (axes[-1],))
    return f"layouts={{{name!r}: jc.{guess}}} if its axes are those"


def leaf_layout(leaf: Any) -> Layout:
    """Return the layout, as of `trailing`, along whose axes a leaf was compressed."""
    if not isinstance(leaf, Reshaped):
        return Layout((), (-2,), (-1,))
    inputs, count = leaf.inner.shape[-2], 0
    while count < len(leaf.sizes) and math.prod(leaf.sizes[:count]) != inputs:
        count += 1
    axis = {place: i - len(leaf.order) for i, place in enumerate(leaf.order)}
    each = tuple(axis[i - len(leaf.sizes)] for i in range(len(leaf.sizes)))
    if not leaf.stack or leaf.inner.ndim - 2 != len(leaf.stack):
        return Layout((), each[:count], each[count:])
    ndim = len(leaf.shape)
    others = [axis for axis in range(ndim) if axis not in leaf.stack]
    place = lambda axes: tuple(others[axis] - ndim for axis in axes)  # noqa: E731
    stack = tuple(axis - ndim for axis in leaf.stack)
    return Layout(stack, place(each[:count]), place(each[count:]))


def with_layout(moments: Any, layout: Layout | None) -> Any:
    """Return the moments with another layout; what has none is returned as it is."""
    if getattr(moments, "layout", layout) == layout:
        return moments
    return dataclasses.replace(moments, layout=layout)


def matricize(x: jax.Array, layout: Layout) -> jax.Array:
    """Return the array as `[..., inputs, outputs]`, stack axes first."""
    shape = [x.shape[axis] for axis in layout.stack]
    for axes in (layout.inputs, layout.outputs):
        shape.append(math.prod(x.shape[axis] for axis in axes))
    return x.transpose(layout.stack + layout.inputs + layout.outputs).reshape(shape)


def restore(leaf: Any, shape: tuple[int, ...], layout: Layout) -> Leaf | jax.Array:
    """Return leaf of a matricized array of `shape`, in its original shape."""
    order = layout.inputs + layout.outputs
    if len(order) == 2 and layout.stack + order == tuple(range(len(shape))):
        return leaf
    others = [axis for axis in range(len(shape)) if axis not in layout.stack]
    back = tuple(order.index(axis) - len(order) for axis in others)
    sizes = tuple(shape[axis] for axis in order)
    stack = () if is_leading(layout.stack) else layout.stack
    return Reshaped(leaf, sizes=sizes, order=back, stack=stack)


class Product(NamedTuple):
    """A product along some axes of a stored kernel, as one with a stored matrix."""

    weight: Leaf  # [inputs, outputs]
    inputs: tuple[int, ...]  # which contracted axis each axis of the inputs is
    sizes: tuple[int, ...]  # that the outputs unfold into
    outputs: tuple[int, ...]  # which of these each other axis of the kernel is

    def multiply(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Multiply `x` `[..., *contracted axes]` into `[..., *other axes]`, float32 or
        wider.
        """
        lead = x.ndim - len(self.inputs)
        x = x.transpose(*range(lead), *(lead + axis for axis in self.inputs))
        y = contract(x.reshape((*x.shape[:lead], -1)), self.weight, how)
        y = y.reshape(x.shape[:lead] + self.sizes)
        return y.transpose(*range(lead), *(lead + axis for axis in self.outputs))


def product(kernel: Leaf, axes: tuple[int, ...]) -> Product | None:
    """Return product that contracts these axes of a kernel; None if it needs the array.

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

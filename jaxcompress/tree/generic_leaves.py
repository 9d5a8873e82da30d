"""Generic leaves, which every room shares: reshaped, mixed and summed weights."""

import dataclasses
import functools
import math
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.tree.leaf import (
    Arithmetic,
    Leaf,
    contract,
    dense,
    dense_cost,
    is_leaf,
    leaf,
    product_cost,
    static,
    take_columns,
)


@leaf
class Reshaped(Leaf):
    """A matricized weight in the shape its layer wants.

    Invariant: `inner` is `[..., inputs, outputs]`; its last two axes unfold to the
    `sizes` of inputs then outputs, which `order` (negative axes) transposes. Where
    `inner` has its stack axes, they are the axes `stack` of the whole; where it lost
    them, sliced by `scan`, `stack` means nothing.

    Example:
      >>> kernel = params["layer_0"]["attention"]["q_proj"]["kernel"]
      >>> small = jc.compress(params, "symmetric(bits=4)")
    """

    inner: Any
    sizes: tuple[int, ...] = static()  # unfolded input sizes, then output sizes
    order: tuple[int, ...] = static()  # axis of the unfolded array, per final axis
    stack: tuple[int, ...] = static(default=())  # axes; (): the leading ones

    weights: ClassVar[tuple[str, ...]] = ("inner",)

    @property
    def shape(self) -> tuple[int, ...]:
        stack = self.inner.shape[:-2]
        shape = [self.sizes[axis] for axis in self.order]
        for axis, size in sorted(zip(self._stack(), stack, strict=True)):
            shape.insert(axis, size)
        return tuple(shape)

    def _stack(self) -> tuple[int, ...]:
        count = len(self.inner.shape) - 2
        return self.stack if len(self.stack) == count else tuple(range(count))

    @property
    def dtype(self) -> np.dtype:
        return self.inner.dtype

    def materialize(self) -> jax.Array:
        matrix = dense(self.inner)
        stack = matrix.shape[:-2]
        unfolded = matrix.reshape(stack + self.sizes)
        axes = tuple(range(len(stack)))
        x = unfolded.transpose(axes + tuple(unfolded.ndim + a for a in self.order))
        return jnp.moveaxis(x, axes, self._stack())

    def add_axis(self, index: int, params: dict) -> Leaf:
        """Undo `remove_axis`: the stack axis is stored first."""
        if index == 0:
            return super().add_axis(index, params)
        stack = (index % (len(self.order) + 1),)
        return dataclasses.replace(_moved(self, index, 0), stack=stack)

    def remove_axis(self, index: int, params: dict) -> Leaf:
        """Return the parts as `scan` or `vmap` along axis `index` will slice them."""
        if index == 0 and not self.stack:
            return super().remove_axis(index, params)
        index %= len(self.shape)
        if index not in self.stack:
            raise ValueError(
                f"a weight stacked along axes {self.stack or (0,)} is sliced along "
                f"axis {index}; compress it with layouts=find_layouts(model, params, "
                "batch) of the model that slices it"
            )
        left = tuple(a - (a > index) for a in self.stack if a != index)
        inner = dataclasses.replace(self, stack=left)
        return _sliced_at(inner, self.stack.index(index), index)

    def take_rows(self, indices: jax.Array) -> jax.Array:
        if self.order != (-1, -2):
            return super().take_rows(indices)
        return jnp.moveaxis(take_columns(self.inner, indices), 0, -1)


def _moved(leaf: Leaf, source: int, to: int) -> Leaf:
    """Return the leaf with axis `source` of each part moved; what is coded is decoded
    first.

    Codes of a coded array have parts with fewer axes, which have no such axis.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x, source, to), _decoded(leaf))


def _decoded(leaf: Leaf) -> Leaf:
    few = lambda x: is_leaf(x) and x.entropy_coded  # noqa: E731
    return jax.tree.map(dense, leaf, is_leaf=few)


def _sliced_at(leaf: Leaf, source: int, to: int) -> Leaf:
    """Return the leaf with axis `source` of each part where axis `to` will be sliced.

    Parts of fewer axes get axes of size 1 in between.
    """
    parts, treedef = jax.tree.flatten(_decoded(leaf))
    added = tuple(max(0, to + 1 - x.ndim) for x in parts)
    parts = [
        jnp.moveaxis(jnp.expand_dims(x, range(x.ndim, x.ndim + n)), source, to)
        for x, n in zip(parts, added, strict=True)
    ]
    moved = jax.tree.unflatten(treedef, parts)
    return Widened(moved, added) if any(added) else moved


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Widened(Leaf):
    """A leaf whose parts have axes of size 1 at their ends, inside of a scan.

    Invariant: `added` has their number for each array of `inner`, in order.
    """

    inner: Any
    added: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def materialize(self) -> jax.Array:
        return self._narrow().materialize()

    def remove_axis(self, index: int, params: dict) -> Leaf:
        return self._narrow().remove_axis(index, params)

    def _narrow(self) -> Leaf:
        parts, treedef = jax.tree.flatten(self.inner)
        parts = [
            x.reshape(x.shape[: x.ndim - n])
            for x, n in zip(parts, self.added, strict=True)
        ]
        return jax.tree.unflatten(treedef, parts)


@leaf
class Mixed(Leaf):
    """Two groups of channels of a kernel, one stored finer than the other.

    Invariant: `order` `[..., channels]` is a permutation along `axis`: -1 for outputs,
    -2 for inputs. Channel `order[i]` is slice i of `[kept, rest]`, two weights of any
    leaf type, `[..., inputs, *]` or `[..., *, outputs]`.

    Example:
      >>> jc.mixed_channels(x, bits=4, channels=2).shape
      (64, 64)
    """

    kept: Any
    rest: Any
    order: jax.Array
    axis: int = static(default=-1)

    weights: ClassVar[tuple[str, ...]] = ("kept", "rest")
    integers: ClassVar[tuple[str, ...]] = ("order",)

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, inputs, outputs = self.rest.shape
        channels = self.order.shape[-1]
        if self.axis == -1:
            return (*stack, inputs, channels)
        return (*stack, channels, outputs)

    @property
    def dtype(self) -> np.dtype:
        return self.rest.dtype

    def inner_moments(self, field: str, moments: Any) -> Any:
        """Return the moments of the whole layer for a part of its outputs, None for a
        part of its inputs.
        """
        if self.axis != -1:
            return None
        counts = getattr(moments, "curvatures", None)
        if counts is None:
            return moments
        moments = dataclasses.replace(moments, joint_curvatures=None)
        counts = jnp.take_along_axis(counts, self.order.astype(jnp.int32), axis=-1)
        cut = self.kept.shape[-1]
        part = counts[..., :cut] if field == "kept" else counts[..., cut:]
        return dataclasses.replace(moments, curvatures=part)

    def materialize(self) -> jax.Array:
        rest = dense(self.rest)
        kept = dense(self.kept).astype(rest.dtype)
        both = jnp.concatenate([kept, rest], axis=self.axis)
        where = jnp.argsort(self.order, axis=-1).astype(jnp.int32)
        where = where[..., None, :] if self.axis == -1 else where[..., :, None]
        return jnp.take_along_axis(both, where, axis=self.axis)


@leaf
class Sum(Leaf):
    """A weight that is the sum of its terms, accumulated in float32 or wider.

    Each term multiplies the layer's inputs, and what changes one changes the output by
    as much as if it were alone: it has the moments of the whole.

    Example:
      >>> jc.outliers(x, fraction=0.01).shape
      (64, 64)
    """

    terms: tuple[Any, ...]

    weights: ClassVar[tuple[str, ...]] = ("terms",)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def dtype(self) -> np.dtype:
        return self.terms[0].dtype

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Return terms that are cheaper to multiply than to add up apart, the rest as
        one.
        """
        rows = math.prod(x.shape[:-1])
        apart = [t for t in self.terms if product_cost(t, rows) < dense_cost(t)]
        rest = tuple(t for t in self.terms if all(t is not other for other in apart))
        parts = [contract(x, term, how) for term in apart]
        if rest:
            one = rest[0] if len(rest) == 1 else Sum(rest).unbox()
            parts.append(contract(x, one, how))
        return functools.reduce(operator.add, parts)

    def product_cost(self, rows: int) -> int:
        dense_product = rows * math.prod(self.shape[-2:])
        costs = [(product_cost(t, rows), dense_cost(t)) for t in self.terms]
        joined = any(apart >= build for apart, build in costs)
        return sum(map(min, costs)) + joined * dense_product

    def dense_cost(self) -> int:
        return sum(map(dense_cost, self.terms))

    def materialize(self) -> jax.Array:
        first, *rest = (dense(term) for term in self.terms)
        wide = jnp.promote_types(first.dtype, jnp.float32)
        total = sum((term.astype(wide) for term in rest), first.astype(wide))
        return total.astype(first.dtype)

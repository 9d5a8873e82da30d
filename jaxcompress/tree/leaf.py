"""The leaf protocol: a compressed weight is a pytree node where the array stood.

A leaf type is a frozen dataclass. Its data fields hold arrays, other leaves, or None;
its static fields (`static()`) hold numbers and strings, and only *trailing* sizes and
*negative* axes, so that `scan`, `vmap`, `pmap` or indexing may slice the leading axes
of the data without making them lie.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import meta

from jaxcompress.tree.array_access import ArrayAccess, one_line
from jaxcompress.tree.decoding import decoding
from jaxcompress.tree.products import (
    Arithmetic,
    product_in_tiles,
    tiles_pay,
    wide_product,
)
from jaxcompress.tree.state_dicts import register_state_dict

_REGISTRY: dict[str, type["Leaf"]] = {}
Convolution = Callable[..., jax.Array]

# What a leaf passes through where a layer asks for its array; `running.low_memory` sets
# it for the length of one module call, per thread.
before_use: ContextVar[Callable[["Leaf"], "Leaf"] | None] = ContextVar(
    "before_use", default=None
)


class _Materialized:
    """An attribute of the dense array; a field of the same name takes its place."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, leaf: Any, owner: type) -> Any:
        if leaf is None:
            return self
        return getattr(jax.eval_shape(lambda x: x.materialize(), leaf), self.name)


class Leaf(ArrayAccess, meta.AxisMetadata):
    """What every compressed weight owes: `shape`, `dtype` and `materialize()`.

    Array access (`.T`, `@`, indexing, `np.asarray`) makes the dense array. Subclassing
    Flax's `AxisMetadata` makes an unmodified Linen layer materialize the weight where
    it asks for it (`Scope.param` unboxes), also inside `nn.scan`, `nn.remat` and
    `nn.vmap`.
    """

    lossless: ClassVar[bool] = False  # one array, bit for bit; names stop here
    entropy_coded: ClassVar[bool] = False  # nothing more to gain from coding it
    has_tiles: ClassVar[bool] = False  # whether `tiles` is defined
    weights: ClassVar[tuple[str, ...]] = ()  # fields that are weights themselves
    integers: ClassVar[tuple[str, ...]] = ()  # fields that arithmetic must not change

    def __repr__(self) -> str:
        return one_line(self, self.description())

    def description(self) -> str:
        """Describe the leaf between shape and bytes in `repr`: static fields, by
        default.
        """
        named = ((name, getattr(self, name, None)) for name in static_fields(self))
        return ", ".join(f"{name}={value}" for name, value in named)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array, stack axes included."""
        return jax.eval_shape(lambda leaf: leaf.materialize(), self).shape

    dtype = _Materialized("dtype")  # of the dense array

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def materialize(self) -> jax.Array:
        """Return the dense array; traceable, never needs the host."""
        raise TypeError(f"{type(self).__name__} does not define materialize()")

    def take_rows(self, indices: jax.Array) -> jax.Array:
        """Compute `materialize()[..., indices, :]` of a 2-D leaf; cheaper where a type
        can.
        """
        return jnp.take(self.materialize(), indices, axis=0)

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Compute `x @ materialize()` of a leaf without stack axes, in float32 or
        wider.

        `[..., inputs]` to `[..., outputs]`; `compressed_matmul` calls it in place of a
        layer's product. A type whose parts can be multiplied one after the other
        overrides it, and the costs below.
        """
        if tiles_pay(self.shape) and self.has_tiles:
            return product_in_tiles(x, self.tiles(), self.shape, how)
        return contract(x, self.unbox(), how)

    def tiles(self) -> Callable[[jax.Array, int], jax.Array]:
        """A function of a traced start and a size: these outputs of a 2-D leaf, dense.

        `contract` makes a large weight with it, one tile at a time. What a tile cannot
        be cut from, such as entropy-coded codes, is decoded once, here.
        """
        raise TypeError(f"{type(self).__name__} does not define tiles()")

    def convolve(
        self,
        x: jax.Array,
        convolution: Convolution,
        window: tuple[int, ...],
        how: Arithmetic,
    ) -> jax.Array:
        """Compute `convolution(x, materialize())`, as `contract` computes the product.

        Args:
          x: `[..., channels]`, in the dtype of the computation.
          convolution: the layer's own, `(x, weight, groups=1)`, with any weight
            `[window * channels / groups, features]`.
          window: sizes that the inputs unfold into: of the window, then the channels.
          how: passed on to `contract`.
        """
        del window, how
        return convolution(x, self.unbox())

    def product_cost(self, rows: int) -> int:
        """Return multiplications that `contract` of so many rows takes."""
        return self.dense_cost() + rows * math.prod(self.shape[-2:])

    def dense_cost(self) -> int:
        """Return multiplications in the products that `materialize` takes, of one
        slice.
        """
        return 0

    def inner_moments(self, field: str, moments: Any) -> Any:
        """Return moments of the inputs of weight `field`, given those of this leaf's
        inputs.

        None where they mean nothing any more; a factor of a product overrides it.
        """
        del field
        return moments

    def unbox(self) -> jax.Array:
        """Return the dense array for the layer that asks: Flax calls it, through
        `param`.
        """
        prepare = before_use.get()
        return dense(self if prepare is None else prepare(self))

    def replace_boxed(self, val: Any) -> Any:
        """Return a transformation that writes a value back gets a dense weight."""
        return val

    def add_axis(self, index: int, params: dict) -> "Leaf":
        del params
        _leading_only(self, index)
        return self

    def remove_axis(self, index: int, params: dict) -> "Leaf":
        del params
        _leading_only(self, index)
        return self


def _leading_only(leaf: Leaf, index: int) -> None:
    if index != 0:
        raise ValueError(
            f"a {type(leaf).__name__} of shape {leaf.shape} is sliced along axis "
            f"{index}, but was compressed as if layers lay along axis 0; compress it "
            "with layouts=find_layouts(model, params, batch)"
        )


def static(**options: Any) -> Any:
    """Return a static field of a leaf: number, str, bool, None, or a tuple of these."""
    return dataclasses.field(metadata={"static": True}, **options)


def leaf(cls: type) -> type:
    """Make a class a frozen dataclass and a pytree node, known to files by name."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    known = _REGISTRY.get(cls.__name__)
    if known is not None and known.__qualname__ + known.__module__ != (
        cls.__qualname__ + cls.__module__
    ):
        raise ValueError(f"a leaf type named {cls.__name__} exists: {known}")
    _REGISTRY[cls.__name__] = cls
    register_state_dict(cls)
    return jax.tree_util.register_dataclass(cls)


def leaf_type(name: str) -> type[Leaf]:
    """Return the leaf type of this name, for files; KeyError names the known ones."""
    if name not in _REGISTRY:  # public names are imported when first used
        getattr(importlib.import_module("jaxcompress"), name, None)
    if name not in _REGISTRY:
        raise KeyError(
            f"unknown leaf type {name!r}; known: {', '.join(sorted(_REGISTRY))}. "
            "Import the package that defines it, or update jaxcompress"
        )
    return _REGISTRY[name]


def is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def is_box(x: Any) -> bool:
    """Return whether it is Flax's own metadata around a parameter, as
    `nn.Partitioned`.
    """
    return isinstance(x, meta.AxisMetadata) and not isinstance(x, Leaf)


def is_variable(x: Any) -> bool:
    """Return whether it is an NNX variable, which adds no step to names as a box
    does.
    """
    cls = type(x)
    return hasattr(cls, "get_metadata") and hasattr(cls, "raw_value")


def data_fields(cls: type[Leaf] | Leaf) -> tuple[str, ...]:
    """Return names of the fields that hold arrays or leaves, in order."""
    fields = dataclasses.fields(cls)
    return tuple(f.name for f in fields if not f.metadata.get("static"))


def static_fields(cls: type[Leaf] | Leaf) -> tuple[str, ...]:
    """Return names of the static fields, in order."""
    fields = dataclasses.fields(cls)
    return tuple(f.name for f in fields if f.metadata.get("static"))


def dense(x: Any) -> jax.Array:
    """Return the dense array of a leaf; an array is returned as it is.

    Raises TypeError where arithmetic over the tree made numbers of integer codes.
    """
    if not isinstance(x, Leaf):
        return x
    for name in x.integers:
        dtype = getattr(getattr(x, name), "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{type(x).__name__}.{name} holds {dtype}, not integers: arithmetic "
                "over the tree (an average, a penalty, a cast) reached the parts of a "
                "leaf. Use jc.tree.average or jc.tree.norm, or materialize(params) "
                "first"
            )
    return x.materialize()


def contract(x: jax.Array, weight: Any, how: Arithmetic) -> jax.Array:
    """Compute `x @ weight`, an array or a leaf `[inputs, outputs]`, in float32 or
    wider.

    The weight is read in the dtype of `x`, `[..., inputs]`.
    """
    if hasattr(weight, "contract"):
        return weight.contract(x, how)
    return wide_product(x, weight, how)


def unboxed(x: Any) -> jax.Array:
    """Return array of a leaf for the layer that multiplies by it; an array as it is."""
    return x.unbox() if isinstance(x, Leaf) else x


def product_cost(weight: Any, rows: int) -> int:
    """Return multiplications in the product of so many rows with an array or a leaf."""
    if isinstance(weight, Leaf):
        return weight.product_cost(rows)
    return rows * math.prod(weight.shape[-2:])


def dense_cost(weight: Any) -> int:
    """Return multiplications in the products that make the dense array of a leaf."""
    return weight.dense_cost() if isinstance(weight, Leaf) else 0


def materialize(params: Any) -> Any:
    """Return the same tree with every leaf replaced by its dense array; traceable."""
    with decoding(params):
        return jax.tree.map(dense, params, is_leaf=is_leaf)


def nbytes(params: Any) -> int:
    """Return bytes of the arrays really held, leaves included; works on `eval_shape`
    too.
    """
    arrays = (x for x in jax.tree.leaves(params) if hasattr(x, "dtype"))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


# Generic leaves: structure that every room shares.


@leaf
class Reshaped(Leaf):
    """A matricized weight in the shape its layer wants.

    Invariant: `inner` is `[..., inputs, outputs]`; its last two axes unfold to the
    `sizes` of inputs then outputs, which `order` (negative axes) transposes. Where
    `inner` has its stack axes, they are the axes `stack` of the whole; where it lost
    them, sliced by `scan`, `stack` means nothing.
    """

    inner: Any
    sizes: tuple[int, ...] = static()  # unfolded input sizes, then output sizes
    order: tuple[int, ...] = static()  # axis of the unfolded array, per final axis
    stack: tuple[int, ...] = static(default=())  # axes; (): those in front

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
    def dtype(self) -> Any:
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
        if self.stack != (index % len(self.shape),):
            raise ValueError(
                f"a weight stacked along axes {self.stack or (0,)} is sliced along "
                f"axis {index}; compress it with layouts=find_layouts(model, params, "
                "batch) of the model that slices it"
            )
        return dataclasses.replace(_moved(self, 0, index), stack=())

    def take_rows(self, indices: jax.Array) -> jax.Array:
        if self.order != (-1, -2):
            return super().take_rows(indices)
        return jnp.moveaxis(take_columns(self.inner, indices), 0, -1)


def _moved(leaf: Leaf, source: int, to: int) -> Leaf:
    """Return the leaf with axis `source` of each part moved; what is coded is decoded
    first.

    Codes of a coded array have parts with fewer axes, which have no such axis.
    """
    few = lambda x: is_leaf(x) and x.entropy_coded  # noqa: E731
    parts = jax.tree.map(dense, leaf, is_leaf=few)
    return jax.tree.map(lambda x: jnp.moveaxis(x, source, to), parts)


def take_columns(x: Any, indices: jax.Array) -> jax.Array:
    """Compute `dense(x)[:, indices]`, reading only those columns where the leaf type
    can.
    """
    if hasattr(x, "take_columns"):
        return x.take_columns(indices)
    return jnp.take(dense(x), indices, axis=1)

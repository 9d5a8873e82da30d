"""The leaf protocol: a compressed weight is a pytree node in place of the array.

A leaf type is a frozen dataclass. Its data fields hold arrays, other leaves, or None;
its static fields (`static()`) hold numbers and strings, and only *trailing* sizes and
*negative* axes, so that `scan`, `vmap`, `pmap` or indexing may slice the leading axes
of the data and leave them true.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
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
from jaxcompress.types import Params

T = TypeVar("T", bound="Leaf")
_REGISTRY: dict[str, type["Leaf"]] = {}
Convolution = Callable[..., jax.Array]

# What a leaf passes through where a layer asks for its array; set by
# `running.interception` for the length of one module call, per thread.
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
    """A compressed weight: subclasses provide `shape`, `dtype` and `materialize()`.

    Array access (`.T`, `@`, indexing, `np.asarray`) makes the dense array. Subclassing
    Flax's `AxisMetadata` makes an unmodified Linen layer materialize the weight where
    it asks for it (`Scope.param` unboxes), also inside `nn.scan`, `nn.remat` and
    `nn.vmap`.

    Example:
      >>> leaf = jc.symmetric(x, bits=4)
      >>> isinstance(leaf, jc.Leaf), leaf.shape, leaf.dtype
      (True, (64, 64), dtype('float32'))
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]  # `leaf` makes them
    lossless: ClassVar[bool] = False  # one array, bit for bit; names stop here
    for_files: ClassVar[bool] = True  # False: made for running, never stored
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

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parts, as they are in memory."""
        return nbytes(self)

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
        """Return a function of a traced start and a size: these outputs of a 2-D leaf,
        dense.

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

    def with_parts(self: T, **parts: Any) -> T:
        """Return the leaf with other data fields, as a stage of a recipe makes them; a
        type that then needs fewer of them overrides it.
        """
        return dataclasses.replace(self, **parts)

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

    def remove_axis(self, index: int, params: dict) -> Any:
        """Return what `scan` or `vmap` along axis `index` slices.

        What codes an array without loss is decoded where that is not the first axis.
        """
        del params
        if index and self.lossless:
            return dense(self)
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
    """Declare a static field of a leaf: a number, str, bool, None, or a tuple of these.

    Args:
      options: of `dataclasses.field`, such as `default`.

    Example:
      >>> @jc.leaf
      ... class Shifted(jc.Leaf):
      ...     values: jax.Array
      ...     offset: int = jc.static(default=0)
    """
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def leaf(cls: type[T]) -> type[T]:
    """Register a class as a frozen dataclass and pytree node that files know by name.

    Args:
      cls: subclass of `Leaf` with annotated fields; those of `static()` are metadata.

    Raises:
      ValueError: another leaf type has this name.

    Example:
      >>> @jc.leaf
      ... class Halved(jc.Leaf):
      ...     values: jax.Array
      >>> jax.tree.leaves(Halved(x))[0].shape
      (64, 64)
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    namesake = _REGISTRY.get(cls.__name__)
    if namesake is not None and namesake.__qualname__ + namesake.__module__ != (
        cls.__qualname__ + cls.__module__
    ):
        raise ValueError(f"a leaf type named {cls.__name__} exists: {namesake}")
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


def materialize(params: Params) -> Params:
    """Replace every leaf of a tree by its dense array; traceable.

    A leaf that has several names becomes one array.

    Args:
      params: pytree of arrays and leaves.

    Example:
      >>> dense = jc.materialize(jc.compress(params, "symmetric(bits=8)"))
    """
    arrays: dict[int, tuple[Any, Any]] = {}  # by id of a leaf: the leaf, its array

    def once(x: Any) -> Any:
        if not is_leaf(x):
            return x
        if id(x) not in arrays:
            arrays[id(x)] = x, dense(x)
        return arrays[id(x)][1]

    with decoding(params):
        return jax.tree.map(once, params, is_leaf=is_leaf)


def nbytes(params: Params) -> int:
    """Count the bytes of the arrays really held, leaves included.

    An array that has several names is held once.

    Args:
      params: pytree of arrays and leaves; the result of `eval_shape` serves too.

    Example:
      >>> jc.nbytes(x), jc.nbytes(jc.symmetric(x, bits=4))
      (16384, 2176)
    """
    arrays = [x for x in jax.tree.leaves(params) if hasattr(x, "dtype")]
    held = {id(x): x for x in arrays if isinstance(x, jax.Array | np.ndarray)}
    arrays = [x for x in arrays if id(x) not in held] + list(held.values())
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def take_columns(x: Any, indices: jax.Array) -> jax.Array:
    """Compute `dense(x)[:, indices]`, reading only those columns where the leaf type
    can.
    """
    if hasattr(x, "take_columns"):
        return x.take_columns(indices)
    return jnp.take(dense(x), indices, axis=1)

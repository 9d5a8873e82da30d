"""The leaf protocol: a compressed weight is a pytree node where the array stood.

A leaf type is a frozen dataclass. Its data fields hold arrays, other leaves, or None;
its static fields (`static()`) hold numbers and strings, and only *trailing* sizes and
*negative* axes, so that `scan`, `vmap`, `pmap` or indexing may slice the leading axes
of the data without making them lie.
"""

import dataclasses
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import meta

_REGISTRY: dict[str, type["Leaf"]] = {}

# What a leaf passes through where a layer asks for its array; `running.streaming` sets
# it for the length of one module call, per thread.
before_use: ContextVar[Callable[["Leaf"], "Leaf"] | None] = ContextVar(
    "before_use", default=None
)


class Leaf(meta.AxisMetadata):
    """What every compressed weight owes: `shape`, `dtype` and `materialize()`.

    Subclassing Flax's `AxisMetadata` makes an unmodified Linen layer materialize the
    weight where it asks for it (`Scope.param` unboxes), also inside `nn.scan`,
    `nn.remat` and `nn.vmap`.
    """

    lossless: ClassVar[bool] = (
        False  # stands for one array bit for bit; names stop here
    )
    entropy_coded: ClassVar[bool] = False  # nothing more to gain from coding it
    weights: ClassVar[tuple[str, ...]] = ()  # fields that are weights themselves

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array, stack axes included."""
        return jax.eval_shape(lambda leaf: leaf.materialize(), self).shape

    @property
    def dtype(self) -> Any:
        """Dtype of the dense array."""
        return jax.eval_shape(lambda leaf: leaf.materialize(), self).dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def materialize(self) -> jax.Array:
        """The dense array; traceable, never needs the host."""
        raise TypeError(f"{type(self).__name__} does not define materialize()")

    def take_rows(self, indices: jax.Array) -> jax.Array:
        """`materialize()[..., indices, :]` of a 2-D leaf; cheaper where a type can."""
        return jnp.take(self.materialize(), indices, axis=0)

    def inner_moments(self, field: str, moments: Any) -> Any:
        """Moments of the inputs of weight `field`, given those of this leaf's inputs.

        None where they mean nothing any more; a factor of a product overrides it.
        """
        del field
        return moments

    def unbox(self) -> jax.Array:
        """The dense array for the layer that asks: Flax calls it, through `param`."""
        prepare = before_use.get()
        return (self if prepare is None else prepare(self)).materialize()

    def replace_boxed(self, val: Any) -> Any:
        """A transformation that writes a value back gets a dense weight."""
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
            f"a {type(leaf).__name__} can be stacked along axis 0 only, not {index}; "
            "use variable_axes={'params': 0} in nn.scan or nn.vmap"
        )


def static(**options: Any) -> Any:
    """A static field of a leaf: int, float, str, bool, None, or a tuple of these."""
    return dataclasses.field(metadata={"static": True}, **options)


def leaf(cls: type) -> type:
    """Makes a class a frozen dataclass and a pytree node, known to files by name."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    known = _REGISTRY.get(cls.__name__)
    if known is not None and known.__qualname__ + known.__module__ != (
        cls.__qualname__ + cls.__module__
    ):
        raise ValueError(f"a leaf type named {cls.__name__} exists: {known}")
    _REGISTRY[cls.__name__] = cls
    return jax.tree_util.register_dataclass(cls)


def leaf_type(name: str) -> type[Leaf]:
    """The leaf type of this name, for files; KeyError names the known ones."""
    if name not in _REGISTRY:
        raise KeyError(
            f"unknown leaf type {name!r}; known: {', '.join(sorted(_REGISTRY))}. "
            "Import the package that defines it, or update jaxcompress"
        )
    return _REGISTRY[name]


def is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def is_box(x: Any) -> bool:
    """Whether it is Flax's own metadata around a parameter, as `nn.Partitioned`."""
    return isinstance(x, meta.AxisMetadata) and not isinstance(x, Leaf)


def data_fields(cls: type[Leaf] | Leaf) -> tuple[str, ...]:
    """Names of the fields that hold arrays or leaves, in order."""
    fields = dataclasses.fields(cls)
    return tuple(f.name for f in fields if not f.metadata.get("static"))


def static_fields(cls: type[Leaf] | Leaf) -> tuple[str, ...]:
    """Names of the static fields, in order."""
    fields = dataclasses.fields(cls)
    return tuple(f.name for f in fields if f.metadata.get("static"))


def dense(x: Any) -> jax.Array:
    """The dense array of a leaf; an array is returned as it is."""
    return x.materialize() if isinstance(x, Leaf) else x


def materialize(params: Any) -> Any:
    """The same tree with every leaf replaced by its dense array; traceable."""
    return jax.tree.map(dense, params, is_leaf=is_leaf)


def nbytes(params: Any) -> int:
    """Bytes of the arrays really held, leaves included; works on `eval_shape` too."""
    arrays = (x for x in jax.tree.leaves(params) if hasattr(x, "dtype"))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


# Generic leaves: structure that every room shares.


@leaf
class Reshaped(Leaf):
    """A matricized weight in the shape its layer wants.

    Invariant: `inner` is `[..., inputs, outputs]`; its last two axes unfold to the
    `sizes` of inputs then outputs, which `order` (negative axes) transposes.
    """

    inner: Any
    sizes: tuple[int, ...] = static()  # unfolded input sizes, then output sizes
    order: tuple[int, ...] = static()  # axis of the unfolded array, per final axis

    weights: ClassVar[tuple[str, ...]] = ("inner",)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape[:-2] + tuple(self.sizes[axis] for axis in self.order)

    @property
    def dtype(self) -> Any:
        return self.inner.dtype

    def materialize(self) -> jax.Array:
        matrix = dense(self.inner)
        stack = matrix.shape[:-2]
        unfolded = matrix.reshape(stack + self.sizes)
        axes = tuple(range(len(stack)))
        return unfolded.transpose(axes + tuple(unfolded.ndim + a for a in self.order))

    def take_rows(self, indices: jax.Array) -> jax.Array:
        if self.order != (-1, -2):
            return super().take_rows(indices)
        return jnp.moveaxis(take_columns(self.inner, indices), 0, -1)


def take_columns(x: Any, indices: jax.Array) -> jax.Array:
    """`dense(x)[:, indices]`, reading only those columns where the leaf type can."""
    if hasattr(x, "take_columns"):
        return x.take_columns(indices)
    return jnp.take(dense(x), indices, axis=1)


@leaf
class Mixed(Leaf):
    """Some channels of a kernel kept finer than the others.

    Invariant: `order` `[..., channels]` is a permutation along `axis`: -1 for outputs,
    -2 for inputs. Channel `order[i]` is slice i of `[kept, rest]`, two weights of any
    leaf type, `[..., inputs, *]` or `[..., *, outputs]`.
    """

    kept: Any
    rest: Any
    order: jax.Array
    axis: int = static(default=-1)

    weights: ClassVar[tuple[str, ...]] = ("kept", "rest")

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, inputs, outputs = self.rest.shape
        channels = self.order.shape[-1]
        if self.axis == -1:
            return (*stack, inputs, channels)
        return (*stack, channels, outputs)

    @property
    def dtype(self) -> Any:
        return self.rest.dtype

    def inner_moments(self, field: str, moments: Any) -> Any:
        """Those of the whole layer for a part of its outputs; none for some inputs."""
        del field
        return moments if self.axis == -1 else None

    def materialize(self) -> jax.Array:
        rest = dense(self.rest)
        kept = dense(self.kept).astype(rest.dtype)
        both = jnp.concatenate([kept, rest], axis=self.axis)
        where = jnp.argsort(self.order, axis=-1).astype(jnp.int32)
        where = where[..., None, :] if self.axis == -1 else where[..., :, None]
        return jnp.take_along_axis(both, where, axis=self.axis)


@leaf
class Sum(Leaf):
    """A weight that is the sum of its terms, accumulated in float32 or wider."""

    terms: tuple[Any, ...]

    weights: ClassVar[tuple[str, ...]] = ("terms",)

    def inner_moments(self, field: str, moments: Any) -> None:
        """A term is not fitted to the layer's inputs alone: none."""
        del field, moments

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def dtype(self) -> Any:
        return self.terms[0].dtype

    def materialize(self) -> jax.Array:
        first, *rest = (dense(term) for term in self.terms)
        wide = jnp.promote_types(first.dtype, jnp.float32)
        total = sum((term.astype(wide) for term in rest), first.astype(wide))
        return total.astype(first.dtype)

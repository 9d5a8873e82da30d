"""Leaves that join others: channels kept finer than the rest, and sums of terms."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcompress.tree.leaf import (
    Arithmetic,
    Leaf,
    contract,
    dense,
    dense_cost,
    leaf,
    product_cost,
    static,
)


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
    integers: ClassVar[tuple[str, ...]] = ("order",)

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
    as much as if it stood alone: it has the moments of the whole.
    """

    terms: tuple[Any, ...]

    weights: ClassVar[tuple[str, ...]] = ("terms",)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def dtype(self) -> Any:
        return self.terms[0].dtype

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Return terms that are cheaper to multiply than to add up apart, the rest as
        one.
        """
        rows = math.prod(x.shape[:-1])
        apart = [t for t in self.terms if product_cost(t, rows) < dense_cost(t)]
        rest = tuple(t for t in self.terms if all(t is not other for other in apart))
        total = sum(contract(x, term, how) for term in apart)
        if len(rest) > 1:
            return total + contract(x, Sum(rest).unbox(), how)
        return total + contract(x, rest[0], how) if rest else total

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

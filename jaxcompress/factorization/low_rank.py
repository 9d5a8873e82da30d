"""`LowRank`: a weight as the product of two thin ones."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.moments import Moments
from jaxcompress.tree.leaf import (
    Arithmetic,
    Convolution,
    Leaf,
    contract,
    dense,
    dense_cost,
    leaf,
    product_cost,
    take_columns,
)


class FactoredLeaf(Leaf):
    """A product of factors: multiplied one after another where that is cheaper.

    A type gives `factored_cost` and `contract_factors`; one that convolves by its
    factors overrides `convolve`.
    """

    def factored_cost(self, rows: int) -> int:
        """Return multiplications of so many rows with one factor after another."""
        raise NotImplementedError(f"{type(self).__name__}.factored_cost")

    def contract_factors(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Compute `contract`, one factor after another."""
        raise NotImplementedError(f"{type(self).__name__}.contract_factors")

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Multiply by the factors, or by the array where making it is cheaper."""
        rows = math.prod(x.shape[:-1])
        if self.factored_cost(rows) > super().product_cost(rows):
            return super().contract(x, how)
        return self.contract_factors(x, how)

    def product_cost(self, rows: int) -> int:
        return min(self.factored_cost(rows), super().product_cost(rows))


@leaf
class LowRank(FactoredLeaf):
    """A weight that is a product, summed in float32 or wider.

    Invariant: `left` is `[..., inputs, rank]` and `right` `[..., rank, outputs]`, both
    weights of any leaf type, with the same stack axes. The dtype is that of `left`.

    Example:
      >>> small = jc.svd(x, rank=8)
      >>> small.left.shape, small.right.shape
      ((64, 8), (8, 64))
    """

    left: Any
    right: Any

    weights: ClassVar[tuple[str, ...]] = ("left", "right")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.left.dtype

    @property
    def rank(self) -> int:
        return self.right.shape[-2]

    def inner_moments(self, field: str, moments: Moments) -> Moments:
        """Return the moments of the whole for `left`, None for `right`, whose inputs
        are `x @ left`.

        An error of one of `left`'s outputs is spread by `right` over those of the
        whole, and counts as often as they do then, together.
        """
        counts = moments.curvatures
        if field == "right":
            projected = moments.project(dense(self.left))
            joint = moments.joint_curvatures
            return dataclasses.replace(
                projected, curvatures=counts, joint_curvatures=joint
            )
        if counts is not None:
            spread = jnp.square(dense(self.right).astype(jnp.float32))
            counts = jnp.sum(spread * counts[..., None, :], axis=-1)
        return dataclasses.replace(
            moments, tokens=None, curvatures=counts, joint_curvatures=None
        )

    def materialize(self) -> jax.Array:
        return multiply(dense(self.left), dense(self.right))

    def contract_factors(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        inner = contract(x, self.left, how).astype(x.dtype)
        return contract(inner, self.right, how)

    def convolve(
        self, x: jax.Array, convolution: Convolution, window: tuple[int, ...], how: Any
    ) -> jax.Array:
        """Return a convolution with fewer features, and a product at each of its
        places.
        """
        inputs, outputs = self.shape
        if self.rank * (inputs + outputs) > inputs * outputs:
            return super().convolve(x, convolution, window, how)
        inner = convolution(x, self.left)
        return contract(inner, self.right, how).astype(x.dtype)

    def factored_cost(self, rows: int) -> int:
        return product_cost(self.left, rows) + product_cost(self.right, rows)

    def dense_cost(self) -> int:
        inside = dense_cost(self.left) + dense_cost(self.right)
        return inside + self.rank * math.prod(self.shape[-2:])

    def take_columns(self, indices: jax.Array) -> jax.Array:
        """Compute `materialize()[:, indices]` of a 2-D leaf, from those columns of
        `right`.
        """
        columns = take_columns(self.right, indices)
        flat = columns.reshape((columns.shape[0], -1))
        product = multiply(dense(self.left), flat)
        return product.reshape((product.shape[0], *columns.shape[1:]))


def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    """Compute `left @ right` in float32 or wider, in the dtype of `left`."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    product = jnp.matmul(
        left.astype(wide), right.astype(wide), precision=jax.lax.Precision.HIGHEST
    )
    return product.astype(left.dtype)

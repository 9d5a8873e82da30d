"""Arithmetic over trees whose leaves are arrays and compressed weights."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tree.leaf import dense, is_box, is_leaf
from jaxcompress.types import Params


def norm(params: Params) -> jax.Array:
    """Compute the Euclidean norm of all weights together; traceable.

    A compressed leaf counts as the dense array that it represents, so that codes and
    scales are not summed by themselves. Integer arrays outside of leaves do not count.

    Args:
      params: pytree of arrays and leaves of any shapes.

    Returns:
      A scalar, float32 or wider; 0 for a tree without floating-point arrays.

    Example:
      >>> penalty = 1e-4 * jc.tree.norm(params) ** 2
    """
    arrays = [dense(x) for x in jax.tree.leaves(params, is_leaf=is_leaf)]
    total = jnp.zeros((), jnp.float32)
    for x in arrays:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            wide = jnp.abs(x).astype(jnp.promote_types(jnp.abs(x).dtype, jnp.float32))
            total = total + jnp.sum(jnp.square(wide))
    return jnp.sqrt(total)


def average(trees: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """Average trees leaf by leaf; traceable.

    Averaging the parts of compressed leaves would average codes, which mean nothing.
    Here each leaf is made dense first, and the result is dense.

    Args:
      trees: one or more of the same names and shapes, compressed or not.
      weights: of the trees, divided by their sum; by default all equal.

    Returns:
      A dense tree in the first tree's dtypes; integer arrays are the first tree's.

    Raises:
      ValueError: no trees, another number of weights, weights that sum to 0, or trees
        of different structure.

    Example:
      >>> small = jc.compress(params, "symmetric(bits=4)")
      >>> mean = jc.tree.average([small, params])
    """
    trees = list(trees)
    weights = [1.0] * len(trees) if weights is None else list(weights)
    if not trees or len(weights) != len(trees) or not sum(weights):
        raise ValueError(
            f"average takes trees and as many weights, whose sum is not 0; these are "
            f"{len(trees)} trees with weights {weights}"
        )
    dense_trees = [jax.tree.map(dense, tree, is_leaf=is_leaf) for tree in trees]
    shares = [weight / sum(weights) for weight in weights]

    def mean(first: jax.Array, *others: jax.Array) -> jax.Array:
        if not jnp.issubdtype(first.dtype, jnp.inexact):
            return first
        wide = jnp.promote_types(first.dtype, jnp.float32)
        pairs = zip(shares, (first, *others), strict=True)
        parts = [share * x.astype(wide) for share, x in pairs]
        return functools.reduce(operator.add, parts).astype(first.dtype)

    return jax.tree.map(mean, *dense_trees)


def unbox(params: Params) -> Params:
    """Remove Flax's boxes (`nn.Partitioned` and others) and keep compressed leaves.

    `flax.linen.unbox` would make the leaves dense too: to Flax both are boxes.

    Args:
      params: pytree of arrays, leaves and boxes around either.

    Returns:
      The tree with each box replaced by its value; a leaf stays as it is.

    Example:
      >>> params = jc.tree.unbox(params)
    """

    def open_box(x: Any) -> Any:
        while is_box(x):
            x = x.value
        return x

    return jax.tree.map(open_box, params, is_leaf=lambda x: is_box(x) or is_leaf(x))

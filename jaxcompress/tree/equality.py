"""Equality of trees, bit for bit."""

import jax
import numpy as np

from jaxcompress.types import Params


def same_bits(left: Params, right: Params) -> bool:
    """Return whether two trees have the same structure and the same bytes in every
    array.
    """
    (a, left_tree), (b, right_tree) = jax.tree.flatten(left), jax.tree.flatten(right)
    return left_tree == right_tree and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(a, b, strict=True)
    )

"""Equality of trees, bit for bit, and leaves that several names share."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxcompress.tree.leaf import is_leaf
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


def share(before: Params, after: Params) -> Params:
    """Return `after` with one leaf where `before` has one array under several names.

    Leaves that differ, as by different moments, stay apart, and so do traced ones.
    """
    arrays = jax.tree.leaves(before, is_leaf=is_leaf)
    leaves, treedef = jax.tree.flatten(after, is_leaf=is_leaf)
    first: dict[int, Any] = {}
    for number, (array, leaf) in enumerate(zip(arrays, leaves, strict=True)):
        if is_leaf(leaf) and first.setdefault(id(array), leaf) is not leaf:
            other = first[id(array)]
            traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(leaf))
            if not traced and same_bits(other, leaf):
                leaves[number] = other
    return jax.tree.unflatten(treedef, leaves)

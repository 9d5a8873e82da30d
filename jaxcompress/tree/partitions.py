"""Partition of a tree into arrays that train and arrays that are frozen."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tree.leaf import Leaf
from jaxcompress.tree.names import match
from jaxcompress.tree.paths import Entry, entries, map_entries
from jaxcompress.types import Params


def is_inexact(x: Any) -> bool:
    """Return whether an array trains: floating point or complex."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def partition(params: Params, where: str | None = None) -> tuple[Any, Any]:
    """Split a tree into `(trainable, frozen)`, each with None in the other's places.

    Floating-point and complex arrays train (dense weights, scales, factors); integer
    and boolean arrays (codes, masks, tables) and whatever lossless leaves hold are
    frozen, so that no optimizer sees them. `combine(trainable, frozen)` gives the tree
    back.

    Args:
      params: pytree of arrays and leaves.
      where: only arrays whose names (`leaf_names`) it fully matches train, as
        `".*scale"` for the scales of quantized weights and of norms. None: all.

    Raises:
      ValueError: the pattern matches no floating-point array.

    Example:
      >>> trainable, frozen = jc.partition(jc.compress(params, "symmetric(bits=4)"))
      >>> loss = lambda tree: jc.tree.norm(jc.combine(tree, frozen))
      >>> gradients = jax.grad(loss)(trainable)
    """
    wanted = None if where is None else re.compile(where)

    def trains(entry: Entry) -> bool:
        named = wanted is None or wanted.fullmatch(entry.name) is not None
        return named and not isinstance(entry.value, Leaf) and is_inexact(entry.value)

    if wanted is not None:
        floats = (e for e in entries(params) if not isinstance(e.value, Leaf))
        names = [entry.name for entry in floats if is_inexact(entry.value)]
        match(wanted, names, "floating-point array")

    def split(keep_trainable: bool) -> Any:
        def pick(entry: Entry) -> Any:
            if trains(entry) == keep_trainable:
                return entry.value
            return jax.tree.map(lambda _: None, entry.value)

        return map_entries(pick, params)

    return split(True), split(False)


def combine(trainable: Params, frozen: Params) -> Params:
    """Join the two trees that `partition` returned; traceable.

    Args:
      trainable, frozen: trees of one structure, None in each other's places.

    Example:
      >>> same = jc.combine(*jc.partition(params))
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a,
        trainable,
        frozen,
        is_leaf=lambda x: x is None,
    )

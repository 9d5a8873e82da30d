"""Sums over the rows of one use, with all stack axes of its layout first."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing.uses import Use

Visit = Callable[[Use], dict[str, jax.Array]]


def stacked_sums(use: Use, visit: Visit) -> dict[str, jax.Array]:
    """Return what `visit` returns of a use, with the stack axes that it does not know
    of.

    A slice that was picked adds to its own place; slices that all meet the same rows
    have the same sums; where each row meets a slice of its own, rows are told apart.
    Where a use sees a part of the inputs, its rows count in part, so that the uses of
    all parts together count each row once.
    """
    sums = _chosen(use, visit) if use.chosen is not None else visit(use)
    if "count" in sums and use.part != 1:
        sums = {**sums, "count": sums["count"] * use.part}

    def placed(x: jax.Array) -> jax.Array:
        if use.chosen is None:
            x = jnp.broadcast_to(x, use.shared + x.shape)
        for size, index in reversed(use.picked):
            x = jnp.zeros((size, *x.shape), x.dtype).at[index].set(x)
        return x

    return jax.tree.map(placed, sums)


def _chosen(use: Use, visit: Visit) -> dict[str, jax.Array]:
    size, index = use.chosen
    rows = use.inputs.shape[use.stack : use.inputs.ndim - (not use.lookup)]
    index = jnp.broadcast_to(index, rows)
    # Rows of a loop cannot be compared one by one with those of another model.
    use = dataclasses.replace(use, looped=True)

    def one(slice_number: jax.Array) -> Any:
        return visit(dataclasses.replace(use, real=index == slice_number))

    sums = jax.lax.map(one, jnp.arange(size))
    return jax.tree.map(
        lambda x: jnp.broadcast_to(
            x.reshape(size, *(1 for _ in use.shared), *x.shape[1:]),
            (size, *use.shared, *x.shape[1:]),
        ),
        sums,
    )

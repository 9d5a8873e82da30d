"""Masks: the weights of highest score, among those they compete with."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.pruning.choices import Choice, choice, keep_largest, select
from jaxcompress.pruning.scores import magnitude_scores, taylor_scores, wanda_scores
from jaxcompress.pruning.sparse import Sparse
from jaxcompress.tree.generic_leaves import Reshaped
from jaxcompress.tree.layouts import (
    Layout,
)
from jaxcompress.tree.leaf import Leaf, dense, is_leaf
from jaxcompress.tree.paths import Entry, entries, map_entries
from jaxcompress.types import Masks, Params

__all__ = [
    "apply",
    "magnitude_scores",
    "make",
    "of",
    "taylor_scores",
    "wanda_scores",
]

Scope = Literal["leaf", "row", "global"]


def make(
    params: Params,
    scores: Any,
    sparsity: Any = None,
    *,
    scope: Scope = "leaf",
    nm: str | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Masks:
    """Mask of the weights of highest score over a whole tree; traceable.

    Scores of different leaves must be comparable where they compete ("global"):
    magnitudes are not, if layers differ in scale. Equal scores: the first stays.

    Args:
      params: the tree the masks are for.
      scores: the same tree with arrays that are not negative, larger for weights that
        matter more, and None where a leaf stays dense (`magnitude_scores` and others).
      sparsity: fraction of the scored weights to drop, at least 0 and below 1; may be
        traced, and is then rounded in float32.
      scope: weights compete within their leaf (each slice of a stack, where the layout
        names one), within their "row" (one output), or all together ("global").
      nm: "2:4" or another N:M along the inputs, or blocks such as "16x16". A sparsity
        with N:M says how many of each group are dropped, until N are left.
      layouts: `Layout` by leaf name; needed where rows or patterns are asked for in
        kernels of more than two axes.

    Returns:
      A tree of booleans, None where dense.

    Raises:
      ValueError: nothing scored, scores that do not fit, options out of range.

    Example:
      >>> scores = jc.masks.magnitude_scores(params)
      >>> masks = jc.masks.make(params, scores, sparsity=0.5)
    """
    arrays = {e.name: e.value for e in entries(params) if not e.depth}
    scored = entries(scores, None, layouts)
    if not scored:
        raise ValueError("no leaf has scores; narrow or widen the names to be scored")
    for entry in scored:
        if entry.name not in arrays or arrays[entry.name].shape != entry.value.shape:
            received = getattr(arrays.get(entry.name), "shape", "no dense array")
            raise ValueError(
                f"{entry.name}: scores of shape {entry.value.shape}, and the tree has "
                f"{received} there; score the same parameters"
            )
    if scope == "global":
        if nm is not None:
            raise ValueError("a pattern is chosen within a leaf, not scope='global'")
        masks = _pooled(scored, sparsity)
    else:
        masks = {entry.name: _one_mask(entry, sparsity, scope, nm) for entry in scored}
    return map_entries(lambda entry: masks[entry.name], scores)


def _pooled(scored: list[Entry], sparsity: Any) -> dict[str, jax.Array]:
    flat = jnp.concatenate([e.value.astype(jnp.float32).ravel() for e in scored])
    chosen = _choice((flat.size, 1), "masks.make", sparsity, None, "leaf")
    mask, start, masks = keep_largest(flat, _kept(chosen, sparsity)), 0, {}
    for entry in scored:
        part = mask[start : start + entry.value.size]
        masks[entry.name] = part.reshape(entry.value.shape)
        start += entry.value.size
    return masks


def _one_mask(entry: Entry, sparsity: Any, scope: str, nm: str | None) -> jax.Array:
    score = entry.value
    has_layout = entry.caller_layout is not None or score.ndim == 2
    plain = not has_layout and scope == "leaf" and nm is None  # places do not matter
    matrix = score.reshape(-1, 1) if plain else entry.matrix()
    chosen = _choice(matrix.shape, f"{entry.name}: masks.make", sparsity, nm, scope)
    mask = select(matrix, chosen, _kept(chosen, sparsity))
    return mask.reshape(score.shape) if plain else dense(entry.restore(mask))


def _choice(
    shape: tuple[int, ...], name: str, sparsity: Any, nm: str | None, scope: str
) -> Choice:
    """Return the choice where the sparsity may be an array, whose value is not looked
    at.
    """
    grouped = nm is not None and ":" in nm
    if isinstance(sparsity, jax.Array):
        sparsity = None if grouped else 0.0
    elif grouped and sparsity is not None:
        choice(shape, name, sparsity=sparsity, nm=None, scope=scope)
        sparsity = None
    return choice(shape, name, sparsity=sparsity, nm=nm, scope=scope)


def _kept(chosen: Choice, sparsity: Any) -> Any:
    """Return how many stay where the sparsity is an array, or approaches a
    pattern.
    """
    if sparsity is None:
        return chosen.kept
    if isinstance(sparsity, jax.Array):
        kept = jnp.round((1 - sparsity) * chosen.of).astype(jnp.int32)
        least = chosen.kept if chosen.among == "group" else 0
        return jnp.clip(kept, least, chosen.of)
    if chosen.among == "group":
        return max(chosen.kept, round((1 - sparsity) * chosen.of))
    return chosen.kept


def of(params: Params) -> Masks:
    """Read masks from `Sparse` leaves: booleans, None where a leaf is dense.

    A dense array has no mask, zeros or not: a kernel that starts at zero is to train.

    Args:
      params: pytree of arrays and leaves.

    Raises:
      ValueError: the tree has no `Sparse` leaf.

    Example:
      >>> masks = jc.masks.of(jc.compress(params, "magnitude(sparsity=0.5)"))
    """
    leaves = 0

    def mask(x: Any) -> jax.Array | None:
        nonlocal leaves
        inner = x.inner if isinstance(x, Reshaped) else x
        if not isinstance(inner, Sparse):
            return None
        leaves += 1
        if inner is x:
            return x.kept
        return dataclasses.replace(x, inner=inner.kept).materialize()

    masks = jax.tree.map(mask, params, is_leaf=is_leaf)
    if not leaves:
        raise ValueError(
            "the tree has no Sparse leaf; make masks with masks.make from scores"
        )
    return masks


def apply(params: Params, masks: Masks) -> Params:
    """Set weights to zero where a mask is false; leaves without a mask stay untouched.

    Args:
      params: the tree.
      masks: booleans like `params`, None where a leaf stays dense.

    Raises:
      ValueError: a mask of another shape, or on a compressed leaf.

    Example:
      >>> masks = jc.masks.make(params, jc.masks.magnitude_scores(params), sparsity=0.5)
      >>> pruned = jc.masks.apply(params, masks)
    """

    def apply(mask: jax.Array | None, x: Any) -> Any:
        if mask is None:
            return x
        if isinstance(x, Leaf):
            raise ValueError(
                f"a mask on a {type(x).__name__}; materialize the tree first"
            )
        check_mask(mask, x)
        return jnp.where(mask, x, 0)

    return jax.tree.map(apply, masks, params, is_leaf=lambda x: x is None)


def check_mask(mask: jax.Array, x: Any) -> None:
    """Raise ValueError where a mask does not fit an array."""
    if mask.shape != jnp.shape(x):
        raise ValueError(
            f"a mask of shape {mask.shape} on an array of shape {jnp.shape(x)}; make "
            "masks from the same parameters"
        )

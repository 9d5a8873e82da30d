"""Saliency scores, and one-shot pruning without reconstruction."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcompress import checks
from jaxcompress.calibration.moments import Moments, require
from jaxcompress.pruning.choices import Choice, choice, select
from jaxcompress.pruning.sparse import Sparse, sparse
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import dense, is_leaf
from jaxcompress.tree.methods import method, only
from jaxcompress.tree.paths import Entry, entries, is_float, map_entries
from jaxcompress.tree.selection import SMALLEST
from jaxcompress.types import Params


def _shapes_known(options: Mapping[str, Any]) -> bool:
    return options.get("threshold") is None


@method(traceable=_shapes_known)
def magnitude(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    nm: str | None = None,
    scope: Literal["leaf", "row"] = "leaf",
) -> Sparse:
    """Keep the weights of largest magnitude; of equal ones the first.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: not used.
      sparsity: fraction of the weights to drop, at least 0 and below 1. The number
        kept is rounded, and exact.
      threshold: drop those of this magnitude or less instead; 0 drops what is zero
        already. How many stay depends on values, so not under `jit`.
      nm: "2:4" or any N:M, N of M consecutive inputs of each output stay (no
        sparsity is given); or blocks of inputs and outputs, "16x16", by their norm.
      scope: weights compete within their "leaf" (each slice of a stack) or "row" (one
        output; a row of the weight matrix as papers write it).

    Raises:
      ValueError: an option out of range, or a pattern that does not divide the weights.
      TypeError: weights that are not floating point; a threshold under `jit`.

    Example:
      >>> jc.magnitude(x, nm="2:4").values.shape
      (32, 64)
    """
    del moments
    score = _magnitudes(x, "magnitude")
    if threshold is None:
        return _kept(
            x,
            score,
            choice(x.shape, "magnitude", sparsity=sparsity, nm=nm, scope=scope),
        )
    if sparsity is not None or nm is not None:
        raise ValueError(
            "magnitude takes a threshold, or a sparsity or pattern, not both"
        )
    checks.positive("magnitude", "a threshold", threshold, zero=True)
    if isinstance(x, Tracer):
        raise TypeError(
            "how many weights a threshold keeps is not known under jit, vmap or scan; "
            "call magnitude outside, or give a sparsity"
        )
    return sparse(x, score > threshold)


def magnitude_instead(options: Mapping[str, Any], **defaults: Any) -> Any:
    """Return magnitude pruning to the same sparsity or pattern: what needs no data."""
    return magnitude(**only(dict(options), "sparsity", "nm", "scope", **defaults))


@method(data=True, without_data=functools.partial(magnitude_instead, scope="row"))
def wanda(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    sparsity: float | None = None,
    nm: str | None = None,
    scope: Literal["leaf", "row"] = "row",
) -> Sparse:
    """Wanda: keep the weights of largest magnitude times root mean square of their
    input.

    Those of one output compete, as published. Weights of an input that is always zero
    score zero. Drifted moments, if known, are the inputs.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs; the diagonal of `second`, or of `drifted`.
      sparsity: fraction of the weights to drop; not with an N:M pattern.
      nm: as in `magnitude`; blocks need `scope="leaf"`.
      scope: "row" (one output) or "leaf", as in `magnitude`.

    Raises:
      ValueError: no moments, moments that do not fit, an option out of range.

    Example:
      >>> small = jc.wanda(x, of_x, sparsity=0.5)

    Source: Sun et al. 2023, "A simple and effective pruning approach for large language
    models" (arXiv 2306.11695, section 3).
    """
    score = _magnitudes(x, "wanda") * input_norms(x, moments, "wanda")
    chosen = choice(x.shape, "wanda", sparsity=sparsity, nm=nm, scope=scope)
    return _kept(x, score, chosen)


def second_of(x: jax.Array, moments: Moments | None, name: str) -> jax.Array:
    """Return second moment of the inputs the pruned layer will see, drifted if
    known.
    """
    return require(moments, x, name, fields=()).target_problem(x, name)[1]


def input_norms(x: jax.Array, moments: Moments | None, name: str) -> jax.Array:
    """Return root mean square of each input of the pruned layer, `[..., inputs, 1]`."""
    return _norms(second_of(x, moments, name))


@functools.partial(jax.jit, static_argnames=("chosen",))
def kept_weights(x: jax.Array, mask: jax.Array, chosen: Choice) -> Sparse:
    """Return the leaf of the weights `x` that a choice's mask keeps; traceable."""
    return sparse(
        x,
        mask,
        kept=chosen.count(x.shape[-2]),
        by_output=chosen.by_output,
        block=chosen.size if chosen.among == "block" else (1, 1),
    )


@functools.partial(jax.jit, static_argnames=("chosen",))
def _kept(x: jax.Array, score: jax.Array, chosen: Choice) -> Sparse:
    return kept_weights(x, select(score, chosen), chosen)


def _magnitudes(x: jax.Array, name: str) -> jax.Array:
    checks.weights(name, x)
    return jnp.abs(x.astype(jnp.float32))


def _norms(second: jax.Array) -> jax.Array:
    """Return root mean square of each input, `[..., inputs, 1]`."""
    diagonal = jnp.diagonal(second, axis1=-2, axis2=-1)
    return jnp.sqrt(jnp.maximum(diagonal, 0)).astype(jnp.float32)[..., :, None]


# Scores over trees: (params, gradients) -> arrays, None where a leaf is not scored.


def magnitude_scores(
    params: Params, gradients: Params = None, *, where: str | None = None
) -> Params:
    """Score each weight by its magnitude, float32; traceable.

    Args:
      params: the tree; what is compressed already is not scored.
      gradients: not used.
      where: pattern that must fully match the names of the leaves to be scored; None:
        kernels and embeddings of 4 096 weights or more.

    Returns:
      The tree with arrays of its shapes, None where a leaf is not scored.

    Raises:
      ValueError: the pattern matches no floating-point array.

    Example:
      >>> scores = jc.masks.magnitude_scores(params, where=".*mlp.*kernel")
    """
    del gradients
    return _scored(params, where, lambda entry: jnp.abs(_wide(entry.value)))


def taylor_scores(
    params: Params, gradients: Params = None, *, where: str | None = None
) -> Params:
    """Score each weight by the first-order change of the loss without it: |weight *
    gradient|.

    Args:
      params: the tree.
      gradients: of the loss, same tree; averaged over batches by the caller.
      where: as in `magnitude_scores`.

    Raises:
      ValueError: no gradients, or none of the shape of a scored leaf.

    Example:
      >>> gradients = jax.grad(jc.tree.norm)(params)
      >>> scores = jc.masks.taylor_scores(params, gradients)

    Source: Molchanov et al. 2016 (arXiv 1611.06440, section 2.2).
    """
    if gradients is None:
        raise ValueError(
            "taylor_scores needs gradients; an optimizer passes them on where it is "
            "called as update(gradients, state, params, gradients=gradients)"
        )
    slopes = {entry.name: entry.value for entry in entries(gradients)}

    def score(entry: Entry) -> jax.Array:
        slope = slopes.get(entry.name)
        if slope is None or slope.shape != entry.value.shape:
            raise ValueError(
                f"{entry.name}: the gradient has shape {getattr(slope, 'shape', None)} "
                f"and the weight {entry.value.shape}; pass those of the same tree"
            )
        return jnp.abs(_wide(entry.value) * _wide(slope))

    return _scored(params, where, score)


def wanda_scores(
    params: Params,
    moments: Mapping[str, Moments],
    *,
    layouts: Mapping[str, Layout] | None = None,
    where: str | None = None,
) -> Params:
    """Score each weight by magnitude times root mean square of its input; None without
    moments.

    Args:
      params: the tree.
      moments: by kernel name, from `collect_moments`.
      layouts: `Layout` by name; by default the moments'.
      where: as in `magnitude_scores`.

    Raises:
      ValueError: no leaf has moments, moments do not fit, or a layout is missing.

    Example:
      >>> scores = jc.masks.wanda_scores(params, moments=moments)
    """

    def score(entry: Entry) -> jax.Array | None:
        leaf_moments = entry.moments
        if leaf_moments is None or leaf_moments.looked_up:
            return None
        matrix = entry.matrix()
        second = second_of(matrix, leaf_moments, entry.name)
        product = jnp.abs(_wide(matrix)) * _norms(second)
        return dense(entry.restore(product))

    scores = _scored(params, where, score, moments, layouts)
    if not jax.tree.leaves(scores):
        raise ValueError(
            "no leaf to be scored has moments of its inputs; collect them with the "
            "same model and parameters"
        )
    return scores


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _scored(
    params: Params,
    names: str | None,
    score: Callable[[Entry], jax.Array | None],
    moments: Mapping[str, Moments] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Params:
    plain = jax.tree.map(lambda x: None if is_leaf(x) else x, params, is_leaf=is_leaf)
    scored = 0

    def one(entry: Entry) -> jax.Array | None:
        nonlocal scored
        if names is None:
            chosen = entry.weight and entry.value.ndim >= 2
            chosen = chosen and entry.value.size >= SMALLEST
        else:
            chosen = re.fullmatch(names, entry.name) is not None
        if not chosen or not is_float(entry.value):
            return None
        scored += 1
        return score(entry)

    scores = map_entries(one, plain, moments, layouts)
    if not scored:
        raise ValueError(
            f"no dense kernel or embedding of {SMALLEST} weights or more to score; "
            "give names"
            if names is None
            else f"the pattern {names!r} matches no dense floating-point array"
        )
    return scores

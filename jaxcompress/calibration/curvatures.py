"""`measure_curvatures`: how the divergence from the model grows with each output."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.calibration.curvature_sums import (
    CurvatureSum,
    column_products,
    has_use_for_pairs,
)
from jaxcompress.calibration.error_feedback import inverse_factor
from jaxcompress.calibration.moments import Moments
from jaxcompress.checks import check_concrete
from jaxcompress.progress import each_item
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Batch, Params


def measure_curvatures(
    apply_fn: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    batches: Iterable[Batch],
    moments: Mapping[str, Moments],
    *,
    layouts: Mapping[str, Layout] | None = None,
    where: str | None = None,
    joint: bool = False,
    damping: float = 0.01,
    key: jax.Array,
    progress: bool | Callable[[list[Any]], Iterable[Any]] = False,
) -> dict[str, Moments]:
    """Measure how fast the divergence from the model grows with the error of each
    output.

    An error E of a leaf `[inputs, outputs]` that is white in the metric of its inputs'
    second moment (column `o` of `E^T S E` has variance `v[o]` in every direction, as
    error feedback leaves it) moves the model's predictions by `inputs *
    dot(curvatures, v)` nats per token, to second order: half the squared gradient, in
    that metric, of the log-probability of what the model itself would say. One backward
    pass per sequence serves all leaves. The rows of an embedding are given their mean:
    rare ones, coded coarser, would lose more than second order foretells.

    Joint curvatures say it for pairs of outputs: `v` is then a matrix `V`, and its cost
    `inputs * trace(joint @ V)`. `rate_distortion` lets errors cancel by them. To second
    order that helps much in what makes queries and keys, less where attention and
    neurons are read, and hardly where outputs are more than inputs, as in gate and
    up; those would cost the most memory, and are not measured. It took 12 to
    17 % of a small model's divergence, of that of SmolLM2-135M -6 to 2 % on text like
    the batches' and -6 to 0 % on other text, worst below 2.5 bits: try it on yours.
    Off-diagonal terms are shrunk; two-fold cross-validation over the sequences chooses
    the amount, so that few tokens do no harm. Sizes that segments of a trellis do not
    divide evenly (5120, 8192) have none either.

    Args:
      apply_fn: `(params, tokens [B, T]) -> logits [B, T, V]`.
      params: pytree of arrays, concrete.
      batches: tokens `[B, T]`, or dicts with "tokens", none of them padding; some
        4 096 tokens in all are enough for single outputs, 12 000 for pairs.
      moments: by kernel name; a leaf without a second moment has the identity.
      layouts, where: as for `plan_bits`.
      joint: whether to measure joint curvatures too. Each takes, twice over while it
        is measured, what a second moment of the outputs would.
      damping: as in `rate_distortion`.
      key: of the sampled tokens.
      progress: as in `compress`, of the list of sequences.

    Returns:
      The moments, those of the leaves completed by `curvatures` `[..., outputs]` and,
      where they are of use, `joint_curvatures` `[..., outputs, outputs]`.

    Raises:
      ValueError: no batches, batches without tokens `[B, T]`, or gradients that are
        not finite.
      TypeError: `batches` is one batch.

    Example:
      >>> where = ".*down_proj/kernel"
      >>> fisher = jc.measure_curvatures(
      ...     apply_fn, params, batches, moments, where=where, joint=False,
      ...     key=key,
      ... )

    Source: the Fisher information, as GuidedQuant (ICML 2025) and YAQA (arXiv
    2505.22988) use it.
    """
    check_concrete(params, "measure_curvatures")
    planned = planned_entries(params, moments, where, layouts)
    if isinstance(batches, Mapping):
        raise TypeError("batches is one dict; pass an iterable of them: [batch]")
    rows = [row for batch in batches for row in _tokens(batch)]
    if not rows:
        raise ValueError("there are no batches; pass at least one")
    seconds = {e.name: getattr(e.moments, "second", None) for e in planned}
    by_array: dict[
        int, jax.Array
    ] = {}  # weights that meet the same rows share an array
    for second in seconds.values():
        if second is not None and id(second) not in by_array:
            by_array[id(second)] = _factors(second, damping)
    factors = {n: by_array[id(x)] for n, x in seconds.items() if x is not None}
    sums = {entry.name: CurvatureSum() for entry in planned}

    @jax.jit
    def products(
        params: Params, factors: Mapping[str, jax.Array], row: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        # One program: a gradient is as large as the model, and outlives no product.
        gradient = _sampled_gradient(apply_fn, params, row, key)
        squares = {}
        for entry in planned_entries(gradient, moments, where, layouts):
            matrix, factor = entry.matrix(), factors.get(entry.name)
            pairs = joint and not entry.embedding and has_use_for_pairs(matrix.shape)
            squares[entry.name] = column_products(matrix, factor, pairs=pairs)
        return squares

    tokens = 0
    shown = each_item(rows, progress, label="curvatures", unit="sequences")
    for number, row in enumerate(shown):
        squares = products(params, factors, row, jax.random.fold_in(key, tokens))
        for name, square in squares.items():
            sums[name].add(number, square)
        tokens += row.size
    completed = dict(moments)
    for entry in planned:
        shape = entry.matrix().shape
        singles, pairs = sums.pop(entry.name).finish(
            entry.name, shape, tokens, embedding=entry.embedding
        )
        moment = (entry.moments if not entry.depth else None) or Moments(
            jnp.zeros(shape[:-2])
        )
        completed[entry.name] = dataclasses.replace(
            moment,
            curvatures=singles,
            joint_curvatures=pairs,
            layout=moment.layout or entry.caller_layout,
        )
    return completed


def _tokens(batch: Any) -> jax.Array:
    """Return the tokens of a batch, `[B, T]`."""
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else batch
    if getattr(tokens, "ndim", 0) != 2:
        keys = f"a dict of {sorted(batch)}" if isinstance(batch, Mapping) else "it"
        raise ValueError(
            "curvatures are measured on a language model's tokens [B, T]: a batch is "
            f'an array of them, or a dict with "tokens"; {keys} has none'
        )
    return jnp.asarray(tokens)


def _sampled_gradient(
    apply_fn: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    row: jax.Array,
    key: jax.Array,
) -> Params:
    """Return gradient of the log-probability of what the model says of a row.

    Args:
      row: tokens `[T]`.
      key: that the model's answers are sampled with.
    """

    def score(params: Params) -> jax.Array:
        logits = apply_fn(params, row[None])[0].astype(jnp.float32)
        said = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        logs = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(logs, said[:, None], axis=-1).sum()

    return jax.grad(score)(params)


def _factors(second: Any, damping: float) -> jax.Array:
    """Return a factor of each slice's second moment, `[slices, inputs, inputs]`."""
    flat = jnp.asarray(second).reshape(-1, *second.shape[-2:])
    # One at a time: dispatched at once, the float64 steps of all slices are held.
    factors = [
        jax.block_until_ready(inverse_factor(each, damping=damping)) for each in flat
    ]
    return jnp.stack(factors)

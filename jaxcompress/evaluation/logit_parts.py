"""Scores of logits that are computed for a part of the tokens at a time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.evaluation.batches import Metrics
from jaxcompress.types import Batch, Params

SCORED = ("tokens", "mask", "bytes")  # arrays of a batch that scores read
MOST_ROWS = 512  # tokens whose logits are computed at a time; more gain nothing


def in_parts(
    scores: Callable[[list[jax.Array], Batch], Metrics],
    models: Sequence[tuple[Any, Params]],
    batch: Batch,
    limit: int,
) -> Metrics:
    """Return `scores` of the logits `[B, T - 1, V]` of models, about `limit` bytes of
    them at a time.

    Args:
      scores: `(logits of each model, part)` to sums over tokens, for each example. The
        tokens of a part are those to predict.
      models: apply functions with their parameters. Where all have a `head`, as `Apply`
        of our models does, it is applied to a chunk of tokens at a time; else windows
        are computed one after another where the logits of all exceed the limit.
      batch: of `windows`.
      limit: bytes.
    """
    tokens = batch["tokens"]
    # A batch without a mask is scored whole.
    batch = {"mask": jnp.ones(tokens.shape, bool), **batch}
    part = {key: batch[key][:, 1:] for key in batch if key in SCORED}
    if all(getattr(apply_fn, "has_head", False) for apply_fn, _ in models):
        hidden = [fn.hidden(params, tokens)[:, :-1] for fn, params in models]

        def of_tokens(hidden: list[jax.Array], part: Batch) -> Metrics:
            heads = zip(models, hidden, strict=True)
            return scores([fn.head(params, x) for (fn, params), x in heads], part)

        pieces = jax.eval_shape(models[0][0].head, models[0][1], hidden[0][:, :1])
        rows = max(1, min(limit // (4 * pieces.shape[-1]), MOST_ROWS))
        return _token_chunks(of_tokens, hidden, part, max(1, rows // len(tokens)))

    def of_windows(tokens: jax.Array, part: Batch) -> Metrics:
        logits = [fn(params, tokens)[:, :-1] for fn, params in models]
        return scores([x.astype(jnp.float32) for x in logits], part)

    shape = jax.eval_shape(models[0][0], models[0][1], tokens).shape
    if len(tokens) == 1 or 4 * math.prod(shape) <= limit:
        return of_windows(tokens, part)
    rows = jax.tree.map(lambda x: x[:, None], (tokens, part))
    parts = jax.lax.map(lambda row: of_windows(*row), rows)
    return jax.tree.map(lambda x: x[:, 0], parts)


def _token_chunks(
    scores: Callable[[list[jax.Array], Batch], Metrics],
    hidden: list[jax.Array],
    part: Batch,
    size: int,
) -> Metrics:
    """Return the sums of `scores` over chunks of `size` tokens of each window."""
    length = part["tokens"].shape[1]
    size = min(size, length)
    count = -(-length // size)

    def chunks(x: jax.Array) -> jax.Array:
        gap = [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, gap).reshape(x.shape[0], count, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    each = jax.lax.map(
        lambda chunk: scores(*chunk), jax.tree.map(chunks, (hidden, part))
    )
    return jax.tree.map(lambda x: x.sum(axis=0), each)

"""Loss functions for `make_train_step`: a language model against labels and a teacher.

Batches are those of `evaluation.windows`: `tokens` `[batch, length]`, and a `mask` that
is true where a token is predicted, from those before it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.distillation.cached import TopK, cached_kl
from jaxcompress.distillation.losses import count, cross_entropy, forward_kl, mean
from jaxcompress.evaluation.language import ApplyFn
from jaxcompress.training.steps import LossFn
from jaxcompress.types import Batch, Params

Soft = Callable[..., jax.Array]


def hard_labels(apply_fn: ApplyFn) -> LossFn:
    """Build the loss function of plain training: the next token, in nats.

    Args:
      apply_fn: `(params, tokens [B, T]) -> logits [B, T, V]`.

    Example:
      >>> loss_fn = jc.distillation.hard_labels(apply_fn)
      >>> loss, metrics = loss_fn(params, batches[0], key)
    """
    return functools.partial(_labels, apply_fn)


def soft_labels(
    apply_fn: ApplyFn,
    teacher_fn: ApplyFn,
    teacher: Params,
    *,
    soft: Soft = forward_kl,
    soft_weight: float = 1.0,
) -> LossFn:
    """Build the loss function of distillation from a teacher that runs in the same
    step.

    Args:
      apply_fn: of the student, `(params, tokens [B, T]) -> logits [B, T, V]`.
      teacher_fn: of the teacher.
      teacher: its parameters; bound, so that the step takes them as an argument.
      soft: `(student logits, teacher logits, mask=) -> [B, T]`: of `losses`, with its
        options bound by `functools.partial`.
      soft_weight: of it; the rest is the weight of the labels.

    Metrics: `soft` and, where labels count, `hard`, in nats; `weight` in tokens.

    Example:
      >>> kl = jc.distillation.forward_kl
      >>> loss_fn = jc.distillation.soft_labels(apply_fn, apply_fn, params, soft=kl)
      >>> loss, metrics = loss_fn(params, batches[0], key)
    """
    _check(soft_weight)
    function = functools.partial(_softly, apply_fn, teacher_fn, soft, soft_weight)
    return jax.tree_util.Partial(function, teacher)


def cached_labels(apply_fn: ApplyFn, *, soft_weight: float = 1.0) -> LossFn:
    """Build the loss function of distillation from a cache's entry, `batch["teacher"]`.

    Its positions are those of `tokens[:, 1:]`, as of logits `[:, :-1]`.

    Args:
      apply_fn: of the student, as for `soft_labels`.
      soft_weight: of the teacher's part; the rest is the weight of the labels.

    Example:
      >>> loss_fn = jc.distillation.cached_labels(apply_fn)
      >>> teacher = jc.distillation.top_k(apply_fn(params, tokens)[:, :-1], 4)
      >>> batch = batches[0] | {"teacher": teacher}
      >>> loss, metrics = loss_fn(params, batch, key)
    """
    _check(soft_weight)
    return functools.partial(_from_cache, apply_fn, soft_weight)


def _labels(
    apply_fn: ApplyFn, params: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    del key
    tokens, mask = batch["tokens"], _mask(batch)
    values = cross_entropy(apply_fn(params, tokens)[:, :-1], tokens[:, 1:], mask=mask)
    hard = mean(values, mask)
    return hard, {"hard": hard, "weight": count(values, mask)}


def _softly(
    apply_fn: ApplyFn,
    teacher_fn: ApplyFn,
    soft: Soft,
    soft_weight: float,
    teacher: Params,
    params: Params,
    batch: Batch,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    del key
    target = teacher_fn(teacher, batch["tokens"])[:, :-1]
    return _mixed(apply_fn, soft_weight, soft, target, params, batch)


def _from_cache(
    apply_fn: ApplyFn, soft_weight: float, params: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    del key
    target: TopK | Any = batch["teacher"]
    return _mixed(apply_fn, soft_weight, cached_kl, target, params, batch)


def _mixed(
    apply_fn: ApplyFn,
    soft_weight: float,
    soft: Soft,
    target: Any,
    params: Params,
    batch: Batch,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    tokens, mask = batch["tokens"], _mask(batch)
    logits = apply_fn(params, tokens)[:, :-1]
    values = soft(logits, target, mask=mask)
    total = mean(values, mask)
    metrics = {"soft": total, "weight": count(values, mask)}
    if soft_weight < 1:
        hard = mean(cross_entropy(logits, tokens[:, 1:], mask=mask), mask)
        metrics["hard"] = hard
        total = soft_weight * total + (1 - soft_weight) * hard
    return total, metrics


def _check(soft_weight: float) -> None:
    if not 0 < soft_weight <= 1:
        raise ValueError(
            f"soft_weight is {soft_weight}; it must be above 0 and at most 1 "
            "(hard_labels has no teacher)"
        )


def _mask(batch: Batch) -> jax.Array:
    """Return which of `tokens[:, 1:]` count: all, where the batch has no mask."""
    mask = batch.get("mask")
    return jnp.ones(batch["tokens"].shape, bool)[:, 1:] if mask is None else mask[:, 1:]

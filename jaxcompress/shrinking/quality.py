"""Divergence of a small model's predictions from the model's."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.evaluation.batches import Metrics, per_example
from jaxcompress.evaluation.language import Apply, compare, divergence
from jaxcompress.shrinking.subject import Subject
from jaxcompress.tree.leaf import materialize
from jaxcompress.types import Params


@dataclasses.dataclass(frozen=True)
class Quality:
    """Mean KL(model || small) in nats per prediction, over held-out batches.

    `standard_error` has windows, or examples, as clusters; None for a single one.
    `perplexity` and `perplexity_before` are those of a language model, else None.
    """

    kl: float
    standard_error: float | None
    predictions: int
    perplexity: float | None = None
    perplexity_before: float | None = None


def measure_quality(subject: Subject, small: Params, batches: Sequence[Any]) -> Quality:
    """Compare predictions on batches; both models run in one compiled step.

    Raises:
      ValueError: no batches, or outputs that are not finite.
    """
    ready = jax.jit(materialize)(small)
    if subject.language:
        comparison = compare(Apply(subject.model), subject.params, ready, batches)
        return Quality(
            comparison.kl,
            comparison.kl_standard_error,
            comparison.tokens,
            comparison.small.perplexity,
            comparison.dense.perplexity,
        )
    both = {"dense": subject.params, "small": ready}
    bare = hasattr(batches[0], "shape") if batches else False
    metrics = _Outputs(subject.function, bare)
    rows = per_example(metrics, both, map(_as_dict, batches))
    nats, counts = np.concatenate([row["kl"] for row in rows], axis=1)
    if not counts.sum():
        raise ValueError("every prediction is masked; nothing to compare")
    kl, count = float(nats.sum() / counts.sum()), counts.size
    error = None
    if count > 1:
        spread = math.sqrt(np.sum((nats - kl * counts) ** 2)) / counts.sum()
        error = float(spread * math.sqrt(count / (count - 1)))
    return Quality(kl, error, int(counts.sum()))


def _as_dict(batch: Any) -> Any:
    return {"inputs": batch} if hasattr(batch, "shape") else batch


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """Metrics of any two models: the divergence of their outputs, by example.

    `bare`: the model takes the array "inputs" of the batch, not the batch.
    """

    function: Callable[[Params, Any], Any]
    bare: bool

    def __call__(self, params: Params, batch: Any) -> Metrics:
        inputs = batch["inputs"] if self.bare else batch
        dense, small = (
            first_output(self.function(params[which], inputs)).astype(jnp.float32)
            for which in ("dense", "small")
        )
        nats = divergence(dense, small)
        weights = jnp.ones_like(nats)
        mask = batch.get("mask")
        if mask is not None and mask.ndim <= nats.ndim:
            spread = mask.reshape(mask.shape + (1,) * (nats.ndim - mask.ndim))
            weights = jnp.broadcast_to(spread, nats.shape).astype(jnp.float32)
        axes = tuple(range(1, nats.ndim))
        return {"kl": ((nats * weights).sum(axes), weights.sum(axes))}


def first_output(outputs: Any) -> jax.Array:
    """Return the first array that a model returns: its logits `[batch, ..., classes]`.

    Raises:
      ValueError: none with a batch axis and a last axis of classes.
    """
    arrays = [x for x in jax.tree.leaves(outputs) if getattr(x, "ndim", 0) > 1]
    if not arrays:
        raise ValueError(
            "the model returns no array [batch, ..., classes] to compare; pass a "
            "function of (params, batch) that returns its logits"
        )
    return arrays[0]

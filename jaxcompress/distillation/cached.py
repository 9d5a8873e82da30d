"""Teachers that run once: a few entries of each distribution, kept in files.

`TopK` keeps the likeliest tokens and what is left over as one bucket: exact where the
tail does not matter, and never above the true KL. `Sampled` keeps drawn tokens with
importance weights: noisy, but right on average, gradients included. A folder holds one
checksummed file per batch, each under the digest of the batch it belongs to.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcompress.distillation.losses import (
    check_mask,
    check_vocabulary,
    log_probs,
    only,
    take,
)
from jaxcompress.evaluation.language import divergence
from jaxcompress.storage.resume import Results, digest
from jaxcompress.types import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """The k likeliest tokens of a teacher at each position, and the rest as one bucket.

    Indices differ within a position; the log-probabilities and the tail's add up to a
    distribution at `temperature` over `vocabulary` entries.

    Example:
      >>> jc.distillation.top_k(jnp.zeros((2, 8)), 4).indices.shape
      (2, 4)
    """

    indices: jax.Array  # [..., k], unsigned
    log_probs: jax.Array  # [..., k], float32
    log_tail: jax.Array  # [...], float32
    temperature: float = dataclasses.field(metadata={"static": True})
    vocabulary: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tokens drawn from a teacher, with weights whose expectation is its distribution.

    A token drawn twice is listed twice. `entropy` is the teacher's own, in nats.

    Example:
      >>> logits = jnp.zeros((2, 8))
      >>> cache = jc.distillation.sampled(logits, 4, key=key)
    """

    indices: jax.Array  # [..., draws], unsigned
    weights: jax.Array  # [..., draws], float32
    entropy: jax.Array  # [...], float32
    temperature: float = dataclasses.field(metadata={"static": True})
    vocabulary: int = dataclasses.field(metadata={"static": True})


def top_k(logits: jax.Array, k: int, *, temperature: float = 1.0) -> TopK:
    """Keep the k likeliest tokens of a teacher's logits `[..., vocabulary]`: `6 k + 4`
    bytes each.

    (`8 k + 4` bytes where the vocabulary is above 65 536.)

    Raises ValueError where `k` is not from 1 to the vocabulary's size less one.

    Args:
      logits: `[..., vocabulary]`, of the teacher.
      k: tokens to keep at each position.
      temperature: of the softmax.

    Example:
      >>> cached = jc.distillation.top_k(jnp.zeros((2, 8)), 4)
    """
    size = logits.shape[-1]
    if not 1 <= k < size:
        raise ValueError(
            f"k is {k}; of a vocabulary of {size} it must be from 1 to {size - 1}, "
            "so that a tail is left"
        )
    whole = log_probs(logits, temperature=temperature)
    largest, indices = jax.lax.top_k(whole, k)
    tail = _tail(whole, indices)
    return TopK(_short(indices, size), largest, tail, temperature, size)


def top_k_kl(
    student_logits: jax.Array, cached: TopK, *, mask: jax.Array | None = None
) -> jax.Array:
    """Compute `T^2 KL` of the teacher's buckets against the student's, `[...]` in nats.

    At most the KL over all tokens, and equal to it where the tail is one token or
    student and teacher share the tail out alike.

    Raises ValueError on vocabularies or shapes that differ.

    Args:
      student_logits: `[..., vocabulary]`.
      cached: of `top_k`.
      mask: `[...]`.

    Example:
      >>> cached = jc.distillation.top_k(jnp.zeros((2, 8)), 4)
      >>> jc.distillation.top_k_kl(jnp.zeros((2, 8)), cached).shape
      (2,)
    """
    student = _log_probs(student_logits, cached, mask)
    picked = take(student, cached.indices)
    tail = _tail(student, cached.indices)
    kept = jnp.concatenate([cached.log_probs, cached.log_tail[..., None]], axis=-1)
    mine = jnp.concatenate([picked, tail[..., None]], axis=-1)
    if mask is not None:
        kept = jnp.where(check_mask(mask, tail.shape)[..., None], kept, 0)
    return only(cached.temperature**2 * divergence(kept, mine), mask)


def sampled(
    logits: jax.Array,
    draws: int,
    *,
    temperature: float = 1.0,
    power: float = 1.0,
    key: jax.Array,
) -> Sampled:
    """Draw tokens in proportion to `softmax(logits / T) ** power`, with replacement.

    The weight of a token drawn is its probability over `draws` times that of being
    drawn: 1 / draws each where `power` is 1.

    Raises ValueError where `draws` is below 1 or `power` negative.

    Args:
      logits: `[..., vocabulary]`, of the teacher.
      draws: tokens to draw at each position.
      temperature: T, of the softmax.
      power: of the probabilities that tokens are drawn by.
      key: of the draws.

    Example:
      >>> cached = jc.distillation.sampled(jnp.zeros((2, 8)), 4, key=key)

    Source: Anshumann et al. 2025, "Sparse logit sampling" (arXiv 2503.16870).
    """
    if draws < 1 or power < 0:
        raise ValueError(
            f"draws is {draws} and power {power}; at least 1 draw is needed, and a "
            "power of 0 or more"
        )
    whole = log_probs(logits, temperature=temperature)
    proposal = jax.nn.log_softmax(power * whole, axis=-1)
    shape = (draws, *logits.shape[:-1])
    drawn = jax.random.categorical(key, proposal, axis=-1, shape=shape)
    indices = jnp.moveaxis(drawn, 0, -1)
    weights = jnp.exp(take(whole, indices) - take(proposal, indices)) / draws
    p = jnp.exp(whole)
    entropy = -jnp.where(p > 0, p * jnp.where(p > 0, whole, 0), 0).sum(axis=-1)
    size = logits.shape[-1]
    return Sampled(_short(indices, size), weights, entropy, temperature, size)


def sampled_kl(
    student_logits: jax.Array, cached: Sampled, *, mask: jax.Array | None = None
) -> jax.Array:
    """Estimate `T^2 KL(teacher / T || student / T)`, `[...]` in nats, without bias.

    A single value may be negative. Raises ValueError on vocabularies or shapes that
    differ.

    Args:
      student_logits: `[..., vocabulary]`.
      cached: of `sampled`.
      mask: `[...]`.

    Example:
      >>> logits = jnp.zeros((2, 8))
      >>> cached = jc.distillation.sampled(logits, 4, key=key)
      >>> values = jc.distillation.sampled_kl(logits, cached)
    """
    student = _log_probs(student_logits, cached, mask)
    picked = take(student, cached.indices)
    estimate = -(cached.weights * picked).sum(axis=-1) - cached.entropy
    return only(cached.temperature**2 * estimate, mask)


def cached_kl(
    student_logits: jax.Array,
    cached: TopK | Sampled,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Compute `top_k_kl` or `sampled_kl`, by the type of the cache.

    Args:
      student_logits: `[..., vocabulary]`.
      cached: of `top_k` or `sampled`.
      mask: `[...]`.

    Example:
      >>> cached = jc.distillation.top_k(jnp.zeros((2, 8)), 4)
      >>> values = jc.distillation.cached_kl(jnp.zeros((2, 8)), cached)
    """
    function = top_k_kl if isinstance(cached, TopK) else sampled_kl
    return function(student_logits, cached, mask=mask)


def write_cache(
    folder: str | os.PathLike,
    number: int,
    batch: Batch,
    make: Callable[[], TopK | Sampled],
    *,
    source: str = "",
) -> TopK | Sampled:
    """Store what a teacher says of a batch, or read it where it is stored already.

    The file is written under another name and renamed, so that an interrupted run
    resumes where it stopped.

    Args:
      folder: made where it does not exist.
      number: of the batch.
      batch: dict of arrays; its digest is written too.
      make: runs the teacher, `lambda: top_k(teacher(params, batch["tokens"]), 16)`.
      source: what else the file depends on, in words: the teacher, what is kept of it,
        the key. Written too; only a file of the same source is read.

    Raises:
      ValueError: the file there belongs to another batch or source.
      FileDamaged: the file there is not what was written.

    Example:
      >>> make = lambda: jc.distillation.top_k(apply_fn(params, tokens), 4)
      >>> cached = jc.distillation.write_cache("cache", 0, batches[0], make)
    """
    results, name = Results(folder), _name(number)
    if results.path(name).exists():
        return read_cache(folder, number, batch, source=source)
    cached = make()
    arrays = {
        field.name: getattr(cached, field.name)
        for field in dataclasses.fields(cached)
        if not field.metadata
    }
    about = {
        "kind": type(cached).__name__,
        f"batch {number}": digest(None, dict(batch)),
        "source": source,
        "temperature": cached.temperature,
        "vocabulary": cached.vocabulary,
    }
    results.save(name, arrays, about)
    return cached


def read_cache(
    folder: str | os.PathLike, number: int, batch: Batch, *, source: str | None = None
) -> TopK | Sampled:
    """Read what `write_cache` wrote for this batch; every byte of it is checked.

    `source` must be as it was written; None takes any.

    Args:
      folder, number, batch: as for `write_cache`.
      source: as it was written; None takes any.

    Raises:
      FileNotFoundError: there is nothing for this number.
      ValueError: it belongs to another batch or source.
      FileDamaged: it is not what was written.

    Example:
      >>> make = lambda: jc.distillation.top_k(apply_fn(params, tokens), 4)
      >>> cached = jc.distillation.write_cache("cache", 0, batches[0], make)
      >>> same = jc.distillation.read_cache("cache", 0, batches[0])
    """
    results = Results(folder)
    wanted = {f"batch {number}": digest(None, dict(batch))}
    wanted |= {} if source is None else {"source": source}
    advice = (
        "read the batches in the order in which the cache was written, take another "
        "folder, or write it anew"
    )
    stored = results.load(_name(number), wanted, advice)
    if stored is None:
        raise FileNotFoundError(
            f"{results.path(_name(number))}: the teacher was not run on batch "
            f"{number}; write_cache does it"
        )
    arrays, about = stored
    kind = {"TopK": TopK, "Sampled": Sampled}[about["kind"]]
    settings = {name: about[name] for name in ("temperature", "vocabulary")}
    return kind(**arrays, **settings)


def _name(number: int) -> str:
    return f"{number:08d}"


def _log_probs(
    logits: jax.Array, cached: TopK | Sampled, mask: jax.Array | None
) -> jax.Array:
    check_vocabulary(logits.shape[-1], cached.vocabulary)
    if logits.shape[:-1] != cached.indices.shape[:-1]:
        raise ValueError(
            f"the student predicts positions {logits.shape[:-1]}, the cache holds "
            f"{cached.indices.shape[:-1]}; both must be of the same batch"
        )
    return log_probs(logits, temperature=cached.temperature, mask=mask)


def _tail(whole: jax.Array, indices: jax.Array) -> jax.Array:
    """Log of the probability of all tokens but these; a difference would cancel."""
    indices = indices.astype(jnp.int32)
    rest = jnp.put_along_axis(whole, indices, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(rest, axis=-1)


def _short(indices: jax.Array, size: int) -> jax.Array:
    return indices.astype(jnp.uint16 if size <= 65_536 else jnp.uint32)

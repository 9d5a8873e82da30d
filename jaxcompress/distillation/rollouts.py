"""On-policy distillation: the student writes, and the teacher judges what it wrote.

A student trained on other people's texts never sees its own mistakes; here it does.
Models are Linen modules like `jaxcompress.models.Transformer`: they have
`init_cache(batch, length)`, and called with a cache they return `(logits, cache)`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.training.steps import LossFn
from jaxcompress.tree.leaf import materialize
from jaxcompress.types import Batch, Model, Params


def rollout(
    model: Model,
    params: Params,
    prompts: jax.Array,
    length: int,
    *,
    temperature: float = 1.0,
    eos_id: int | None = None,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sample what the model writes after prompts, with its cache; traceable.

    Parameters are materialized once for all steps; no gradient passes.

    Args:
      model: see the module.
      params: dense or compressed.
      prompts: `[batch, prompt]`, integers, no padding.
      length: tokens to write after each.
      temperature: of the softmax drawn from; 0 takes the likeliest token.
      eos_id: what follows this token does not count, and repeats it.
      key: of the samples.

    Returns:
      Tokens `[batch, prompt + length]`, and a mask of the same shape that is true where
      a token was written by the model.

    Raises:
      ValueError: an option out of range, an empty prompt.

    Example:
      >>> texts, mask = jc.distillation.rollout(
      ...     model, params, tokens[:, :4], 2, key=key
      ... )
    """
    batch, start = prompts.shape
    if batch < 1 or start < 1 or length < 1:
        raise ValueError(
            f"{batch} prompts of {start} tokens, {length} to write; each must be at "
            "least 1"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 or above")
    params = jax.lax.stop_gradient(materialize(params))

    def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(prompts.dtype)
        drawn = jax.random.categorical(key, logits / temperature, axis=-1)
        return drawn.astype(prompts.dtype)

    def one(carry: Any, key: jax.Array) -> tuple[Any, tuple]:
        token, ended, cache = carry
        logits, cache = model.apply({"params": params}, token[:, None], cache=cache)
        ended = ended | (token == eos_id) if eos_id is not None else ended
        after = draw(logits[:, -1], key)
        after = jnp.where(ended, token, after)
        return (after, ended, cache), (after, ~ended)

    cache = model.init_cache(batch, start + length)
    logits, cache = model.apply({"params": params}, prompts, cache=cache)
    keys = jax.random.split(key, length)
    first, ended = draw(logits[:, -1], keys[0]), jnp.zeros(batch, bool)
    _, (rest, counts) = jax.lax.scan(one, (first, ended, cache), keys[1:])
    tokens = jnp.concatenate([prompts, first[:, None], rest.T], axis=1)
    written = jnp.ones((batch, 1), bool)
    return tokens, jnp.concatenate([prompts < prompts, written, counts.T], axis=1)


def on_policy(
    loss_fn: LossFn,
    model: Model,
    *,
    prompt: int,
    ratio: float = 1.0,
    temperature: float = 1.0,
    eos_id: int | None = None,
) -> LossFn:
    """Build a loss function on texts of which the student writes a fraction itself.

    In each example of a batch chosen with probability `ratio`, all but the first
    `prompt` tokens are replaced by what the student writes now, and its mask by what
    was written. Other examples stay as they are, mask included; so do those that count
    nothing after the prompt, which may end inside it. Of the batch only `tokens` and
    `mask` are passed on.

    Args:
      loss_fn: of `make_train_step`, on `tokens` and `mask` `[batch, length]`; with
        `soft_labels(..., soft=reverse_kl)` or `jensen_shannon`, say.
      model: the student, see `rollout`.
      prompt: tokens of each example that stay.
      ratio: from 0 to 1.
      temperature, eos_id: as for `rollout`.

    Adds the metric `written`, the fraction of examples that the student wrote.

    Raises:
      ValueError: a ratio out of range; when called, a prompt as long as the texts.

    Example:
      >>> on_policy = jc.distillation.on_policy(loss_fn, model, prompt=4, ratio=0.5)

    Source: Agarwal et al. 2024, GKD (arXiv 2306.13649, algorithm 1).
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}; it must be from 0 to 1")
    bound = (
        loss_fn
        if isinstance(loss_fn, jax.tree_util.Partial)
        else jax.tree_util.Partial(loss_fn)
    )
    options = {"temperature": temperature, "eos_id": eos_id}
    return jax.tree_util.Partial(
        functools.partial(_on_policy, model, prompt, ratio, options), bound
    )


def _on_policy(
    model: Model,
    prompt: int,
    ratio: float,
    options: dict[str, Any],
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    tokens = batch["tokens"]
    mask = batch.get("mask", jnp.ones(tokens.shape, bool)) > 0
    if not 1 <= prompt < tokens.shape[1]:
        raise ValueError(
            f"prompt is {prompt}; of texts of {tokens.shape[1]} tokens it must leave "
            "some to write, and be at least 1"
        )
    writing, choosing, key = jax.random.split(key, 3)
    own, written = rollout(
        model,
        params,
        tokens[:, :prompt],
        tokens.shape[1] - prompt,
        key=writing,
        **options,
    )
    chosen = jax.random.bernoulli(choosing, float(ratio), (tokens.shape[0], 1))
    chosen &= mask[:, prompt:].any(axis=1, keepdims=True)
    mixed = {
        "tokens": jnp.where(chosen, own, tokens),
        "mask": jnp.where(chosen, written, mask),
    }
    loss, metrics = loss_fn(params, mixed, key)
    return loss, metrics | {"written": chosen.mean(dtype=jnp.float32)}

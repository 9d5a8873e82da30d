"""Texts from a language model, one token at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.models.cache import cache_length, grow_cache
from jaxcompress.models.sampling import sample, sample_rows
from jaxcompress.models.transformer import Transformer
from jaxcompress.models.written_text import Written
from jaxcompress.running.compressed_matmul.context import compressed_matmul, surrounding
from jaxcompress.running.compressed_matmul.products import multiplies
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tokenization import Tokenizer
from jaxcompress.tree.leaf import is_leaf, materialize
from jaxcompress.types import Params

__all__ = ["generate", "sample"]

SLACK = 64  # lengths are rounded up to this, so that similar calls share a compilation
FIRST = 256  # slots of a cache at first, if it may need more; it doubles when full


def generate(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    *,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
    end_ids: Sequence[int] | None = None,
    on_text: Callable[[str, int], Any] | None = None,
    key: jax.Array | None = None,
) -> Any:
    """Write the text that follows a prompt, or each of several at once.

    A text ends after `max_tokens` tokens, at an end mark, or before a stop string.
    Temperature 0 takes the likeliest token each time, any other needs a `key`.

    Parameters may be compressed. Losslessly coded arrays are decoded before the first
    token, and their integers packed, as `decode_once(packed=True)` does, which saves
    that for several calls; layers multiply by the stored parts, as in
    `compressed_matmul`, with the activations of a `compressed_matmul` around the call.

    Args:
      model: a `Transformer`.
      params: dense or compressed.
      tokenizer: of the model.
      prompt: a text, or several; shorter ones are padded on the left.
      max_tokens: of each text, at most.
      temperature, top_k, top_p: as for `sample`.
      stop: strings that end a text; they are not part of the result.
      end_ids: tokens that end a text; those of the tokenizer if None.
      on_text: called with each new piece of a text and the number of its prompt.
        Pieces are whole characters and add up to the result.
      key: of the draws. Text `i` depends on it, on `i` and on its own prompt.

    Returns:
      The text without the prompt, or a list of them for several prompts.

    Raises:
      ValueError: options out of range, or an empty prompt where the tokenizer has no
        begin mark.

    Example:
      >>> text = jc.models.generate(model, params, tokenizer, "a small", max_tokens=4)
    """
    _check(max_tokens, temperature, top_k, top_p, stop, key)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        return []
    rows = [_ids(model, tokenizer, text) for text in prompts]
    ends = set(tokenizer.end_ids if end_ids is None else end_ids)
    texts = [
        Written(tokenizer, ids, ends, tuple(stop), on_text, row)
        for row, ids in enumerate(rows)
    ]
    padded = -(-max(map(len, rows)) // SLACK) * SLACK
    tokens = np.zeros((len(rows), padded), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, padded - len(ids) :] = ids
    skipped = jnp.asarray([padded - len(ids) for ids in rows], jnp.int32)
    most = padded + -(-max_tokens // SLACK) * SLACK
    capacity = most if most <= 2 * FIRST else max(padded + SLACK, FIRST)
    cache = model.init_cache(len(rows), capacity)
    step = functools.partial(
        _step,
        model,
        (surrounding(), temperature == 0, top_k is not None or top_p is not None),
        _to_run(model, params),
        skipped=skipped,
        settings=(
            np.float32(temperature),
            np.int32(model.vocab_size if top_k is None else top_k),
            np.float32(1.0 if top_p is None else top_p),
        ),
    )
    key = jax.random.key(0) if key is None else key
    token, next_tokens, cache = step(jnp.asarray(tokens), cache, key, np.int32(0))
    for number in range(1, max_tokens + 1):
        for text, new in zip(texts, np.asarray(token).tolist(), strict=True):
            text.add(new)
        if number == max_tokens or all(text.ended for text in texts):
            break
        if padded + number > cache_length(cache):
            cache = grow_cache(cache, min(most, 2 * cache_length(cache)))
        token, next_tokens, cache = step(next_tokens, cache, key, np.int32(number))
    results = [text.finish() for text in texts]
    return results[0] if isinstance(prompt, str) else results


def _ids(model: Transformer, tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty and the tokenizer has no begin mark")
    if max(ids) >= model.vocab_size:
        raise ValueError(
            f"the tokenizer gives id {max(ids)}, and the model's vocabulary has "
            f"{model.vocab_size}; they do not belong together"
        )
    return ids


def _to_run(model: Transformer, params: Params) -> Params:
    """Decode what every step would decode again."""
    params = decode_once(params, packed=True)
    table = params["embed"]["embedding"]
    if model.tied and is_leaf(table) and not multiplies(table, (1,)):
        params = {**params, "embed": jax.jit(materialize)(params["embed"])}
    return params


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _step(model, how, params, tokens, cache, key, number, *, skipped, settings):
    """Read tokens [B, T] into the cache and draw the next ones, [B] and [B, 1].

    The first `skipped[b]` slots of the cache hold the padding of text b.
    """
    activations, greedy, cut = how
    slots = jnp.arange(cache_length(cache), dtype=jnp.int32)
    new = cache["index"] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    with compressed_matmul(activations=activations):
        logits, cache = model.apply(
            {"params": params},
            tokens,
            positions=jnp.maximum(new[None, :] - skipped[:, None], 0),
            mask=slots[None, :] >= skipped[:, None],
            cache=cache,
            last=True,
        )
    key = jax.random.fold_in(key, number)
    token = sample_rows(logits[:, 0], key, *settings, greedy=greedy, cut=cut)
    return token, token[:, None], cache


def _check(max_tokens, temperature, top_k, top_p, stop, key):
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must not be negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop is {stop!r}; give a list of strings that are not empty")
    if temperature > 0 and key is None:
        raise ValueError("sampling needs a key: pass key=jax.random.key(...)")

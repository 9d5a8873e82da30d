"""Calibration text that the model writes itself, many texts at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.models.cache import grow_cache
from jaxcompress.models.sampling import draw_rows
from jaxcompress.models.stacking import unstack_layers
from jaxcompress.models.transformer import Transformer
from jaxcompress.types import Params

SEGMENT = 64  # tokens that one compiled call writes; progress is told after each
SLOTS = 128  # by which the cache grows


def write_text(
    model: Any,
    params: Params,
    *,
    count: int,
    length: int,
    start: int,
    batch: int = 16,
    temperature: float = 1.0,
    progress: Any = iter,
    key: jax.Array,
) -> np.ndarray:
    """Sample texts from a language model, each from the begin mark.

    Nothing is downloaded, and the text is in the languages that the model speaks. A
    compiled call writes 64 tokens of each text of a batch; the cache grows with the
    texts, a compilation for each 128 tokens. Sampling continues after an end mark, as
    in a training stream of many documents.

        ids = write_text(model, params, count=64, length=512, start=1, key=key)

    Args:
      model: a `Transformer`, or another module with its `init_cache`. A scanned
        `Transformer` is run looped: its cache is then updated in place.
      params: dense, or decoded for running.
      count: of texts.
      length: of each, in tokens, the begin mark included; 2 or more.
      start: the begin mark; where a model has none, its end mark serves.
      batch: texts at a time, at most; batches are of equal size.
      temperature: above 0; 1 samples from the model.
      progress: a wrapper of the list of calls.
      key: of the draws. Text `i` of a batch depends on it alone.

    Returns:
      int32 `[count, length]`.

    Raises:
      ValueError: an option out of range.

    Source: data-free calibration from the model's own samples, LLM-QAT (Liu et al.
    2023, arXiv 2305.17888, section 2.1), here without its deterministic first tokens.
    """
    if count < 1 or length < 2 or batch < 1:
        raise ValueError(
            f"{count} texts of {length} tokens, {batch} at a time; at least 1 text of "
            "2 tokens, 1 at a time"
        )
    if not temperature > 0:
        raise ValueError(f"sampling needs a temperature above 0, not {temperature!r}")
    if isinstance(model, Transformer) and model.scan:
        # A scan over layers copies its cache at every token.
        model, params = model.clone(scan=False), unstack_layers(params)
    batches = -(-count // batch)
    batch = -(-count // batches)
    segment = min(SEGMENT, length)
    segments = -(-(length - 1) // segment)
    texts: list[list[np.ndarray]] = [[] for _ in range(batches)]
    carry: Any = None
    calls = [(i, j) for i in range(batches) for j in range(segments)]
    for number, place in progress(calls):
        slots = -(-(place + 1) * segment // SLOTS) * SLOTS
        if place == 0:
            first = jnp.full((batch, 1), start, jnp.int32)
            carry = first, model.init_cache(batch, slots)
            texts[number].append(np.asarray(first))
        elif place * segment % SLOTS == 0:
            carry = carry[0], _grow(carry[1], slots)
        carry, tokens = _write(
            model,
            params,
            carry,
            jax.random.fold_in(jax.random.fold_in(key, number), place),
            jnp.float32(temperature),
            steps=segment,
        )
        texts[number].append(np.asarray(tokens, np.int32))
    rows = [np.concatenate(parts, axis=1)[:, :length] for parts in texts]
    return np.concatenate(rows)[:count]


def _grow(cache: Any, slots: int) -> Any:
    """Grow the cache layer by layer, so that only one of them is held twice."""
    for name in list(cache):
        if name != "index":
            larger = grow_cache({"layer": cache.pop(name)}, slots)["layer"]
            cache[name] = jax.block_until_ready(larger)
    return cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps", donate_argnums=2)
def _write(
    model: Any,
    params: Params,
    carry: Any,
    key: jax.Array,
    temperature: jax.Array,
    *,
    steps: int,
) -> tuple[Any, jax.Array]:
    """Return the carry, last tokens `[B, 1]` and cache, and new tokens `[B, steps]`."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        token, cache = carry
        logits, cache = model.apply({"params": params}, token, cache=cache)
        token = draw_rows(logits[:, -1] / temperature, key)[:, None]
        return (token, cache), token[:, 0]

    carry, tokens = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return carry, tokens.T

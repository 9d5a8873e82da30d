"""Calibration text that the model writes itself, many texts at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.models.sampling import draw_rows
from jaxcompress.types import Params


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

    Nothing is downloaded, and the text is in the languages that the model speaks. One
    compilation serves all texts; texts of a batch are written side by side. Sampling
    continues after an end mark, as in a training stream of many documents.

        ids = write_text(model, params, count=64, length=512, start=1, key=key)

    Args:
      model: a `Transformer`, or another module with its `init_cache`.
      params: dense, or decoded for running.
      count: of texts.
      length: of each, in tokens, the begin mark included; 2 or more.
      start: the begin mark; where a model has none, its end mark serves.
      batch: texts at a time; the last batch writes as many and drops what is not asked.
      temperature: above 0; 1 samples from the model.
      progress: a wrapper of the list of batches.
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
    batch = min(batch, count)
    texts = []
    for number in progress(list(range(-(-count // batch)))):
        tokens = _write(
            model,
            params,
            jax.random.fold_in(key, number),
            jnp.float32(temperature),
            batch=batch,
            length=length,
            start=start,
        )
        texts.append(np.asarray(tokens, np.int32))
    return np.concatenate(texts)[:count]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("batch", "length"))
def _write(
    model: Any,
    params: Params,
    key: jax.Array,
    temperature: jax.Array,
    *,
    batch: int,
    length: int,
    start: int | jax.Array,
) -> jax.Array:
    first = jnp.full((batch, 1), start, jnp.int32)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        token, cache = carry
        logits, cache = model.apply({"params": params}, token, cache=cache)
        token = draw_rows(logits[:, -1] / temperature, key)[:, None]
        return (token, cache), token[:, 0]

    cache = model.init_cache(batch, length)
    keys = jax.random.split(key, length - 1)
    _, rest = jax.lax.scan(step, (first, cache), keys)
    return jnp.concatenate([first, rest.T], axis=1)

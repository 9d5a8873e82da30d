"""Text from a language model, one token at a time."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxcompress.models.transformer import Transformer
from jaxcompress.running.compressed_matmul.context import compressed_matmul, surrounding
from jaxcompress.running.compressed_matmul.products import multiplies
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tokenization import Tokenizer
from jaxcompress.tree.leaf import is_leaf, materialize
from jaxcompress.types import Params

_ROOM = 64  # lengths are rounded up to this, so that similar calls share a compilation


def generate(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
) -> str:
    """The text that the model writes after the prompt, without the prompt.

    Ends after `max_tokens` tokens or at the tokenizer's end mark. Temperature 0 takes
    the likeliest token each time, any other needs a `key`.

    Parameters may be compressed. Losslessly coded arrays are decoded once, before the
    first token; layers multiply by the other stored parts, as in `compressed_matmul`,
    with the activations of a `compressed_matmul` around the call.

    Raises:
      ValueError: options out of range, or an empty prompt where the tokenizer has no
        begin mark.
    """
    _check(max_tokens, temperature, top_k, top_p, key)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty and the tokenizer has no begin mark")
    if max(ids) >= model.vocab_size:
        raise ValueError(
            f"the tokenizer gives id {max(ids)}, and the model's vocabulary has "
            f"{model.vocab_size}; they do not belong together"
        )
    count = len(ids)
    padded = -(-count // _ROOM) * _ROOM
    cache = model.init_cache(1, padded + -(-max_tokens // _ROOM) * _ROOM)
    settings = (
        jnp.float32(temperature),
        jnp.int32(model.vocab_size if top_k is None else top_k),
        jnp.float32(1.0 if top_p is None else top_p),
    )
    keys = jax.random.split(jax.random.key(0) if key is None else key, max_tokens)
    params = _to_run(model, params)
    step = partial(_step, model, surrounding(), params)
    tokens = jnp.array([ids + [0] * (padded - count)], jnp.int32)
    token, cache = step(tokens, count, cache, keys[0], *settings)
    ids.append(int(token))
    for key in keys[1:]:
        if ids[-1] in tokenizer.end_ids:
            break
        tokens = token.reshape(1, 1)
        token, cache = step(tokens, 1, cache, key, *settings)
        ids.append(int(token))
    if ids[-1] in tokenizer.end_ids:
        ids.pop()
    return tokenizer.decode(ids)[len(tokenizer.decode(ids[:count])) :]


def sample(
    logits: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """A token drawn from logits [V], after temperature, then top-k, then top-p.

    All settings may be traced. Temperature 0 gives the likeliest token. Top-p keeps the
    smallest set of likeliest tokens that holds at least `top_p` of the probability
    (Holtzman et al., 2019, arXiv 1904.09751); tokens equal to the last kept one stay.
    """
    return jax.lax.cond(
        temperature > 0,
        lambda: _drawn(logits, key, temperature, top_k, top_p),
        lambda: jnp.argmax(logits),
    )


def _drawn(
    logits: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)  # 0 under vmap
    ranked = jnp.sort(scaled, descending=True)
    ranked = jnp.where(jnp.arange(ranked.size) < top_k, ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked)
    before = jnp.cumsum(chances) - chances
    kept = (before < top_p) & (ranked > -jnp.inf)
    least = jnp.min(ranked, where=kept, initial=jnp.inf)
    return jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf))


def _to_run(model: Transformer, params: Params) -> Params:
    """Decodes what every step would decode again."""
    params = decode_once(params)
    table = params["embed"]["embedding"]
    if model.tied and is_leaf(table) and not multiplies(table, (1,)):
        params = {**params, "embed": jax.jit(materialize)(params["embed"])}
    return params


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _step(model, how, params, tokens, count, cache, key, temperature, top_k, top_p):
    """Read `count` of tokens [1, T] into the cache and draw the next one.

    What stands behind them is padding: its cache slots lie past the index, where
    nothing looks until they are written again.
    """
    start = cache["index"]
    with compressed_matmul(activations=how):
        logits, cache = model.apply({"params": params}, tokens, cache=cache)
    token = sample(logits[0, count - 1], key, temperature, top_k, top_p)
    return token, cache | {"index": start + jnp.int32(count)}


def _check(max_tokens, temperature, top_k, top_p, key):
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must not be negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if temperature > 0 and key is None:
        raise ValueError("sampling needs a key: pass key=jax.random.key(...)")

"""Tokens drawn from logits: temperature, top-k, top-p."""

import functools
import math

import jax
import jax.numpy as jnp

TOGETHER = 256  # probabilities that are added up before one of them is looked for


def sample(
    logits: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """Draw a token from logits [V], after temperature, then top-k, then top-p.

    All settings may be traced. Temperature 0 gives the likeliest token. Top-p keeps the
    smallest set of likeliest tokens that holds at least `top_p` of the probability
    (Holtzman et al., 2019, arXiv 1904.09751); tokens equal to the last kept one stay.
    """
    return jax.lax.cond(
        temperature > 0,
        lambda: draw(_cut(logits, temperature, top_k, top_p), key),
        lambda: jnp.argmax(logits),
    )


def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Draw a token from logits [V], each with its probability; one random number.

    The cumulative distribution is inverted in two steps, over groups of tokens and
    within one, which takes one pass over the logits; `jax.random.categorical` takes a
    random number and two logarithms for each of them.
    """
    size = logits.size
    groups = math.ceil(size / TOGETHER)
    weights = jnp.exp(logits.astype(jnp.float32) - jnp.max(logits))
    weights = jnp.pad(weights, (0, groups * TOGETHER - size)).reshape(groups, TOGETHER)
    sums = jnp.cumsum(weights.sum(axis=1))
    below = jnp.nextafter(sums[-1], jnp.zeros((), sums.dtype))  # products may round up
    wanted = jnp.minimum(jax.random.uniform(key) * sums[-1], below)
    group = jnp.sum(sums <= wanted)
    before = jnp.where(group > 0, sums[jnp.maximum(group - 1, 0)], 0)
    inside = jnp.cumsum(weights[group])
    passed = before + inside > wanted
    possible = weights[group] > 0
    first = jnp.argmax(passed & possible)
    last = TOGETHER - 1 - jnp.argmax(possible[::-1])  # where rounding passes none
    place = jnp.where(jnp.any(passed & possible), first, last)
    return group * TOGETHER + place


@functools.partial(jax.jit, static_argnames=("greedy", "cut"))
def sample_rows(
    logits: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    *,
    greedy: bool,
    cut: bool,
) -> jax.Array:
    """Draw a token for each row of logits [B, V]; int32 [B].

    A row depends on the key and its own number and logits alone. `greedy` takes the
    likeliest; without `cut` the settings `top_k` and `top_p` are not looked at.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if cut:
        settings = (temperature, top_k, top_p)
        logits = jax.vmap(lambda row: _cut(row, *settings))(logits)
    else:
        logits = logits / temperature
    return draw_rows(logits, key)


def draw_rows(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Draw a token for each row of logits [B, V] as `draw` does; int32 [B]."""
    numbers = jnp.arange(logits.shape[0])
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
    return jax.vmap(draw)(logits, keys).astype(jnp.int32)


def _cut(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Return scaled logits, -inf for tokens that top-k and top-p drop."""
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)  # 0 under vmap
    ranked = jnp.sort(scaled, descending=True)
    ranked = jnp.where(jnp.arange(ranked.size) < top_k, ranked, -jnp.inf)
    chances = jax.nn.softmax(ranked)
    before = jnp.cumsum(chances) - chances
    kept = (before < top_p) & (ranked > -jnp.inf)
    least = jnp.min(ranked, where=kept, initial=jnp.inf)
    return jnp.where(scaled >= least, scaled, -jnp.inf)

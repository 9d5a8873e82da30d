"""Mix a model's logits with what the text itself has shown so far, in exact integers.

A mixer belongs to one lane. Before each token it changes the logits; after each token
it learns, by one step down the gradient of that token's code length:

1. *Temperature*: one factor of all logits.
2. *Bias*: one addend for each token of the vocabulary.
3. *Matches*: positions of the text whose preceding tokens equal the last ones. The
   token that followed there gains `weight[length] * surprise`, where `length` is that
   of the match (1 to 6 tokens) and `surprise` is one less the probability that the
   token had there. The weights are learned; the 16 longest matches take part, the
   latest first.

Encoder and decoder run the same steps, so that they get the same integers. The matches
are a pointer to the text, as in "Improving Neural Language Models with a Continuous
Cache" (Grave, Joulin and Usunier, arXiv:1612.04426, 2016), but looked up by tokens and
weighted by an online logistic mixer (Mahoney, "Adaptive weighing of context models for
lossless data compression", 2005).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.textcoding import fixed_point as fp
from jaxcompress.textcoding.fixed_point import ONE

MATCHES = 16
LONGEST = 6  # tokens; longer matches count as this
MOST_TOKENS = 1 << 24  # of a lane: positions of matches take 24 bits

_SHIFT = 8  # biases and weights have so many more fractional bits than logits
_UNIT = 1 << (fp.FRACTION + _SHIFT)  # one bit, as a bias or a weight
# Weights of matches in bits, the rates in bits for a probability that is wrong by one.
_WEIGHTS = (0.4, 0.6, 1.6, 3.1, 4.0, 5.0)
_BIAS_RATE = round(0.2 * _UNIT)
_WEIGHT_RATE = round(0.04 * _UNIT)
_TEMPERATURE_RATE = 363  # 2**-27 for 2**-8 bits
_TEMPERATURE = 1 << 27
_MOST_SHARE = ONE + ONE // 2  # of the surprise of one token at one length
_SMALLEST = -(1 << 27)  # of a logit less the largest
_CLIPPED = 20 << 8  # the temperature is learned from 20 bits below the largest logit


class Mixer(NamedTuple):
    """State of a lane: int32 arrays for a vocabulary of V and N positions.

    Args:
      bias: `[V]`, in `2**-20` bits.
      temperature: scalar, in `2**-27`.
      weights: `[LONGEST]`, in `2**-20` bits.
      tokens: `[N]`, those seen, then -1.
      surprise: `[N]`, Q15.
      matched: `[N]`, how many tokens before each position equal the last ones.
      count: scalar, tokens seen.
    """

    bias: jax.Array
    temperature: jax.Array
    weights: jax.Array
    tokens: jax.Array
    surprise: jax.Array
    matched: jax.Array
    count: jax.Array


class Matches(NamedTuple):
    """Tokens that followed matches, int32 `[MATCHES]`; `share` is 0 where there is no
    match, or where an earlier entry has the same token and length.
    """

    tokens: jax.Array
    lengths: jax.Array
    share: jax.Array


def start(vocabulary: int, length: int) -> Mixer:
    """Return a mixer that has seen nothing, for lanes of `length` tokens at most."""
    return Mixer(
        jnp.zeros(vocabulary, jnp.int32),
        jnp.int32(_TEMPERATURE),
        jnp.array(np.rint(np.array(_WEIGHTS) * _UNIT), jnp.int32),
        jnp.full(length, -1, jnp.int32),
        jnp.zeros(length, jnp.int32),
        jnp.zeros(length, jnp.int32),
        jnp.int32(0),
    )


def mix(mixer: Mixer, logits: jax.Array) -> tuple[jax.Array, Matches]:
    """Return mixed logits `[V]`, at most 0 before bias and matches, and the matches."""
    scaled = fp.multiply(_centered(logits), mixer.temperature >> 12)
    mixed = scaled + (mixer.bias >> _SHIFT)
    matches = _find(mixer)
    weight = mixer.weights[matches.lengths - 1]
    return mixed.at[matches.tokens].add(
        fp.multiply(weight, matches.share) >> _SHIFT
    ), matches


def learn(
    mixer: Mixer,
    logits: jax.Array,
    mixed: jax.Array,
    matches: Matches,
    token: jax.Array,
) -> Mixer:
    """Return the mixer after a token; `mixed` and `matches` are of `mix`."""
    share = _probabilities(mixed)
    bias = mixer.bias - fp.multiply(jnp.int32(_BIAS_RATE), share)
    bias = jnp.clip(bias.at[token].add(_BIAS_RATE), -(1 << 26), 1 << 26)
    # The temperature: how far the token's logit is above the expected one.
    coarse = jnp.maximum(_centered(logits) >> (fp.FRACTION - 8), -_CLIPPED)
    expected = jnp.sum(share * coarse, dtype=jnp.int32) >> 15
    temperature = mixer.temperature + _TEMPERATURE_RATE * (coarse[token] - expected)
    temperature = jnp.clip(
        temperature, _TEMPERATURE >> 1, _TEMPERATURE + (_TEMPERATURE >> 1)
    )
    hit = jnp.where(matches.tokens == token, ONE, 0)
    error = fp.multiply(hit - share[matches.tokens], matches.share)
    weights = mixer.weights.at[matches.lengths - 1].add(
        fp.multiply(error, _WEIGHT_RATE)
    )
    weights = jnp.clip(weights, -(1 << 25), 1 << 25)
    longer = jnp.where(mixer.tokens == token, mixer.matched + 1, 0)
    place = mixer.count
    matched = jnp.concatenate([jnp.zeros(1, jnp.int32), longer[:-1]])
    return Mixer(
        bias,
        temperature,
        weights,
        mixer.tokens.at[place].set(token),
        mixer.surprise.at[place].set(ONE - share[token]),
        jnp.minimum(matched, LONGEST),
        place + 1,
    )


def _find(mixer: Mixer) -> Matches:
    """Return the longest matches, the latest of equal length first."""
    places = jnp.arange(len(mixer.tokens), dtype=jnp.int32)
    usable = (mixer.matched > 0) & (places < mixer.count)
    order = jnp.where(usable, (mixer.matched << 24) | places, -1)
    order, count = _largest(order), MATCHES
    exists = order >= 0
    place = jnp.where(exists, order & (MOST_TOKENS - 1), 0)
    lengths = jnp.where(exists, order >> 24, 1)
    tokens = jnp.where(exists, mixer.tokens[place], 0)
    surprise = jnp.where(exists, mixer.surprise[place], 0)
    same = (tokens[:, None] == tokens[None]) & (lengths[:, None] == lengths[None])
    same &= exists[:, None] & exists[None]
    share = jnp.sum(jnp.where(same, surprise[None], 0), axis=1, dtype=jnp.int32)
    first = exists & ~jnp.any(same & np.tri(count, k=-1, dtype=bool), axis=1)
    return Matches(
        tokens, lengths, jnp.where(first, jnp.minimum(share, _MOST_SHARE), 0)
    )


def _largest(keys: jax.Array) -> jax.Array:
    """Return the MATCHES largest of keys `[N]`, which differ unless they are -1.

    Each is found in the block of largest maximum: much faster than a sort on CPU.
    """
    size = 1 << ((len(keys) - 1).bit_length() + 1) // 2
    rows = jnp.pad(keys, (0, -len(keys) % size), constant_values=-1)
    rows = rows.reshape(-1, size)

    def take(i: jax.Array, carry: Any) -> Any:
        rows, largest, out = carry
        block = jnp.argmax(largest)
        row = jnp.where(rows[block] == largest[block], -1, rows[block])
        out = out.at[i].set(largest[block])
        return rows.at[block].set(row), largest.at[block].set(jnp.max(row)), out

    carry = (rows, jnp.max(rows, axis=1), jnp.full(MATCHES, -1, jnp.int32))
    return jax.lax.fori_loop(0, MATCHES, take, carry)[2]


def _centered(logits: jax.Array) -> jax.Array:
    return jnp.maximum(logits - jnp.max(logits), _SMALLEST)


def _probabilities(logits: jax.Array) -> jax.Array:
    """Return probabilities in Q15 of logits `[V]`, each rounded."""
    power = fp.power_of_half(jnp.max(logits) - logits)
    spare = max(0, (len(logits) - 1).bit_length() - 16)
    total = jnp.sum(power >> spare, dtype=jnp.int32) >> 1
    room = jax.lax.clz(total) - 2
    short = ((total << room) + (ONE - 1)) >> 15  # rounded up, [2**14, 2**15]
    inverse = jax.lax.div(jnp.int32(1 << 29), short)
    return fp.shift_right(power * inverse, 30 + spare - room)

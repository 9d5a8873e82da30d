"""Arithmetic on int32 that never rounds differently: rows of integers with an exponent.

Every function is a fixed sequence of integer additions, products, shifts and
comparisons whose results fit in int32 whatever the inputs. Results therefore depend on
the inputs alone: not on the device, the batch, the order of a sum or the compiler.

Two formats are used. `Rows` is block floating point: int32 values that share one
exponent along the last axis. Q15 is a fraction: an int32 `q` means `q / 2**15`,
and is between -1 and 1. Shifts to the right round to nearest, ties upwards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LIMIT = 1 << 30  # no value of `Rows` is larger in magnitude
ONE = 1 << 15  # one in Q15
FRACTION = 12  # fractional bits of a base-2 logarithm
LOG_LIMIT = 31 << FRACTION  # 2 to the minus this is zero in Q15

_HALF_LOG2_E = 23637  # log2(e) / 2 in Q15
# 2**-x on [0, 1) as a cubic in Q15; its relative error is at most 1.1e-4.
_CUBIC = (32768, -22657, 7555, -1282)


class Rows(NamedTuple):
    """Real numbers `values * 2**exponent`: values int32 `[..., n]`, at most LIMIT.

    `exponent` is int32 with a last axis of 1, so that it broadcasts against the values.
    """

    values: jax.Array
    exponent: jax.Array


def shift_right(x: jax.Array, bits: jax.Array | int) -> jax.Array:
    """Divide by `2**bits` and round; `|x|` at most LIMIT, bits clipped to 0..30."""
    bits = jnp.clip(jnp.asarray(bits, jnp.int32), 0, 30)
    return (x + ((1 << bits) >> 1)) >> bits


def multiply(x: jax.Array, q: jax.Array | int) -> jax.Array:
    """Round `x * q / 2**15`; `|x|` at most LIMIT, `q` in Q15.

    The product has up to 46 bits and is computed in two halves.
    """
    high, low = x >> 15, x & (ONE - 1)
    return high * q + ((low * q + (ONE >> 1)) >> 15)


def normalize(rows: Rows) -> Rows:
    """Return the same numbers with the largest value of each row in [2**29, 2**30]."""
    room = jnp.maximum(lax.clz(_largest(rows)) - 2, 0)
    return Rows(rows.values << room, rows.exponent - room)


def add(x: Rows, y: Rows) -> Rows:
    """Return sum of two arrays of rows, rounded to about 29 bits of the larger one."""
    x, y = normalize(x), normalize(y)
    exponent = jnp.maximum(x.exponent, y.exponent) + 1
    values = shift_right(x.values, exponent - x.exponent)
    values = values + shift_right(y.values, exponent - y.exponent)
    return normalize(Rows(values, exponent))


def round_to(rows: Rows, bound: jax.Array | int) -> Rows:
    """Round to integers of magnitude `bound` at most, by a shift of each row.

    The largest value of a row becomes about half the bound or more.
    """
    rows = normalize(rows)
    bits = lax.clz(jnp.asarray(bound, jnp.int32)) - 2  # 30 less the bits of the bound
    over = shift_right(_largest(rows), bits) > bound
    bits = bits + over.astype(jnp.int32)
    return Rows(shift_right(rows.values, bits), rows.exponent + bits)


def to_fixed(rows: Rows, fraction: int, limit: int = LIMIT) -> jax.Array:
    """Return fixed point with `fraction` fractional bits; clamped to `limit` in
    magnitude.
    """
    bits = rows.exponent + fraction
    smaller = shift_right(rows.values, -bits)
    left = jnp.clip(bits, 0, 30)
    fits = jnp.abs(rows.values) <= jnp.int32(limit) >> left
    larger = jnp.where(fits, rows.values << left, jnp.sign(rows.values) * limit)
    return jnp.clip(jnp.where(bits > 0, larger, smaller), -limit, limit)


def power_of_half(u: jax.Array) -> jax.Array:
    """Compute `2**-u` in Q15, for `u >= 0` with FRACTION fractional bits."""
    part = u & ((1 << FRACTION) - 1)
    power = jnp.full_like(u, _CUBIC[3])
    for coefficient in _CUBIC[2::-1]:
        power = coefficient + shift_right(power * part, FRACTION)
    return shift_right(power, u >> FRACTION)


def sigmoid(x: Rows) -> jax.Array:
    """Compute `1 / (1 + exp(-x))` in Q15."""
    magnitude = Rows(multiply(jnp.abs(x.values), _HALF_LOG2_E), x.exponent + 1)
    power = power_of_half(to_fixed(magnitude, FRACTION, LOG_LIMIT))
    above = jnp.where(x.values < 0, power, ONE)
    return lax.div(above << 15, power + ONE)


def product(x: Rows, y: Rows) -> Rows:
    """Return the element-wise product; each factor is rounded to 15 bits of its row
    first.
    """
    x, y = normalize(x), normalize(y)
    values = shift_right(x.values, 15) * shift_right(y.values, 15)
    return Rows(values, x.exponent + y.exponent + 30)


def inverse_root(x: Rows) -> Rows:
    """Compute `1 / sqrt(x)` of rows of one positive number each; values in [2**14,
    2**15].
    """
    x = normalize(x)
    odd = x.exponent & 1
    value = x.values >> odd  # [2**28, 2**30], with an even exponent

    def refine(i: jax.Array, root: jax.Array) -> jax.Array:
        larger = root + (jnp.int32(1 << 13) >> i)
        return jnp.where(larger * larger <= value, larger, root)

    # The largest root whose square is not above the value, bit by bit.
    root = lax.fori_loop(0, 14, refine, jnp.full_like(value, 1 << 14))
    half = (x.exponent + odd) >> 1
    return Rows(lax.div(jnp.full_like(root, 1 << 29), root), -29 - half)


def divide_by_rms(x: Rows, epsilon: Rows) -> Rows:
    """Divide each row by its root mean square; `epsilon` is added to the square."""
    x = normalize(x)
    n = x.values.shape[-1]
    bits = (n - 1).bit_length()
    short = shift_right(x.values, 15)
    squares = shift_right(short * short, bits)  # their sum is at most LIMIT + n / 2
    total = jnp.sum(squares, axis=-1, keepdims=True, dtype=jnp.int32)
    total = multiply(jnp.minimum(total, LIMIT), ((ONE >> 1) << bits) // n)
    mean = Rows(total, 2 * x.exponent + 31)
    inverse = inverse_root(add(mean, epsilon))
    values = multiply(x.values, inverse.values)
    return normalize(Rows(values, x.exponent + inverse.exponent + 15))


def _largest(rows: Rows) -> jax.Array:
    return jnp.max(jnp.abs(rows.values), axis=-1, keepdims=True)

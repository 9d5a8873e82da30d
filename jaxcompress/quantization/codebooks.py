"""Grids of unevenly spaced levels: the small floating-point formats, and NF4.

A code is the bit pattern of the format (for NF4 the index of the level), so packed
codes are what hardware for the format reads. Each grid is a pair of elementwise
functions of the ratio `x / scale`, as in `grids`; infinities are never encoded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.types import DType

# Levels at even quantiles of a normal distribution, zero exact: Dettmers et al. 2023,
# "QLoRA" (arXiv 2305.14314, appendix E).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)
# One sign bit, two of exponent, one of mantissa: OCP Microscaling Formats 1.0 (2023),
# section 5.3.3. Codes 8 to 15 are the negatives; that of -0 is not used.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


class Levels(NamedTuple):
    """`encode(ratio)` gives codes, `decode(codes)` float32 ratios; `bits` per code.

    `largest` is the largest magnitude, which a scale maps the largest weight to.
    """

    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    bits: int
    largest: float


def _table(levels: np.ndarray, bits: int) -> Levels:
    order = np.argsort(levels, kind="stable")
    order = order[np.append(True, np.diff(levels[order]) > 0)]  # zero once, as +0
    middles = (levels[order][1:] + levels[order][:-1]) / 2

    def encode(ratio: jax.Array) -> jax.Array:
        # One comparison per level: a search would gather element by element.
        rank: Any = sum((ratio > middle).astype(jnp.uint8) for middle in middles)
        if np.array_equal(order, np.arange(order.size)):
            return rank
        return jnp.asarray(order, jnp.uint8)[rank]

    def decode(codes: jax.Array) -> jax.Array:
        return jnp.asarray(levels)[codes.astype(jnp.int32)]

    return Levels(encode, decode, bits, float(np.abs(levels).max()))


def _float8(dtype: DType, largest: float) -> Levels:
    finest = jnp.finfo(dtype).minexp  # below this power of two steps stay the same
    digits = jnp.finfo(dtype).nmant

    def encode(ratio: jax.Array) -> jax.Array:
        # Clipped first: beyond the largest is NaN or infinity. Rounded in float32,
        # for under `jit` XLA may drop a cast there and back.
        near = jnp.clip(ratio, -largest, largest)
        _, exponent = jnp.frexp(near)  # magnitudes are below 2^exponent
        step = jnp.ldexp(1.0, jnp.maximum(exponent - 1, finest) - digits)
        near = (jnp.round(near / step) * step).astype(dtype)
        return jax.lax.bitcast_convert_type(near, jnp.uint8)

    def decode(codes: jax.Array) -> jax.Array:
        exact = jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), dtype)
        return exact.astype(jnp.float32)

    return Levels(encode, decode, 8, largest)


def _encode_exponent(ratio: jax.Array) -> jax.Array:
    """Return the nearest power of two, by ratio; ratios are positive or NaN."""
    _, exponent = jnp.frexp(ratio * np.float32(2**0.5))
    code = jnp.clip(exponent - 1, -126, 127) + 127
    return jnp.where(jnp.isfinite(ratio), code, 255)


def _decode_exponent(codes: jax.Array) -> jax.Array:
    codes = codes.astype(jnp.uint32)
    value = jax.lax.bitcast_convert_type(codes << np.uint32(23), jnp.float32)
    return jnp.where(codes == 255, jnp.nan, value)


LEVELS: dict[str, Levels] = {
    "nf4": _table(NF4, 4),
    "e2m1": _table(E2M1, 4),
    "e4m3": _float8(jnp.float8_e4m3fn, 448.0),
    "e5m2": _float8(jnp.float8_e5m2, 57344.0),
    "e8m0": Levels(_encode_exponent, _decode_exponent, 8, 2.0**127),
}

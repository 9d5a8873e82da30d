"""Round to nearest: steps from the weights alone, codes by rounding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.calibration.moments import Moments
from jaxcompress.quantization.grids import (
    Block,
    Quantized,
    Scheme,
    Steps,
    decode,
    encode,
    quantized,
    round_to,
    spread,
)
from jaxcompress.tree.methods import method
from jaxcompress.types import Array, DType

# Steps that each dtype holds exactly, also after a product with any code.
SMALLEST_STEP: dict[Any, float] = {
    "float32": 2.0**-120,
    "bfloat16": 2.0**-120,
    "float16": 2.0**-14,
}
LARGEST_STEP: dict[Any, float] = {
    "float32": 2.0**120,
    "bfloat16": 2.0**120,
    "float16": 2.0**15,
}
# What a search tries, for all grids and number formats. 1 is first: a tie keeps it.
# Above 1 too: on the symmetric grid a larger step saves the clipped positive end.
STEP_FACTORS = (
    np.array([100, *range(30, 100, 2), *range(102, 122, 2)], np.float32) / 100
)


@method()
def symmetric(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    bits: int,
    block: Block = None,
    full_range: bool = False,
    search: bool = False,
    scale_dtype: str = "bfloat16",
) -> Quantized:
    """Round to the nearest of `2^bits` multiples of a step around zero.

    With `S = max|x|` of a block the step is `S / 2^(bits - 1)` and the code
    `round(x / step)`, clipped to `[-2^(bits - 1), 2^(bits - 1) - 1]`: the error is at
    most half a step, except at the clipped positive end, where it is up to a whole one
    (for steps in float32 and without `search`, which clips more, at both ends). One bit
    is plus or minus the mean magnitude of the block, whatever `full_range` and `search`
    say. A block holding NaN or Inf, or weights that `scale_dtype` cannot reach, becomes
    NaN; `compress` raises before that.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: not used.
      bits: 1 to 8 per weight.
      block: inputs that share a step, the last block may be shorter; None: one step
        per output; "tensor": one for the matrix.
      full_range: the sign of the largest magnitude picks the side that is not
        clipped (its step is negative where that is the positive one). Helps most at
        2 and 3 bits.
      search: False: the step above. True: per block, that multiple of it, among 46
        from 0.3 to 1.2, whose sum of squared weight errors is least; all weights count
        alike, and a tie keeps 1. It lowers the error of weights, not always that of the
        model: measure.
      scale_dtype: of the step, which the field `scale` stores: "bfloat16" (the
        default: 16 / block bits per weight, and the range
        of float32), "float32" or "float16" (steps below 2^-14 are raised to it). Codes
        are chosen for the step as stored.

    Raises:
      ValueError: an option out of range; says what is allowed.
      TypeError: weights that are not floating point.

    Example:
      >>> jc.symmetric(x, bits=4, block=32)
      Quantized(64x64, symmetric 4 bits, blocks of 32, ...)
      >>> small = jc.compress(params, "symmetric(bits=4, block=32)")
    """
    del moments
    check_bits("symmetric", bits, 8)
    check_weights(x, "symmetric", block, scale_dtype)
    return _nearest(
        x, Scheme("symmetric", bits, block, scale_dtype), full_range, search
    )


@method()
def asymmetric(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    bits: int,
    block: Block = None,
    search: bool = False,
    scale_dtype: str = "bfloat16",
) -> Quantized:
    """Round to the nearest of `2^bits` levels between the smallest and largest weight.

    The range of a block always includes zero, and the zero point is an integer code,
    so that zero is exact and the error at most half a step (a little more at the ends
    where the stored step is smaller). It is stored with the scale, and takes
    `bits / block` bits per weight more than `symmetric`.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: not used.
      bits: 1 to 8 per weight.
      block, search, scale_dtype: as in `symmetric`.

    Raises: as `symmetric`.

    Example:
      >>> jc.asymmetric(x, bits=4, block=32)
      Quantized(64x64, asymmetric 4 bits, blocks of 32, ...)
    """
    del moments
    check_bits("asymmetric", bits, 8)
    check_weights(x, "asymmetric", block, scale_dtype)
    return _nearest(x, Scheme("asymmetric", bits, block, scale_dtype), False, search)


@method()
def sign_split(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    bits: tuple[int, int],
    block: Block = None,
    search: bool = False,
    scale_dtype: str = "bfloat16",
) -> Quantized:
    """Round positive and negative weights each to its own step; zero is exact.

    With `S` the largest magnitude of a side and `N` its bits, the step is `S / 2^N`
    and magnitudes are clipped to `2^N - 1` steps. Codes take
    `ceil(log2(2^N_p + 2^N_n - 1))` bits, so `bits=(3, 3)` is the 4-bit form; two scales
    are stored per block, twice those of `symmetric`, whose other options and errors
    these are.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: not used.
      bits: 1 to 7 of the positive and of the negative side.
      block: as in `symmetric`.
      search: each side by itself, as in `symmetric`.
      scale_dtype: as in `symmetric`.

    Example:
      >>> jc.sign_split(x, bits=(3, 3))
      Quantized(64x64, sign_split 3+3 bits, ...)
    """
    del moments
    if not isinstance(bits, tuple | list) or len(bits) != 2:
        raise ValueError(
            f"sign_split takes bits=(positive, negative), not {bits!r}; (3, 3) makes "
            "4-bit codes"
        )
    for side in bits:
        check_bits("sign_split", side, 7)
    check_weights(x, "sign_split", block, scale_dtype)
    scheme = Scheme("sign_split", (bits[0], bits[1]), block, scale_dtype)
    return _nearest(x, scheme, False, search)


def check_bits(name: str, bits: Any, most: int) -> None:
    """Raise ValueError where `bits` is not an integer from 1 to `most`."""
    checks.integer(name, "number of bits", bits, most=most)


def check_weights(x: jax.Array, name: str, block: Block, scale_dtype: str) -> None:
    """Raise where a method of this name cannot quantize `x` in such blocks."""
    whole = checks.is_integer(block) and block >= 1
    if not (whole or block is None or block == "tensor"):
        raise ValueError(
            f"{name} takes a block of one or more inputs, None (per output) or "
            f"'tensor', not {block!r}"
        )
    checks.one_of(name, "scale_dtype", scale_dtype, sorted(SMALLEST_STEP))
    checks.weights(name, x, outputs=False)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _nearest(x: jax.Array, scheme: Scheme, full_range: bool, search: bool) -> Quantized:
    grid, bits, block, scale_dtype = scheme
    blocks = split(x.astype(jnp.float32), block)
    stored = functools.partial(store_step, dtype=scale_dtype)
    if grid == "symmetric" and bits == 1:
        count = block_sizes(x.shape[-2], x.shape[-1], block)
        count = count.reshape((1,) * (x.ndim - 2) + (-1, 1))
        # No step to divide by, so that an all-zero block may keep the scale zero.
        mean = jnp.sum(jnp.abs(blocks), axis=-2) / count
        steps = Steps(jnp.where(mean == 0, 0, stored(mean)))
    elif grid == "symmetric":
        steps = _symmetric_steps(blocks, bits, full_range, search, stored)
    elif grid == "asymmetric":
        steps = _asymmetric_steps(blocks, bits, search, stored)
    else:
        positive = _side_step(jnp.maximum(blocks, 0), bits[0], search, stored)
        negative = _side_step(jnp.maximum(-blocks, 0), bits[1], search, stored)
        steps = Steps(positive, negative_scale=negative)
    wide = spread(steps, block, x.shape[-2])
    return quantized(
        encode(x, wide, grid=grid, bits=bits),
        steps,
        scheme,
        dtype=x.dtype,
    )


def _symmetric_steps(
    blocks: jax.Array, bits: int, full_range: bool, search: bool, stored: Callable
) -> Steps:
    high, low = _ends(blocks)
    step = jnp.maximum(high, -low) / 2 ** (bits - 1)

    def steps(factor: Any) -> Steps:
        size = stored(step * factor)
        return Steps(jnp.where(high > -low, -size, size) if full_range else size)

    if not search:
        return steps(1)
    return steps(best_factor(blocks, steps, "symmetric", bits))


def _asymmetric_steps(
    blocks: jax.Array, bits: int, search: bool, stored: Callable
) -> Steps:
    high, low = _ends(blocks)
    most = 2**bits - 1

    def steps(factor: Any) -> Steps:
        step = stored((high / most - low / most) * factor)
        zero = jnp.clip(jnp.round(-low * factor / step), 0, most)
        return Steps(step, zero)

    if not search:
        return steps(1)
    return steps(best_factor(blocks, steps, "asymmetric", bits))


def _side_step(
    magnitudes: jax.Array, bits: int, search: bool, stored: Callable
) -> Array:
    """Return the step of one side `[..., blocks, columns]` of the sign-split grid."""
    step = jnp.max(magnitudes, axis=-2, initial=0) / 2**bits

    def steps(factor: Any) -> Steps:
        size = stored(step * factor)
        return Steps(size, negative_scale=size)

    if not search:
        return steps(1).scale
    best = best_factor(magnitudes, steps, "sign_split", (bits, 1))
    return steps(best).scale


def _ends(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return largest and smallest weight per block, zero included."""
    high = jnp.max(blocks, axis=-2, initial=0)
    return high, jnp.min(blocks, axis=-2, initial=0)


def best_factor(
    blocks: jax.Array, steps_at: Callable[[Any], Steps], grid: str, bits: Any
) -> jax.Array:
    """Return the factor of `STEP_FACTORS` with the least squared error, per block.

    One candidate at a time, so that no more than the weights themselves is held.

    Args:
      blocks: weights `[..., blocks, inputs of a block, outputs]`.
      steps_at: from a factor, a number or `[..., blocks, outputs]`, to the steps as
        they will be stored.
      grid, bits: of the codes.
    """
    # A unit, so that no square over- or underflows.
    unit = jnp.abs(steps_at(1).scale)[..., None, :]

    def better(best: tuple, factor: jax.Array) -> tuple[tuple, None]:
        least, chosen = best
        wide = jax.tree.map(lambda step: step[..., None, :], steps_at(factor))
        codes = encode(blocks, wide, grid=grid, bits=bits)
        values = decode(codes, wide, grid=grid, bits=bits)
        error = jnp.sum(jnp.square((blocks - values) / unit), axis=-2)
        wins = error < least
        return (jnp.where(wins, error, least), jnp.where(wins, factor, chosen)), None

    start = jnp.full_like(unit[..., 0, :], jnp.inf), jnp.ones_like(unit[..., 0, :])
    (_, chosen), _ = jax.lax.scan(better, start, STEP_FACTORS)
    return chosen


def store_step(step: jax.Array, *, dtype: DType) -> jax.Array:
    """Return the nearest step above zero that `dtype` holds, in float32; 1 for zero.

    Steps too large for it, NaN and Inf become NaN: integer codes would hide them.
    """
    kept = jnp.maximum(step, SMALLEST_STEP[dtype])
    if dtype == "float16":
        kept = jax.lax.reduce_precision(kept, exponent_bits=5, mantissa_bits=10)
    kept = jnp.where(step == 0, 1, round_to(kept, dtype))
    return jnp.where(step <= LARGEST_STEP[dtype], kept, jnp.nan)


def split(x: jax.Array, block: Block) -> jax.Array:
    """Return weights `[..., inputs, outputs]` as `[..., blocks, block, columns]`.

    The last block is filled up with zeros; "tensor" is one block of one column.
    """
    *lead, inputs, outputs = x.shape
    if block == "tensor":
        return x.reshape((*lead, 1, inputs * outputs, 1))
    size = inputs if block is None else min(block, inputs)
    blocks = -(-inputs // size)
    gap = blocks * size - inputs
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, gap), (0, 0)])
    return x.reshape((*lead, blocks, size, outputs))


def block_sizes(inputs: int, outputs: int, block: Block) -> np.ndarray:
    """Return weights that share a step, per block: all equal but for the last."""
    if block == "tensor":
        return np.array([inputs * outputs])
    size = inputs if block is None else min(block, inputs)
    starts = np.arange(0, inputs, size)
    return np.minimum(size, inputs - starts)

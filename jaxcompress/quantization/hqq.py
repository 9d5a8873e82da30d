"""Half-quadratic quantization: zero points without data, robust to outlying weights."""

import functools

import jax
import jax.numpy as jnp

from jaxcompress import checks
from jaxcompress.calibration.moments import Moments
from jaxcompress.quantization.grids import (
    Block,
    Quantized,
    Scheme,
    Steps,
    encode,
    quantized,
    round_to,
    spread,
)
from jaxcompress.quantization.nearest import (
    check_bits,
    check_weights,
    split,
    store_step,
)
from jaxcompress.tree.methods import method

SHARPENING = 1.01  # of the penalty on what the sparse part leaves over, per step


@method()
def hqq(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    bits: int,
    block: Block = 64,
    norm: float = 0.7,
    penalty: float = 10.0,
    steps: int = 20,
    scale_dtype: str = "bfloat16",
) -> Quantized:
    """HQQ: round to even steps whose real-valued zero point minimizes a sparse norm.

    The step is the range over `2^bits - 1`; the zero point minimizes the sum of
    `|error|^norm`: the error is split into a sparse part (outliers, found by shrinking)
    and the rest, whose mean the zero point takes, in turn. The best zero point of each
    block is kept, so the norm is never above that of the start, the smallest weight on
    code 0. A scale and a zero point are stored per block: `32 / block` bits per weight.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: not used.
      bits: 1 to 8 per weight.
      block: inputs that share a scale and a zero point, as in `symmetric`.
      norm: above 0, at most 1; the smaller, the less outliers count.
      penalty: of what the sparse part leaves, in steps; grows by 1 % a step.
      steps: of the two parts in turn.
      scale_dtype: of scales and zero points.

    Raises: as `symmetric`.

    Example:
      >>> small = jc.hqq(x, bits=4, block=32)

    Source: Badri and Shaji 2023, "Half-quadratic quantization of large machine learning
    models" (mobiusml.github.io/hqq_blog). Errors are measured in steps here, so that
    the result does not depend on the units of the weights.
    """
    del moments
    check_bits("hqq", bits, 8)
    check_weights(x, "hqq", block, scale_dtype)
    checks.fraction("hqq", "a norm", norm, one=True)
    checks.positive("hqq", "a penalty", penalty)
    checks.integer("hqq", "number of steps", steps)
    return _half_quadratic(
        x, Scheme("affine", bits, block, scale_dtype), norm, penalty, steps
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _half_quadratic(
    x: jax.Array, scheme: Scheme, norm: float, penalty: float, rounds: int
) -> Quantized:
    _, bits, block, scale_dtype = scheme
    blocks = split(x.astype(jnp.float32), block)
    real = split(jnp.ones(x.shape, bool), block)  # not what fills up the last block
    low = jnp.min(jnp.where(real, blocks, jnp.inf), axis=-2, keepdims=True)
    high = jnp.max(jnp.where(real, blocks, -jnp.inf), axis=-2, keepdims=True)
    most = 2**bits - 1
    scale = store_step(high / most - low / most, dtype=scale_dtype)
    count = jnp.sum(real, axis=-2, keepdims=True)
    ratio = blocks / scale

    def stored(zero: jax.Array) -> jax.Array:
        return round_to(zero.astype(scale_dtype).astype(jnp.float32), scale_dtype)

    def errors(zero: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return codes, errors in steps, and the norm of a block's errors."""
        codes = jnp.clip(jnp.round(ratio + zero), 0, most)
        error = jnp.where(real, ratio - (codes - zero), 0)
        return codes, error, jnp.sum(jnp.abs(error) ** norm, -2, keepdims=True)

    def improve(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
        zero, best, least = carry
        codes, error, _ = errors(zero)
        size = jnp.abs(error)
        # |error|^(norm - 1) is infinite at zero: there is nothing to shrink.
        pull = jnp.where(size > 0, size, 1) ** (norm - 1) / (penalty * SHARPENING**i)
        sparse = jnp.sign(error) * jnp.maximum(size - pull, 0)
        rest = jnp.where(real, codes - (ratio - sparse), 0)
        zero = stored(jnp.sum(rest, -2, keepdims=True) / count)
        zero_point = errors(zero)[2]
        better = zero_point < least
        best = jnp.where(better, zero, best)
        return (zero, best, jnp.where(better, zero_point, least)), None

    start = stored(-low / scale)
    carry = (start, start, errors(start)[2])
    (_, zero, _), _ = jax.lax.scan(improve, carry, jnp.arange(rounds))
    steps = Steps(scale[..., 0, :], zero[..., 0, :])
    codes = encode(x, spread(steps, block, x.shape[-2]), **scheme.options)
    return quantized(
        codes,
        steps,
        scheme,
        dtype=x.dtype,
    )

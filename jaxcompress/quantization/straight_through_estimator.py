"""Straight-through estimators: rounding whose gradient is that of its argument."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.quantization.grids import Bits, Block, Steps, decode, encode, spread
from jaxcompress.quantization.nearest import block_sizes

HUGE = 1e30  # what a grid encodes by its last code, on either side


def straight(function: Any, x: jax.Array) -> jax.Array:
    """Compute `function(x)`, bit for bit, with the gradient of `x`."""
    fixed = jax.lax.stop_gradient(x)
    return function(fixed) + (x - fixed)


def quantize_through(
    x: jax.Array, steps: Steps, *, grid: str, bits: Bits, block: Block
) -> jax.Array:
    """Return the nearest grid values, with gradients for the weights and what stretches
    them.

    With `v = x / scale` and `q(v)` the level it is rounded to, inside the grid's range
    `d value / d x` is 1 and `d value / d scale` is `q(v) - v`; where x is clipped they
    are 0 and `q(v)`. The gradient of a scale is multiplied by `1 / sqrt(count *
    highest)`: the number of weights that share it and the highest level of its side. A
    zero point (here a float) moves the values that are clipped: `-scale` there, else 0.

    Args:
      x: float32 weights `[..., inputs, outputs]`; float64 stays so.
      steps: `[..., blocks, outputs]`.
      grid, bits, block: as in `Quantized`.

    Source: LSQ, Esser et al. 2019 (arXiv 1902.08153, section 2); zero points as in LSQ+
    (Bhalgat et al. 2020, arXiv 2004.09576).
    """
    options = {"grid": grid, "bits": bits}
    fixed = jax.tree.map(jax.lax.stop_gradient, steps)
    wide, at = spread(fixed, block, x.shape[-2]), jax.lax.stop_gradient(x)
    value = decode(encode(at, wide, **options), wide, **options).astype(x.dtype)
    ends = [
        decode(encode(jnp.full_like(wide.scale, end), wide, **options), wide, **options)
        for end in (-HUGE, HUGE)
    ]
    inside = (at > ends[0]) & (at < ends[1])
    positive, negative = (
        jnp.asarray(side, steps.scale.dtype)
        for side in _gradient_scales(x.shape, grid, bits, block)
    )
    # Each difference is exactly zero: the value is the quantized one, bit for bit.
    moved = Steps(
        scale=positive * (steps.scale - fixed.scale),
        zero_point=None
        if steps.zero_point is None
        else (steps.zero_point - fixed.zero_point).astype(x.dtype),
        negative_scale=None
        if steps.negative_scale is None
        else negative * (steps.negative_scale - fixed.negative_scale),
    )
    moved = spread(moved, block, x.shape[-2])
    scale, stretch = wide.scale, moved.scale
    if wide.negative_scale is not None:
        scale = jnp.where(at > 0, scale, wide.negative_scale)
        stretch = jnp.where(at > 0, stretch, moved.negative_scale)
    level = (value - jnp.where(inside, at, 0)) / scale
    change = jnp.where(inside, x - at, 0) + level * stretch
    if moved.zero_point is not None:
        change = change - jnp.where(inside, 0, scale) * moved.zero_point
    return value + change


def _gradient_scales(
    shape: tuple[int, ...], grid: str, bits: Bits, block: Block
) -> tuple[np.ndarray, np.ndarray]:
    """Return gradient scales of the positive and the negative scale: `[blocks, 1]`, or
    both axes 1.
    """
    low, high = _highest_levels(grid, bits)
    count = block_sizes(shape[-2], shape[-1], block)
    count = count.reshape((1,) * (len(shape) - 2) + (-1, 1)).astype(np.float64)
    return 1 / np.sqrt(count * high), 1 / np.sqrt(count * low)


@functools.cache
def _highest_levels(grid: str, bits: Bits) -> tuple[float, float]:
    """Return magnitudes of the lowest and the highest level, at least one for
    either.
    """
    with jax.ensure_compile_time_eval():
        one = Steps(jnp.ones(()), jnp.zeros((), jnp.uint8), jnp.ones(()))
        ends = jnp.asarray([-HUGE, HUGE], jnp.float32)
        unit = jax.tree.map(lambda s: s[None], one)
        codes = encode(ends, unit, grid=grid, bits=bits)
        low, high = np.abs(decode(codes, unit, grid=grid, bits=bits))
    return max(float(low), 1.0), max(float(high), 1.0)

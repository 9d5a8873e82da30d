"""`Latent`: a weight in training that is read as it would be quantized."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.quantization.grids import (
    Bits,
    Block,
    Quantized,
    Steps,
    decode,
    encode,
    quantized,
    round_to,
    spread,
)
from jaxcompress.quantization.nearest import block_sizes, store_step
from jaxcompress.tree.leaves import Leaf, dense, is_leaf, leaf, static
from jaxcompress.tree.paths import is_float

HUGE = 1e30  # what a grid encodes by its last code, on either side


@leaf
class Latent(Leaf):
    """A floating-point weight read as `Quantized`, with gradients for it and its steps.

    Invariant: `settle` gives the `Quantized` leaf that has the same values. The weight
    and the steps are float32 whatever the dtypes they stand for, so that small updates
    are not lost; the steps are read as `scale_dtype` holds them.

    Args:
      weight: `[..., inputs, outputs]`; trains.
      scale: `[..., blocks, outputs]`, as in `Quantized`; trains, unless it is itself
        quantized.
      zero_point: of the same shape, or None; trains where it is a real number, and is
        frozen where it is an integer.
      negative_scale: scale of the negative side, or None; trains.
      grid, bits, block, kind: as in `Quantized`.
      scale_dtype: name of the dtype of the stored steps.
    """

    weight: Any
    scale: Any
    zero_point: Any
    negative_scale: Any
    grid: str = static()
    bits: Bits = static()
    block: Block = static()
    kind: str = static()
    scale_dtype: str = static()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.kind)

    @property
    def steps(self) -> Steps:
        """The steps as they will be stored, float32; gradients pass as if unrounded."""

        def stored(scale: Any) -> Any:
            if scale is None or is_leaf(scale):
                return jax.lax.stop_gradient(dense(scale))
            size = jnp.abs(scale)
            kept = straight(functools.partial(store_step, dtype=self.scale_dtype), size)
            return jnp.where(scale < 0, -kept, kept)

        zero = self.zero_point
        if zero is not None and is_float(zero):
            zero = straight(lambda z: _held(z, self.scale_dtype), zero)
        return Steps(stored(self.scale), zero, stored(self.negative_scale))

    def materialize(self) -> jax.Array:
        values = quantize_through(
            self.weight, self.steps, grid=self.grid, bits=self.bits, block=self.block
        )
        return round_to(values, self.kind).astype(self.kind)


def latent(small: Quantized, original: jax.Array | None = None) -> Latent:
    """The leaf to train in the place of `small`; it reads the same to begin with.

    A weight starts at its original where that has the code it has in `small`, and
    otherwise (a method with data may have chosen another) at its quantized value.
    Traceable.

    Args:
      small: a weight `[..., inputs, outputs]`.
      original: what was quantized; None where that is not known.
    """
    steps, codes = small.steps, dense(small.codes)
    wide = spread(steps, small.block, small.shape[-2])
    weight = decode(codes, wide, grid=small.grid, bits=small.bits)
    if original is not None:
        exact = original.astype(jnp.float32)
        same = encode(exact, wide, grid=small.grid, bits=small.bits) == codes
        weight = jnp.where(same, exact, weight)
    return Latent(
        weight=weight,
        scale=small.scale if _is_nested(small.scale) else steps.scale,
        zero_point=steps.zero_point,
        negative_scale=steps.negative_scale,
        grid=small.grid,
        bits=small.bits,
        block=small.block,
        kind=small.kind,
        scale_dtype=jnp.dtype(small.scale.dtype).name,
    )


def settled(x: Latent) -> Quantized:
    """The quantized leaf of the same values: codes of the weight as it is now."""
    steps = x.steps
    wide = spread(steps, x.block, x.shape[-2])
    small = quantized(
        encode(x.weight, wide, grid=x.grid, bits=x.bits),
        steps,
        grid=x.grid,
        bits=x.bits,
        block=x.block,
        dtype=x.kind,
        scale_dtype=x.scale_dtype,
    )
    return dataclasses.replace(small, scale=x.scale) if is_leaf(x.scale) else small


def _is_nested(scale: Any) -> bool:
    """Whether steps are quantized themselves, as those of MXFP4 and NVFP4 are."""
    return isinstance(scale, Leaf) and not scale.lossless


def _held(x: jax.Array, dtype: str) -> jax.Array:
    """float32 numbers as `dtype` holds them, still float32."""
    return round_to(x, dtype).astype(dtype).astype(jnp.float32)


def straight(function: Any, x: jax.Array) -> jax.Array:
    """`function(x)`, bit for bit, with the gradient of `x`."""
    fixed = jax.lax.stop_gradient(x)
    return function(fixed) + (x - fixed)


def quantize_through(
    x: jax.Array, steps: Steps, *, grid: str, bits: Bits, block: Block
) -> jax.Array:
    """The nearest grid values, with gradients for the weights and what stretches them.

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
    """Of the positive and the negative scale: `[blocks, 1]`, or both axes 1."""
    low, high = _highest_levels(grid, bits)
    count = block_sizes(shape[-2], shape[-1], block)
    count = count.reshape((1,) * (len(shape) - 2) + (-1, 1)).astype(np.float64)
    return 1 / np.sqrt(count * high), 1 / np.sqrt(count * low)


@functools.cache
def _highest_levels(grid: str, bits: Bits) -> tuple[float, float]:
    """Magnitudes of the lowest and the highest level, at least one for either."""
    with jax.ensure_compile_time_eval():
        one = Steps(jnp.ones(()), jnp.zeros((), jnp.uint8), jnp.ones(()))
        ends = jnp.asarray([-HUGE, HUGE], jnp.float32)
        unit = jax.tree.map(lambda s: s[None], one)
        codes = encode(ends, unit, grid=grid, bits=bits)
        low, high = np.abs(decode(codes, unit, grid=grid, bits=bits))
    return max(float(low), 1.0), max(float(high), 1.0)

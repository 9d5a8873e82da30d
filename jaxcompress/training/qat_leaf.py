"""`FakeQuantized`: a weight in training that is read as it would be quantized."""

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
    Scheme,
    Steps,
    decode,
    encode,
    quantized,
    round_to,
    spread,
)
from jaxcompress.quantization.nearest import store_step
from jaxcompress.quantization.straight_through_estimator import (
    quantize_through,
    straight,
)
from jaxcompress.tree.leaf import Leaf, dense, is_leaf, leaf, static
from jaxcompress.tree.paths import is_float


@leaf
class FakeQuantized(Leaf):
    """A floating-point weight read as `Quantized`, with gradients for it and its steps.

    Invariant: `qat.convert` gives the `Quantized` leaf that has the same values. The
    weight and the steps are float32 whatever their stored dtypes, so that small
    updates are not lost; the steps are read as `scale_dtype` holds them.

    Args:
      weight: `[..., inputs, outputs]`; trains.
      scale: `[..., blocks, outputs]`, as in `Quantized`; trains, unless it is itself
        quantized.
      zero_point: of the same shape, or None; trains where it is a real number, and is
        frozen where it is an integer.
      negative_scale: scale of the negative side, or None; trains.
      grid, bits, block, dtype: as in `Quantized`.
      scale_dtype: name of the dtype of the stored steps.

    Example:
      >>> tree = jc.qat.prepare("symmetric(bits=2)")({"kernel": x})
      >>> tree["kernel"].weight.shape
      (64, 64)
    """

    weight: Any
    scale: Any
    zero_point: Any
    negative_scale: Any
    grid: str = static()
    bits: Bits = static()
    block: Block = static()
    dtype: np.dtype = static()
    scale_dtype: str = static()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

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
        return round_to(values, self.dtype).astype(self.dtype)


def fake_quantize(small: Quantized, original: jax.Array | None = None) -> FakeQuantized:
    """Return leaf to train in the place of `small`; it reads the same to begin with.

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
    return FakeQuantized(
        weight=weight,
        scale=small.scale if _is_nested(small.scale) else steps.scale,
        zero_point=steps.zero_point,
        negative_scale=steps.negative_scale,
        grid=small.grid,
        bits=small.bits,
        block=small.block,
        dtype=small.dtype,
        scale_dtype=jnp.dtype(small.scale.dtype).name,
    )


def quantize(x: FakeQuantized) -> Quantized:
    """Return quantized leaf of the same values: codes of the weight as it is now."""
    steps = x.steps
    wide = spread(steps, x.block, x.shape[-2])
    small = quantized(
        encode(x.weight, wide, grid=x.grid, bits=x.bits),
        steps,
        Scheme(x.grid, x.bits, x.block, x.scale_dtype),
        dtype=x.dtype,
    )
    return dataclasses.replace(small, scale=x.scale) if is_leaf(x.scale) else small


def _is_nested(scale: Any) -> bool:
    """Return whether steps are quantized themselves, as those of MXFP4 and NVFP4
    are.
    """
    return isinstance(scale, Leaf) and not scale.lossless


def _held(x: jax.Array, dtype: str) -> jax.Array:
    """Round float32 numbers to those that `dtype` holds; the result is float32."""
    return round_to(x, dtype).astype(dtype).astype(jnp.float32)

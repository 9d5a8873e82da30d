"""A step per input times integers: `RateCoded`, and the scales of its columns."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.coding import array_codecs
from jaxcompress.coding.levels.narrow import NarrowLevels
from jaxcompress.coding.levels.shrinkage import shrink_to_mean
from jaxcompress.coding.packing import bits_needed, pack_bits
from jaxcompress.tree.leaf import (
    Arithmetic,
    Leaf,
    before_use,
    contract,
    dense,
    leaf,
    static,
    take_columns,
)
from jaxcompress.tree.products import cut_columns, tiles_pay

OCTAVE = 4  # column scales to a factor of two
MOST_SCALES = 64
SCALES = np.exp2(-np.arange(MOST_SCALES) / OCTAVE).astype(np.float32)


@leaf
class RateCoded(Leaf):
    """Weights `steps[i] * 2^(-scales[o] / 4) * levels[i, o]`.

    Args:
      levels: integers `[..., inputs, outputs]`, as a rule `CodedLevels`.
      steps: bfloat16 `[..., inputs]`.
      scales: uint8 `[..., 1, outputs]` below 64, as a rule `Packed`; None: all zero.
      dtype: of the weights.

    Example:
      >>> small = jc.rate_distortion(x, rate=3.0, states=8)
      >>> type(small).__name__
      'RateCoded'
    """

    levels: Any
    steps: jax.Array
    scales: Any
    dtype: np.dtype = static()

    has_tiles: ClassVar[bool] = True
    integers: ClassVar[tuple[str, ...]] = ("levels", "scales")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.levels.shape

    def materialize(self) -> jax.Array:
        weights = dense(self.levels).astype(jnp.float32)
        weights = weights * self.steps.astype(jnp.float32)[..., None]
        if self.scales is not None:
            weights = weights * jnp.take(SCALES, dense(self.scales), mode="clip")
        return weights.astype(self.dtype)

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Multiply the inputs by the steps, by the levels, and by the scales."""
        narrow = isinstance(self.levels, NarrowLevels)
        in_tiles = tiles_pay(self.shape) and not narrow  # narrow ones have their own
        if in_tiles or jnp.dtype(self.dtype).itemsize < 4:
            return super().contract(x, how)
        prepare = before_use.get()
        held = self if prepare is None else prepare(self)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        lead = (1,) * (x.ndim - 1)
        x = x.astype(wide) * held.steps.astype(wide).reshape(*lead, -1)
        y = contract(x, held.levels if narrow else dense(held.levels), how)
        if held.scales is None:
            return y
        scales = jnp.take(SCALES, dense(held.scales), mode="clip")
        return y * scales.reshape(*lead, -1)

    def tiles(self) -> Callable[[jax.Array, int], jax.Array]:
        levels, scales = dense(self.levels), dense(self.scales)

        def make(start: jax.Array, size: int) -> jax.Array:
            return dataclasses.replace(
                self,
                levels=cut_columns(levels, start, size),
                scales=cut_columns(scales, start, size),
            ).materialize()

        return make

    def take_columns(self, indices: jax.Array) -> jax.Array:
        """Compute `materialize()[:, indices]` from those outputs alone."""
        flat, scales = indices.reshape(-1), dense(self.scales)
        some = dataclasses.replace(
            self,
            levels=take_columns(self.levels, flat),
            scales=None if scales is None else jnp.take(scales, flat, axis=1),
        )
        return some.materialize().reshape(-1, *indices.shape)


def column_scales(curvatures: np.ndarray) -> np.ndarray:
    """Return how much finer each output is quantized, in quarter octaves.

    The coarsest has zero.
    Errors are in inverse proportion to the root of what they do. uint8
    `[..., outputs]`.
    """
    wide = shrink_to_mean(np.asarray(curvatures, np.float64), np)
    finer = OCTAVE / 2 * np.log2(wide / wide.min(axis=-1, keepdims=True))
    return np.minimum(np.rint(finer), MOST_SCALES - 1).astype(np.uint8)


def packed_scales(scales: np.ndarray) -> Any:
    """Return the `scales` of a `RateCoded` from `[..., outputs]`: None if all zero."""
    if not scales.any():
        return None
    return pack_bits(jnp.asarray(scales[..., None, :]), bits_needed(scales.max()))


def scale_bits(scales: Any) -> float:
    """Return the bits of a column's scale in a file, for what `packed_scales` gives."""
    if scales is None:
        return 0.0
    return 8 * array_codecs.estimate(np.asarray(scales.packed)) / scales.size

"""`Sparse`: the weights that stay, one after another, and a bitmap that says where."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress.calibration.moments import Moments
from jaxcompress.coding.packing import pack_bits
from jaxcompress.tree.leaf import Leaf, dense, leaf, static


@leaf
class Sparse(Leaf):
    """A weight `[..., inputs, outputs]` of which most entries are zero.

    Invariant: `mask` is 1 where a weight stays and 0 elsewhere, one entry per `block`
    of weights. Where every output keeps the same number, `values` is
    `[..., kept, outputs]`, each column in the order of its inputs. Otherwise it is
    `[..., kept, 1]`: the weights of output 0, then of output 1, and so on. A slice of
    a stack may keep fewer than others; its values are then followed by zeros, which
    are never read.

    A later stage may quantize `values`. In the flat form give it a block: without one,
    all values share a scale. They have no moments: their rows are not inputs any more.

    Args:
      values: floating-point array, or a leaf in place of one.
      mask: `Packed`, or another leaf or array of integers, `[..., rows, columns]`.
      block: inputs and outputs that one entry of the mask covers.

    Example:
      >>> small = jc.magnitude(x, nm="2:4")
      >>> small.values.shape, small.mask.shape
      ((32, 64), (64, 64))
    """

    values: Any
    mask: Any
    block: tuple[int, int] = static(default=(1, 1))

    weights: ClassVar[tuple[str, ...]] = ("values",)
    integers: ClassVar[tuple[str, ...]] = ("mask",)

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, columns = self.mask.shape
        return (*stack, rows * self.block[0], columns * self.block[1])

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def inner_moments(self, field: str, moments: Moments | None) -> None:
        """Return None: row i of the values belongs to another input in every column."""
        del field, moments

    @property
    def kept(self) -> jax.Array:
        """Boolean `[..., inputs, outputs]`: where the weights stay."""
        mask = dense(self.mask) > 0
        for axis, size in zip((-2, -1), self.block, strict=True):
            mask = jnp.repeat(mask, size, axis=axis) if size > 1 else mask
        return mask

    def materialize(self) -> jax.Array:
        return _filled(dense(self.values), self.kept)


def sparse(
    x: jax.Array,
    mask: jax.Array,
    *,
    kept: int | None = None,
    by_output: bool | None = None,
    block: tuple[int, int] = (1, 1),
) -> Sparse:
    """Return leaf of the weights `x` where `mask`, `[..., inputs, outputs]`, is true.

    Traceable where `kept` and `by_output` are given.

    Args:
      x: weights; what the mask leaves out is dropped, whatever it is.
      mask: boolean, shape of `x`; constant over each `block`.
      kept: weights that stay, of each output if `by_output`, else of each slice;
        counted if None.
      by_output: every output keeps the same number; found out if None.
      block: inputs and outputs that live and die together.

    Raises:
      ValueError: a mask of another shape.
      TypeError: a count is needed and the mask is a tracer.
    """
    if mask.shape != x.shape:
        raise ValueError(f"a mask of shape {mask.shape} for weights of {x.shape}")
    if kept is None or by_output is None:
        if isinstance(mask, Tracer):
            raise TypeError(
                "how many weights a mask keeps is not known under jit, vmap or scan; "
                "call it outside, or prune by sparsity or pattern"
            )
        counts = jnp.sum(mask, axis=-2, dtype=jnp.int32)
        by_output = bool(jnp.all(counts == counts.ravel()[0]))
        most = counts if by_output else jnp.sum(counts, axis=-1)
        kept = int(jnp.max(most))
    if by_output:
        values = _closed_up(x, mask, kept)
    else:
        values = _closed_up(_by_output(x), _by_output(mask), kept)
    bits = mask[..., :: block[0], :: block[1]].astype(jnp.uint8)
    # Unsigned and not boolean: integer codes are what entropy coding looks for.
    return Sparse(values, pack_bits(bits, 1), block)


def _by_output(x: jax.Array) -> jax.Array:
    """Reshape `[..., inputs, outputs]` to one column `[..., outputs * inputs, 1]`."""
    *stack, inputs, outputs = x.shape
    return jnp.swapaxes(x, -1, -2).reshape((*stack, inputs * outputs, 1))


def _places(mask: jax.Array) -> jax.Array:
    return jnp.cumsum(mask, axis=-2, dtype=jnp.int32) - 1


@jax.jit
def _filled(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return values `[..., kept, outputs or 1]` where the mask has them, zeros
    elsewhere.
    """
    *stack, inputs, outputs = mask.shape
    if not values.shape[-2]:
        return jnp.zeros(mask.shape, values.dtype)
    if values.shape[-1] == outputs:
        return _spread_out(values, mask)
    column = _spread_out(values, _by_output(mask))
    return jnp.swapaxes(column.reshape((*stack, outputs, inputs)), -1, -2)


def _spread_out(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return each column of `[..., kept, columns]` to the places of `[..., rows,
    columns]`.
    """
    where = jnp.maximum(_places(mask), 0)
    return jnp.where(mask, jnp.take_along_axis(values, where, axis=-2), 0)


def _closed_up(x: jax.Array, mask: jax.Array, kept: int) -> jax.Array:
    """Return inverse: `[..., kept, columns]`; the gap at the end, if any, is zeros."""
    where = jnp.where(mask, _places(mask), kept)
    empty = jnp.zeros((*x.shape[:-2], kept, x.shape[-1]), x.dtype)
    rest = [
        jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in range(x.ndim)
    ]
    rest[-2] = where
    return empty.at[tuple(rest)].set(x, mode="drop")

"""`Sparse`: the weights that stay, one after another, and a bitmap that says where."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress.calibration.masked import Masked, fill, gather
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
    all values share a scale. `gptq` and `rate_distortion` use the moments of the
    kernel, with the mask (`calibration.masked.Masked`); other methods get none, for row
    i of the values belongs to another input in every column.

    Where the values are replaced by weights `[..., inputs, outputs]`, as
    `rate_distortion` does, whose zeros are as cheap as the mask, the mask is None.

    Args:
      values: floating-point array, or a leaf in place of one.
      mask: `Packed`, or another leaf or array of integers, `[..., rows, columns]`; or
        None.
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
        if self.mask is None:
            return self.values.shape
        *stack, rows, columns = self.mask.shape
        return (*stack, rows * self.block[0], columns * self.block[1])

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def inner_moments(self, field: str, moments: Any) -> Any:
        """Return moments and mask, where the inputs have a second moment."""
        if field != "values" or not isinstance(moments, Moments) or moments.looked_up:
            return None
        return None if self.mask is None else Masked(moments, self.kept)

    def with_parts(self, **parts: Any) -> "Sparse":
        """Return the leaf with other parts; values of the whole shape need no mask."""
        new = dataclasses.replace(self, **parts)
        if new.mask is None or new.values is None:  # None where a tree is split
            return new
        values = new.values.shape
        if values != self.shape or values == self.values.shape:
            return new
        return dataclasses.replace(new, mask=None, block=(1, 1))

    @property
    def kept(self) -> jax.Array:
        """Boolean `[..., inputs, outputs]`: where the weights stay."""
        if self.mask is None:
            return dense(self.values) != 0
        mask = dense(self.mask) > 0
        for axis, size in zip((-2, -1), self.block, strict=True):
            mask = jnp.repeat(mask, size, axis=axis) if size > 1 else mask
        return mask

    def materialize(self) -> jax.Array:
        if self.mask is None:
            return dense(self.values)
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
        values = gather(x, mask, (*x.shape[:-2], kept, x.shape[-1]))
    else:
        values = gather(x, mask, (*x.shape[:-2], kept, 1))
    bits = mask[..., :: block[0], :: block[1]].astype(jnp.uint8)
    # Unsigned and not boolean: integer codes are what entropy coding looks for.
    return Sparse(values, pack_bits(bits, 1), block)


_filled = jax.jit(fill)

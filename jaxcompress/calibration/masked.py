"""Moments of pruned weights: second order on the weights that stay."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcompress.calibration.moments import Moments
from jaxcompress.tree.layouts import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """Moments of a pruned kernel's inputs, and the mask `[..., inputs, outputs]` that
    says which of its weights stay.

    Methods of `masked=True` receive it with the weights that stay in place of the
    kernel: `[..., kept, outputs]` where every output keeps the same number, each column
    in the order of its inputs; else `[..., kept, 1]`, output after output.

    Example:
      >>> pruned = jc.magnitude(x, sparsity=0.5)
      >>> masked = pruned.inner_moments("values", of_x)
      >>> small = jc.gptq(pruned.values, masked, bits=4)
    """

    moments: Moments
    mask: jax.Array

    @property
    def layout(self) -> Layout | None:
        return self.moments.layout

    def checked(self, name: str) -> "Masked":
        """Return the moments as `Moments.checked` does, and the mask."""
        return dataclasses.replace(self, moments=self.moments.checked(name))


def fill(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return values `[..., kept, outputs or 1]` at the positions of the mask, zeros
    elsewhere.

    Args:
      values: in the order of `Masked`.
      mask: boolean `[..., inputs, outputs]`.
    """
    *stack, inputs, outputs = mask.shape
    if not values.shape[-2]:
        return jnp.zeros(mask.shape, values.dtype)
    if values.shape[-1] == outputs:
        return _spread(values, mask)
    column = _spread(values, by_output(mask))
    return jnp.swapaxes(column.reshape((*stack, outputs, inputs)), -1, -2)


def gather(x: jax.Array, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return inverse of `fill`: what a mask keeps, in an array of this shape.

    Args:
      x, mask: `[..., inputs, outputs]`.
      shape: `[..., kept, outputs or 1]`; what is left at the end is zeros.
    """
    if shape[-1] != mask.shape[-1]:
        x, mask = by_output(x), by_output(mask)
    where = jnp.where(mask, _positions(mask), shape[-2])
    empty = jnp.zeros(shape, x.dtype)
    rest = [
        jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in range(x.ndim)
    ]
    rest[-2] = where
    return empty.at[tuple(rest)].set(x, mode="drop")


def by_output(x: jax.Array) -> jax.Array:
    """Reshape `[..., inputs, outputs]` to one column `[..., outputs * inputs, 1]`."""
    *stack, inputs, outputs = x.shape
    return jnp.swapaxes(x, -1, -2).reshape((*stack, inputs * outputs, 1))


def _positions(mask: jax.Array) -> jax.Array:
    return jnp.cumsum(mask, axis=-2, dtype=jnp.int32) - 1


def _spread(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Move each column of `[..., kept, columns]` to the positions of `[..., rows,
    columns]`.
    """
    where = jnp.maximum(_positions(mask), 0)
    return jnp.where(mask, jnp.take_along_axis(values, where, axis=-2), 0)

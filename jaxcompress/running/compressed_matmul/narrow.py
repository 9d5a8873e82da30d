"""Products with dense weights of 16 bits, widened where they are multiplied.

XLA for CPUs widens the 16-bit weights of a whole model before it uses the first one,
which takes twice their memory and six times as long as a step of float32 weights.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tree.layouts import Product
from jaxcompress.tree.leaf import before_use
from jaxcompress.tree.products import (
    Arithmetic,
    wide_product,
)


@dataclasses.dataclass(frozen=True)
class Narrow:
    """A dense matrix `[inputs, outputs]` of 16 bits, or its transpose."""

    array: jax.Array
    transposed: bool

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Compute `x @ matrix`, `[..., inputs]` to `[..., outputs]`, summed in
        float32.
        """
        if self.transposed:  # XLA widens it inside the sum
            return wide_product(x, self.array.T, how)
        hold: Any = before_use.get()
        held = self.array if hold is None else hold(self.array)
        return wide_product(x, held, how)


def is_narrow(x: Any) -> bool:
    """Return whether it is an array of floating-point numbers of 16 bits or fewer."""
    dtype = getattr(x, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    return floating and jnp.dtype(dtype).itemsize < 4


def narrow_product(kernel: jax.Array, axes: tuple[int, ...]) -> Product:
    """Return the product that contracts these axes of a dense kernel."""
    others = tuple(axis for axis in range(kernel.ndim) if axis not in axes)
    sizes = tuple(kernel.shape[axis] for axis in others)
    transposed = others + axes == tuple(range(kernel.ndim))
    if not transposed:
        kernel = kernel.transpose(*axes, *others)
    rows = math.prod(kernel.shape[: len(others) if transposed else len(axes)])
    matrix = Narrow(kernel.reshape(rows, -1), transposed)
    return Product(matrix, tuple(range(len(axes))), sizes, tuple(range(len(sizes))))

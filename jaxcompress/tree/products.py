"""Products with dense matrices: summed in float32, and with one tile of them at a time.

A weight that is dequantized for every token is best dequantized where a core's cache
holds it: the tiles of a head of 28 million weights are then as fast to multiply by as
the dense head, and need 2 MiB of temporary memory instead of 108.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TILE = 1 << 19  # weights dequantized at a time, 2 MiB of float32
LEAST = 4 * TILE  # weights of a matrix below which one tile is all of it


class Arithmetic(NamedTuple):
    """Arithmetic of a layer: what `contract` passes on to the products within.

    `precision` is that of `jax.lax.dot_general`; `activations` says whether a leaf of
    integers may round the inputs to integers too: "float" (no), "int8", or "auto"
    (where that is known to be faster).
    """

    precision: Any = None
    activations: str = "float"


def wide_product(x: jax.Array, weight: jax.Array, how: Arithmetic) -> jax.Array:
    """Multiply `[..., inputs]` by `[inputs, outputs]`, summed in float32 or wider.

    The weight is read in the dtype of `x`. CPUs multiply 16-bit numbers as float32
    ones: their products are exact there, and XLA's own 16-bit products six times
    slower.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weight = weight.astype(x.dtype)
    if jax.default_backend() == "cpu":
        x, weight = x.astype(wide), weight.astype(wide)
    return jnp.matmul(x, weight, precision=how.precision, preferred_element_type=wide)


def tiles_pay(shape: tuple[int, ...]) -> bool:
    """Return whether a matrix of this shape is multiplied by tile by tile.

    On accelerators the compiler may fuse dequantization into the product instead.
    """
    return jax.default_backend() == "cpu" and math.prod(shape) >= LEAST


def product_in_tiles(
    x: jax.Array,
    columns: Callable[[jax.Array, int], jax.Array],
    shape: tuple[int, ...],
    how: Arithmetic,
) -> jax.Array:
    """Compute `x @ weight`, where `columns(start, size)` makes `weight[:, start:start +
    size]`.

    `[..., inputs]` to `[..., outputs]`, summed in float32 or wider; the last tile may
    overlap the one before. Differentiable; tiles are made again in the backward pass.
    """
    inputs, outputs = shape
    count = max(1, math.ceil(inputs * outputs / TILE))
    size = math.ceil(outputs / count)

    @jax.checkpoint
    def tile(start: jax.Array) -> jax.Array:
        return wide_product(x, columns(start, size), how)

    def write(i: jax.Array, y: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, outputs - size)
        return jax.lax.dynamic_update_slice_in_dim(y, tile(start), start, axis=-1)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    empty = jnp.zeros((*x.shape[:-1], outputs), wide)
    return jax.lax.fori_loop(0, math.ceil(outputs / size), write, empty)


def cut_columns(x: Any, start: jax.Array, size: int) -> Any:
    """Cut `size` of the last axis from a traced start; what is one wide stays."""
    if x is None or x.shape[-1] == 1:
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)

"""Products in integers: 8-bit activations times stored codes, summed exactly.

A token's inputs x are rounded to `s q`, q integers of 8 bits and s one step per token;
codes represent `t (c - z)`, one step t per output. Then `x @ W` is about
`s t (q @ c - z sum(q))`, whose sums of integers are exact in 32 bits (on accelerators:
in the 24 bits of float32). Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339),
section 2; per-token steps as in ZeroQuant (arXiv 2206.01861).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.tree.leaf import Arithmetic, contract, dense

GRIDS = ("symmetric", "asymmetric")  # those whose codes are multiples of a step
LARGEST = 2**31 // 2**14  # inputs whose products of 8-bit integers cannot overflow
FEWEST_ROWS = 4  # on a CPU, below which the integer product was slower


def has_integers(weight: Any) -> bool:
    """Return whether a `Quantized` weight can be multiplied in integers.

    Its values must be integers times one step per output (or matrix); steps per block
    of inputs would need as many products as blocks, and were slower than dequantizing.
    """
    one_step = weight.block in (None, "tensor") or weight.scale.shape[-2] == 1
    supported = weight.grid in GRIDS and isinstance(weight.bits, int)
    exact = supported and 2 <= weight.bits <= 8 and weight.shape[-2] < LARGEST
    return one_step and exact and weight.negative_scale is None


def integers_pay(rows: int) -> bool:
    """Return whether integer products of so many rows were measured to be faster here.

    On CPUs, since jax 0.8 (on 0.7.2 they take three times as long), and of four rows or
    more. Other devices were not measured.
    """
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    return jax.default_backend() == "cpu" and version >= (0, 8) and rows >= FEWEST_ROWS


def round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return whole numbers up to 127 `[..., inputs]` and steps `[..., 1]`, both
    float32.

    The step of a row is its largest magnitude over 127, one for a row of zeros; a row
    that is not finite has a step that is not either.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    step = jnp.where(largest == 0, 1, largest / 127)
    return jnp.round(wide / step), step


@jax.custom_vjp
def integer_product(x: jax.Array, weight: Any) -> jax.Array:
    """Compute `x @ weight`, float32, of a weight that `has_integers`, without stack
    axes.

    Differentiable as if nothing were rounded: with respect to `x` and the steps.
    """
    rounded, step = round_rows(x)
    half = 2 ** (weight.bits - 1)  # codes less this fit signed bytes
    zero = None
    if weight.zero_point is not None:
        zero = dense(weight.zero_point).astype(jnp.int32) - half
        zero = zero.reshape((*(1,) * (x.ndim - 1), -1))
    # In 8-bit integers an H200 gave wrong sums (jax 0.11.2). bfloat16 holds all of
    # them, and float32 their sums up to 2^24.
    sums = jax.lax.platform_dependent(
        rounded,
        weight.codes,
        zero,
        cpu=functools.partial(_in_integers, half=half),
        default=functools.partial(_in_floats, half=half),
    )
    scale = weight.steps.scale.reshape((*(1,) * (x.ndim - 1), -1))
    return sums * (step * scale)


def _in_integers(x: jax.Array, codes: Any, zero: Any, half: int) -> jax.Array:
    # Unsigned arithmetic wraps, so that the bits are those of the signed difference.
    shifted = dense(codes).astype(jnp.uint8) - np.uint8(half)
    signed = jax.lax.bitcast_convert_type(shifted, jnp.int8)
    return _sums(x.astype(jnp.int8), signed, zero, jnp.int32)


def _in_floats(x: jax.Array, codes: Any, zero: Any, half: int) -> jax.Array:
    signed = dense(codes).astype(jnp.int32) - half
    kind = jnp.bfloat16
    return _sums(x.astype(kind), signed.astype(kind), zero, jnp.float32)


def _sums(x: jax.Array, codes: jax.Array, zero: Any, kind: Any) -> jax.Array:
    """Compute `x @ (codes - zero)`, summed in this dtype; float32."""
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    sums = jax.lax.dot_general(x, codes, dimensions, preferred_element_type=kind)
    if zero is not None:
        total = jnp.sum(x, axis=-1, keepdims=True, dtype=kind)
        sums = sums - total * zero.astype(kind)
    return sums.astype(jnp.float32)


def _forward(x: jax.Array, weight: Any) -> tuple[jax.Array, tuple]:
    return integer_product(x, weight), (x, weight)


def _backward(kept: tuple, change: jax.Array) -> tuple:
    def product(x: jax.Array, weight: Any) -> jax.Array:
        return contract(x, weight.materialize(), Arithmetic()).astype(jnp.float32)

    return jax.vjp(product, *kept)[1](change)


integer_product.defvjp(_forward, _backward)

"""Differentiable bit width (Uhlich et al. 2019)."""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax

from jaxcompress.quantization.gptq import NEAREST
from jaxcompress.quantization.grids import Block, Steps, spread
from jaxcompress.quantization.straight_through_estimator import straight

START, FEWEST, MOST = 4, 2, 8  # bits
RATE = 0.05  # in bits, and in log scales


def continuous_bits(
    x: jax.Array,
    error: Callable[[jax.Array], jax.Array],
    *,
    grid: str,
    block: Block,
    cost: float,
    steps: int,
) -> float:
    """Return the width of least `error + cost * width`, between 2 and 8; reads values.

    The levels reach as far as the width says, `2^width` of them though it is no whole
    number: a step learns from rounding and clipping, the width from what is clipped.

    Args:
      x: float32 weights `[..., inputs, outputs]`.
      error: of a dense weight, relative.
      grid, block: as in `learned`.
      cost: of a bit.
      steps: of gradient descent.

    Source: Uhlich et al. 2019, "Mixed precision DNNs: all you need is a good
    parametrization" (arXiv 1905.11452, section 3).
    """
    sides = (START - 1, START - 1) if grid == "sign_split" else START
    start = NEAREST[grid](x, bits=sides, block=block, search=True).steps
    start = jax.tree.map(lambda s: s.astype(jnp.float32), start)
    descend = functools.partial(_descend, x, error, grid, block, cost, steps)
    return float(jax.jit(descend)(start))


def _descend(
    x: jax.Array,
    error: Callable[[jax.Array], jax.Array],
    grid: str,
    block: Block,
    cost: float,
    count: int,
    start: Steps,
) -> jax.Array:
    def total(theta: tuple[Steps, jax.Array]) -> jax.Array:
        value = _values(x, start, theta, grid, block)
        return error(value) + cost * theta[1]

    optimizer = optax.adam(optax.linear_schedule(RATE, 0.0, count))

    def improve(carry: tuple, _: None) -> tuple[tuple, None]:
        theta, state, best = carry
        loss, gradient = jax.value_and_grad(total)(theta)
        better = loss < best[0]
        best = (jnp.where(better, loss, best[0]), jnp.where(better, theta[1], best[1]))
        updates, state = optimizer.update(gradient, state)
        logs, width = cast(tuple, optax.apply_updates(theta, updates))
        return ((logs, jnp.clip(width, FEWEST, MOST)), state, best), None

    theta = (jax.tree.map(jnp.zeros_like, start), jnp.asarray(float(START)))
    carry = (theta, optimizer.init(theta), (jnp.inf, theta[1]))
    (_, _, (_, width)), _ = jax.lax.scan(improve, carry, length=count)
    return width


def _values(
    x: jax.Array, start: Steps, theta: tuple[Steps, jax.Array], grid: str, block: Block
) -> jax.Array:
    """Return grid values of `theta`: logs of scales and a width."""
    logs, width = theta
    scale = start.scale * jnp.exp(logs.scale)
    if grid == "symmetric":
        low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    elif grid == "sign_split":
        high = 2 ** (width - 1) - 1
        low = -high
    else:
        part = start.zero_point / (2**START - 1)  # of the range below zero
        part = spread(Steps(part), block, x.shape[-2]).scale
        low, high = -part * (2**width - 1), (1 - part) * (2**width - 1)
    wide = spread(Steps(scale), block, x.shape[-2]).scale
    if start.negative_scale is not None:
        other = start.negative_scale * jnp.exp(logs.negative_scale)
        other = spread(Steps(other), block, x.shape[-2]).scale
        wide = jnp.where(x > 0, wide, other)
    level = straight(jnp.round, x / wide)
    return jnp.clip(level, low, high) * wide

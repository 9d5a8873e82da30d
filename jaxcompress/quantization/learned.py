"""Automatic quantization: the grid found by gradient descent on the error it makes."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.calibration.feedback import damped, descend, each_slice, layer_loss
from jaxcompress.calibration.moments import Moments, require
from jaxcompress.quantization.grids import (
    Block,
    Quantized,
    Steps,
    decode,
    encode,
    quantized,
    spread,
)
from jaxcompress.quantization.nearest import split, store_step
from jaxcompress.quantization.second_order import NEAREST, gptq
from jaxcompress.tree.leaves import dense
from jaxcompress.tree.methods import method

ROUNDS = 4  # of gradient descent over steps, then of moving codes


@method()
def learned(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    bits: Any,
    block: Block = None,
    grid: Literal["symmetric", "asymmetric", "sign_split"] = "symmetric",
    steps: int = 120,
    learning_rate: float = 0.01,
    damping: float = 0.01,
    scale_dtype: str = "bfloat16",
) -> Quantized:
    """Minimizes the quantization error by gradient descent over what defines the grid.

    Without moments the error is that of the weights: scales (clipping) and zero points
    descend, gradients passing the rounding straight through, and every block keeps its
    best. With moments it is the expected squared change of the layer's output: from
    the better of `gptq` and rounding to nearest, scales descend with the codes fixed,
    then every code moves to the level that is best with all others as they stand, in
    turn. The best seen is kept, so the result is never worse than its start.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs, `second`; or None.
      bits: as the grid's nearest method takes them; 2 or more.
      block: inputs that share a step; None: all; "tensor": the matrix.
      grid: "symmetric", "asymmetric" (zero point) or "sign_split".
      steps: of gradient descent; each costs one product with the second moment.
      learning_rate: in log scales, and in levels for zero points; decays to 0.
      damping: of the second moment, as in `gptq`.
      scale_dtype: of the stored scales.

    Raises:
      ValueError: moments that do not fit, an option out of range.

    Source: learned steps as in LSQ (Esser et al. 2019, arXiv 1902.08153). Rounding by
    gradients (AutoRound, Cheng et al. 2023, arXiv 2309.05516) lost to coordinate
    descent on this objective, where that is exact, and is not used.
    """
    if grid not in NEAREST:
        raise ValueError(f"learned takes grid={' or '.join(NEAREST)}, not {grid!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"learned takes one or more steps, not {steps!r}")
    if grid == "symmetric" and bits == 1:
        raise ValueError("learned takes 2 or more bits: one bit has only its mean")
    options = {"bits": bits, "block": block, "scale_dtype": scale_dtype}
    nearest = NEAREST[grid](x, search=True, **options)
    place = _Place(grid, nearest.bits, block, steps, learning_rate, scale_dtype)
    wide = x.astype(jnp.float32)
    if moments is None:
        one = functools.partial(_descend_weights, place=place)
        codes, found = each_slice(one, wide, nearest.steps)
    else:
        second = require(moments, x, "learned").second
        safe = each_slice(functools.partial(damped, damping=damping), second)
        fed = gptq(x, moments, grid=grid, damping=damping, **options)
        one = functools.partial(_descend_output, place=place)
        starts = (dense(nearest), dense(fed))
        codes, found = each_slice(one, wide, safe, nearest.steps, *starts)
    return quantized(
        codes,
        found,
        grid=grid,
        bits=nearest.bits,
        block=block,
        dtype=x.dtype,
        scale_dtype=scale_dtype,
    )


class _Place(NamedTuple):
    """What is fixed while a slice is learned; hashable."""

    grid: str
    bits: Any
    block: Block
    steps: int
    learning_rate: float
    scale_dtype: str


def _straight(function: Callable, x: jax.Array) -> jax.Array:
    """`function(x)` with the gradient of `x`."""
    return x + jax.lax.stop_gradient(function(x) - x)


def _stretched(start: Steps, theta: Steps, place: _Place) -> Steps:
    """The start's scales times e^theta, as stored; zero points `theta` off, rounded."""

    def scale(base: jax.Array, log: jax.Array) -> jax.Array:
        size = jnp.abs(base) * jnp.exp(log)
        store = functools.partial(store_step, dtype=place.scale_dtype)
        return jnp.sign(base) * _straight(store, size)

    zero, negative = start.zero_point, start.negative_scale
    if zero is not None:
        moved = jnp.clip(zero + theta.zero_point, 0, 2**place.bits - 1)
        zero = _straight(jnp.round, moved)
    if negative is not None:
        negative = scale(negative, theta.negative_scale)
    return Steps(scale(start.scale, theta.scale), zero, negative)


def _ends(place: _Place) -> tuple[int, int]:
    """The lowest level where there is no zero point, and the highest code."""
    if place.grid == "sign_split":
        positive, negative = place.bits
        return 1 - 2**negative, 2**positive + 2**negative - 2
    if place.grid == "asymmetric":
        return 0, 2**place.bits - 1
    return -(2 ** (place.bits - 1)), 2**place.bits - 1


@functools.partial(jax.jit, static_argnames="place")
def _descend_weights(
    x: jax.Array, start: Steps, *, place: _Place
) -> tuple[jax.Array, Steps]:
    """Codes `[inputs, outputs]` and steps of least squared error of the weights."""
    blocks = split(x, place.block)
    start = jax.tree.map(lambda s: s.astype(jnp.float32), start)
    lowest, highest = _ends(place)
    unit = jnp.square(start.scale)  # no square over- or underflows in these units

    def errors(theta: Steps) -> tuple[jax.Array, tuple[jax.Array, Steps]]:
        steps = _stretched(start, theta, place)
        wide = jax.tree.map(lambda s: s[..., None, :], steps)
        scale = wide.scale
        if wide.negative_scale is not None:
            scale = jnp.where(blocks > 0, scale, wide.negative_scale)
        bottom = lowest if wide.zero_point is None else -wide.zero_point
        level = _straight(jnp.round, blocks / scale)
        level = jnp.clip(level, bottom, bottom + highest)
        error = jnp.sum(jnp.square(level * scale - blocks), axis=-2) / unit
        return jnp.sum(error), (error, steps)

    theta = jax.tree.map(jnp.zeros_like, start)
    steps = _descent(errors, theta, place)
    wide = spread(steps, place.block, x.shape[0])
    return encode(x, wide, grid=place.grid, bits=place.bits), steps


@functools.partial(jax.jit, static_argnames="place")
def _descend_output(
    x: jax.Array,
    second: jax.Array,
    start: Steps,
    *values: jax.Array,
    place: _Place,
) -> tuple[jax.Array, Steps]:
    """Codes and steps of least expected output error; `values` are where to start."""
    start = jax.tree.map(lambda s: s.astype(jnp.float32), start)
    wide = spread(start, place.block, x.shape[0])
    losses = jnp.stack([layer_loss(x, value, second) for value in values])
    value = jnp.stack([v.astype(jnp.float32) for v in values])[jnp.argmin(losses)]
    codes = encode(value, wide, grid=place.grid, bits=place.bits)
    scaling = place._replace(steps=max(1, place.steps // ROUNDS))

    def one_round(best: tuple, _: None) -> tuple[tuple, None]:
        codes, steps, _ = best

        def error(theta: Steps) -> tuple[jax.Array, tuple[jax.Array, Steps]]:
            new = _stretched(steps, theta, place)._replace(zero_point=steps.zero_point)
            spreaded = spread(new, place.block, x.shape[0])
            value = decode(codes, spreaded, grid=place.grid, bits=place.bits)
            # The gradient of tr(D^T S D) is 2 S D: one product serves both.
            moved = jax.lax.stop_gradient(second @ (value - x))
            loss = jnp.sum(jax.lax.stop_gradient(value - x) * moved)
            slope = 2 * jnp.sum(moved * value)
            return slope, (loss, new)

        theta = jax.tree.map(jnp.zeros_like, steps)
        found = _descent(error, theta, scaling)
        wide = spread(found, place.block, x.shape[0])
        broad = jax.tree.map(lambda s: jnp.broadcast_to(s, x.shape), wide)

        def nearest(j: jax.Array, row: jax.Array) -> jax.Array:
            here = jax.tree.map(lambda s: s[jnp.minimum(j, x.shape[0] - 1)], broad)
            chosen = encode(row, here, grid=place.grid, bits=place.bits)
            return decode(chosen, here, grid=place.grid, bits=place.bits)

        value = decode(codes, wide, grid=place.grid, bits=place.bits)
        value = descend(x, value, second, nearest)
        moved = encode(value, wide, grid=place.grid, bits=place.bits)
        new = (moved, found, layer_loss(x, value, second))
        better = new[2] < best[2]
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best), None

    (codes, steps, _), _ = jax.lax.scan(
        one_round, (codes, start, jnp.min(losses)), length=ROUNDS
    )
    return codes, steps


def _descent(loss: Callable, theta: Steps, place: _Place) -> Steps:
    """The steps of least error that Adam comes across, the start included.

    `loss(theta)` returns what is differentiated and `(error, steps)`; the errors of
    separate blocks are compared block by block.
    """
    schedule = optax.linear_schedule(place.learning_rate, 0.0, place.steps)
    optimizer = optax.adam(schedule)

    def keep(new: tuple, old: tuple) -> tuple:
        better = new[0] < old[0]
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)

    def improve(carry: tuple, _: None) -> tuple[tuple, None]:
        theta, state, best = carry
        (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(theta)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(theta, updates), state, keep(found, best)), None

    _, found = loss(theta)
    carry = (theta, optimizer.init(theta), found)
    (_, _, (_, steps)), _ = jax.lax.scan(improve, carry, length=place.steps)
    return steps

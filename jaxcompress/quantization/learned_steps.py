"""Gradient descent over steps, zero points and the rounding of every weight."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.calibration.error_feedback import descend, layer_loss
from jaxcompress.quantization.grids import Scheme, Steps, decode, encode, spread
from jaxcompress.quantization.nearest import split, store_step
from jaxcompress.quantization.straight_through_estimator import (
    quantize_through,
    straight,
)

ROUNDS = 4  # of gradient descent over steps, then of moving codes


class Place(NamedTuple):
    """Constants of a slice while it is learned; hashable."""

    scheme: Scheme
    steps: int
    learning_rate: float
    rounding: str


def stretched(start: Steps, theta: Steps, place: Place) -> Steps:
    """Return the start's scales times e^theta, as stored; zero points `theta` off,
    rounded.
    """

    def scale(base: Any, log: Any) -> jax.Array:
        size = jnp.abs(base) * jnp.exp(log)
        store = functools.partial(store_step, dtype=place.scheme.scale_dtype)
        return jnp.sign(base) * straight(store, size)

    zero, negative = start.zero_point, start.negative_scale
    if zero is not None:
        moved = jnp.clip(zero + theta.zero_point, 0, 2**place.scheme.bits - 1)
        zero = straight(jnp.round, moved)
    if negative is not None:
        negative = scale(negative, theta.negative_scale)
    return Steps(scale(start.scale, theta.scale), zero, negative)


@functools.partial(jax.jit, static_argnames="place")
def descend_weights(
    x: jax.Array, start: Steps, *, place: Place
) -> tuple[jax.Array, Steps]:
    """Return codes `[inputs, outputs]` and steps of least squared error of the
    weights.
    """
    start = jax.tree.map(lambda s: s.astype(jnp.float32), start)
    unit = jnp.square(start.scale)  # no square over- or underflows in these units

    def errors(theta: Steps) -> tuple[jax.Array, tuple[jax.Array, Steps]]:
        steps = stretched(start, theta, place)
        value = quantize_through(
            x, steps, block=place.scheme.block, **place.scheme.options
        )
        error = (
            jnp.sum(jnp.square(split(value - x, place.scheme.block)), axis=-2) / unit
        )
        return jnp.sum(error), (error, steps)

    theta = jax.tree.map(jnp.zeros_like, start)
    steps = _descent(errors, theta, place)
    wide = spread(steps, place.scheme.block, x.shape[0])
    return encode(x, wide, **place.scheme.options), steps


@functools.partial(jax.jit, static_argnames="place")
def descend_outputs(
    x: jax.Array,
    second: jax.Array,
    start: Steps,
    *values: jax.Array,
    place: Place,
) -> tuple[jax.Array, Steps]:
    """Return codes and steps of least expected output error; `values` are where to
    start.
    """
    start = jax.tree.map(lambda s: s.astype(jnp.float32), start)
    wide = spread(start, place.scheme.block, x.shape[0])
    losses = jnp.stack([layer_loss(x, value, second) for value in values])
    value = jnp.stack([v.astype(jnp.float32) for v in values])[jnp.argmin(losses)]
    codes = encode(value, wide, **place.scheme.options)
    scaling = place._replace(steps=max(1, place.steps // ROUNDS))

    def one_round(best: tuple, _: None) -> tuple[tuple, None]:
        codes, steps, _ = best

        def error(theta: Steps) -> tuple[jax.Array, tuple[jax.Array, Steps]]:
            new = stretched(steps, theta, place)._replace(zero_point=steps.zero_point)
            spreaded = spread(new, place.scheme.block, x.shape[0])
            value = decode(codes, spreaded, **place.scheme.options)
            loss = output_error(x, second, value)
            return loss, (jax.lax.stop_gradient(loss), new)

        theta = jax.tree.map(jnp.zeros_like, steps)
        learned = _descent(error, theta, scaling)
        wide = spread(learned, place.scheme.block, x.shape[0])
        broad = jax.tree.map(lambda s: jnp.broadcast_to(s, x.shape), wide)

        def nearest(j: jax.Array, row: jax.Array) -> jax.Array:
            row_steps = jax.tree.map(lambda s: s[jnp.minimum(j, x.shape[0] - 1)], broad)
            chosen = encode(row, row_steps, **place.scheme.options)
            return decode(chosen, row_steps, **place.scheme.options)

        value = decode(codes, wide, **place.scheme.options)
        value = descend(x, value, second, nearest)
        moved = encode(value, wide, **place.scheme.options)
        new = (moved, learned, layer_loss(x, value, second))
        better = new[2] < best[2]
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best), None

    (codes, steps, _), _ = jax.lax.scan(
        one_round, (codes, start, jnp.min(losses)), length=ROUNDS
    )
    return codes, steps


def output_error(x: jax.Array, second: jax.Array, value: jax.Array) -> jax.Array:
    """Compute `tr(D^T S D)`, D the change; one product serves the value and its
    gradient.
    """
    change = value - x
    fixed = jax.lax.stop_gradient(change)
    moved = jax.lax.stop_gradient(second @ change)
    # The gradient is 2 S D, and the value exact: the second term is zero.
    return jnp.sum(fixed * moved) + 2 * jnp.sum(moved * (change - fixed))


def descend_gradients(
    x: jax.Array, start: Steps, loss: Callable[[jax.Array], jax.Array], place: Place
) -> tuple[jax.Array, Steps]:
    """Return codes and steps of the least loss that gradients through the rounding
    find.

    With `rounding="offsets"` every weight has one, in levels, of at most half a level.

    Args:
      x: float32 weights `[..., inputs, outputs]`.
      start: steps to begin with.
      loss: of the dense weight.
      place: grid, steps, rounding.
    """
    start = jax.tree.map(lambda s: s.astype(jnp.float32), start)
    level = jnp.abs(scale_of(x, spread(start, place.scheme.block, x.shape[-2])))

    def moved(offsets: jax.Array | None) -> jax.Array:
        return x if offsets is None else x + jnp.clip(offsets, -0.5, 0.5) * level

    def error(theta: tuple) -> tuple[jax.Array, tuple[jax.Array, tuple]]:
        steps = stretched(start, theta[0], place)
        value = quantize_through(
            moved(theta[1]), steps, block=place.scheme.block, **place.scheme.options
        )
        value_of_loss = loss(value)
        return value_of_loss, (jax.lax.stop_gradient(value_of_loss), (theta[1], steps))

    offsets = jnp.zeros_like(x) if place.rounding == "offsets" else None
    theta = (jax.tree.map(jnp.zeros_like, start), offsets)
    offsets, steps = _descent(error, theta, place)
    wide = spread(steps, place.scheme.block, x.shape[-2])
    return encode(moved(offsets), wide, **place.scheme.options), steps


def scale_of(x: jax.Array, wide: Steps) -> jax.Array:
    """Return the scale of the side of each weight; `wide` broadcasts against `x`."""
    if wide.negative_scale is None:
        return jnp.broadcast_to(wide.scale, x.shape)
    return jnp.where(x > 0, wide.scale, wide.negative_scale)


def _descent(loss: Callable, theta: Any, place: Place) -> Any:
    """Return the auxiliary output at the best iterate, the initial one included.

    `loss(theta)` returns what is differentiated and `(error, what to keep)`; the errors
    of separate blocks are compared block by block. Adam on steps; where there are
    offsets, the signs of gradients on everything, offsets travelling half a level.
    """
    decay = optax.linear_schedule(1.0, 0.0, place.steps)
    if place.rounding == "offsets":
        rates = (place.learning_rate, 1 / place.steps)
        optimizer = optax.chain(optax.scale_by_sign(), optax.scale_by_schedule(decay))
    else:
        rates = place.learning_rate
        optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(decay))

    def keep(new: tuple, old: tuple) -> tuple:
        better = new[0] < old[0]
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)

    def improve(carry: tuple, _: None) -> tuple[tuple, None]:
        theta, state, best = carry
        (_, auxiliary), gradient = jax.value_and_grad(loss, has_aux=True)(theta)
        updates, state = optimizer.update(gradient, state)
        theta = _moved(theta, updates, rates)
        return (theta, state, keep(auxiliary, best)), None

    _, auxiliary = loss(theta)
    carry = (theta, optimizer.init(theta), auxiliary)
    (theta, _, best), _ = jax.lax.scan(improve, carry, length=place.steps)
    return keep(loss(theta)[1], best)[1]


def _moved(theta: Any, updates: Any, rates: Any) -> Any:
    """Step against the updates; each part of a tuple at its own rate."""
    if isinstance(rates, tuple):
        return tuple(map(_moved, theta, updates, rates))
    return jax.tree.map(lambda t, u: t - rates * u, theta, updates)

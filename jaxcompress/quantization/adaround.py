"""AdaRound: a continuous relaxation of rounding up or down."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax

from jaxcompress.quantization.grids import Steps, decode, encode, spread
from jaxcompress.quantization.learned_steps import Place, scale_of, stretched

RATE = 0.2  # of Adam, on the logits
PUSH = 50.0  # of the regularizer, relative to the loss of rounding to nearest
SHARPEST, FLATTEST = 20.0, 2.0  # its exponent, from first to last
FREE = 0.2  # the part of the descent that is not pushed
OUTER = 0.1  # how far the sigmoid reaches beyond 0 and 1, so that it gets there


def descend_relaxed(
    x: jax.Array, start: Steps, loss: Callable[[jax.Array], jax.Array], place: Place
) -> tuple[jax.Array, Steps]:
    """Return codes and steps: up or down is relaxed to a real number per weight,
    learned, then fixed.

    It begins at the weights themselves, where nothing is rounded; a regularizer pushes
    every weight to one of its two levels as the descent proceeds. Rounding to nearest
    with the steps of the start is kept where it is better in the end.

    Args:
      x: float32 weights `[..., inputs, outputs]`.
      start: steps to begin with.
      loss: of the dense weight.
      place: grid, steps of descent, learning rate of the grid's steps.

    Source: AdaRound, Nagel et al. 2020 (arXiv 2004.10568, sections 3.2 and 3.3), with
    steps that descend too and fewer iterations at a higher rate.
    """
    start = jax.tree.map(lambda s: s.astype(jnp.float32), start)
    # Where codes end is fixed, in levels; only scales descend.
    wide = spread(start, place.scheme.block, x.shape[-2])
    scale = scale_of(x, wide)
    ends = [
        decode(
            encode(sign * jnp.full_like(x, 1e30), wide, **place.scheme.options),
            wide,
            **place.scheme.options,
        )
        / scale_of(sign * jnp.ones_like(x), wide)
        for sign in (-1, 1)
    ]
    ends = jnp.minimum(*ends), jnp.maximum(*ends)
    below = jnp.floor(x / scale)

    def values(theta: Steps, up: jax.Array) -> tuple[jax.Array, Steps]:
        steps = stretched(start, theta, place)
        steps = steps._replace(zero_point=start.zero_point)
        now = scale_of(x, spread(steps, place.scheme.block, x.shape[-2]))
        return jnp.clip(below + up, *ends) * now, steps

    def up(logits: jax.Array) -> jax.Array:
        return jnp.clip((1 + 2 * OUTER) * jax.nn.sigmoid(logits) - OUTER, 0, 1)

    nearest = decode(
        encode(x, wide, **place.scheme.options), wide, **place.scheme.options
    )
    worst = loss(nearest)
    unit = jnp.where(worst > 0, worst, 1)  # nothing to learn

    def total(theta: tuple, done: jax.Array) -> jax.Array:
        part = jnp.clip((done - FREE) / (1 - FREE), 0, 1)
        sharp = SHARPEST + (FLATTEST - SHARPEST) * part
        soft = up(theta[1])
        undecided = jnp.mean(1 - jnp.abs(2 * soft - 1) ** sharp)
        push = jnp.where(done >= FREE, PUSH, 0)
        return loss(values(theta[0], soft)[0]) / unit + push * undecided

    rates = (place.learning_rate, RATE)
    decay = optax.linear_schedule(1.0, 0.1, place.steps)
    optimizer = optax.chain(
        optax.scale_by_adam(b2=0.99), optax.scale_by_schedule(decay)
    )

    def improve(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
        theta, state = carry
        gradient = jax.grad(total)(theta, i / place.steps)
        updates, state = optimizer.update(gradient, state)
        theta = tuple(
            jax.tree.map(lambda t, u, rate=rate: t - rate * u, part, update)
            for part, update, rate in zip(
                theta, cast(tuple, updates), rates, strict=True
            )
        )
        return (theta, state), None

    fraction = jnp.clip(x / scale - below, 0.01, 0.99)
    logits = -jnp.log((1 + 2 * OUTER) / (fraction + OUTER) - 1)
    theta = (jax.tree.map(jnp.zeros_like, start), logits)
    carry = (theta, optimizer.init(theta))
    (theta, _), _ = jax.lax.scan(improve, carry, jnp.arange(place.steps))
    settled, steps = values(theta[0], (up(theta[1]) > 0.5).astype(jnp.float32))
    better = loss(settled) < worst
    steps = jax.tree.map(lambda a, b: jnp.where(better, a, b), steps, start)
    value = jnp.where(better, settled, nearest)
    wide = spread(steps, place.scheme.block, x.shape[-2])
    return encode(value, wide, **place.scheme.options), steps

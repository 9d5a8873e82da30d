"""Relative updates: optimizers that act on the logarithms of magnitudes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress.types import Params


def relative(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Train the logarithms of magnitudes: what `optimizer` returns is relative.

    For scales and steps, which differ by orders of magnitude within one array: with
    `relative(optax.adam(0.01))` each changes by about a percent per step. Zeros stay.

    Args:
      optimizer: of Optax; its updates are taken as changes of logarithms.

    Raises:
      ValueError: in `update`, no parameters.

    Example:
      >>> optimizer = jc.optimizers.relative(optax.adam(0.01))
    """

    def update(
        updates: Any, state: Any, params: Params | None = None
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "relative needs the parameters; call update(gradients, state, params)"
            )
        size = jax.tree.map(jnp.abs, params)
        scaled = jax.tree.map(jnp.multiply, updates, size)
        changes, state = optimizer.update(scaled, state, params)
        return jax.tree.map(jnp.multiply, changes, size), state

    return optax.GradientTransformation(optimizer.init, update)


def relative_adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Build Adam on relative changes (`relative`), its rate decayed by a cosine to
    zero.

    Args:
      rate: of the first step, relative to each number.
      steps: until the rate is zero.

    Example:
      >>> optimizer = jc.optimizers.relative_adam(0.01, steps=100)
    """
    return relative(optax.adam(optax.cosine_decay_schedule(rate, steps)))

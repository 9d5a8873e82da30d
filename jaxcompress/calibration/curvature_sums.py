"""Products of gradients, summed over sequences, and the curvatures that they make."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.error_feedback import shrunk
from jaxcompress.calibration.output_feedback import (
    choose_shrinkage,
    count_groups,
)


@dataclasses.dataclass
class CurvatureSum:
    """The sum of one leaf's products, apart for sequences of even and of odd number.

    Args:
      halves: float64 `[slices, outputs]`, or float32 `[slices, outputs, outputs]`.
    """

    halves: list[np.ndarray | None] = dataclasses.field(
        default_factory=lambda: [None, None]
    )

    def add(self, number: int, products: Any) -> None:
        """Add the products of sequence `number`."""
        half = self.halves[number % 2]
        wide = np.float32 if products.ndim == 3 else np.float64
        products = np.asarray(products, wide)
        if half is None:
            self.halves[number % 2] = products.copy()
        else:
            half += products

    def finish(
        self, name: str, shape: tuple[int, ...], tokens: float, *, embedding: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return curvatures `[..., outputs]` and joint ones, or None; empties the sum.

        Args:
          name: of the leaf, for the message.
          shape: of the matricized leaf, `[..., inputs, outputs]`.
          tokens: how many there were.
          embedding: all rows get their mean: rare ones, coded coarser, would lose more
            than second order predicts.

        Raises:
          ValueError: gradients that are not finite.
        """
        *stack, inputs, outputs = shape
        halves = [half for half in self.halves if half is not None]
        self.halves = [None, None]
        joint, diagonal = None, sum(halves) / (2 * tokens * inputs)
        if not np.isfinite(diagonal).all():
            raise ValueError(
                f"{name}: its gradient is not finite on these batches; look for NaN in "
                "the weights before it"
            )
        if diagonal.ndim == 3:
            shrinkage = choose_shrinkage(halves) if len(halves) > 1 else 1.0
            del halves
            if shrinkage < 1:
                joint = shrunk(diagonal, shrinkage).reshape(*stack, outputs, outputs)
                joint = jnp.asarray(joint, jnp.float32)
            diagonal = np.diagonal(diagonal, axis1=1, axis2=2)
        diagonal = diagonal.reshape(*stack, outputs)
        if embedding:
            diagonal = np.broadcast_to(
                diagonal.mean(axis=-1, keepdims=True), diagonal.shape
            )
        return jnp.asarray(diagonal, jnp.float32), joint


def has_use_for_pairs(shape: tuple[int, ...]) -> bool:
    """Return whether joint curvatures of `[..., inputs, outputs]` pay off."""
    inputs, outputs = shape[-2:]
    return outputs <= inputs and count_groups(outputs) > 1


@functools.partial(jax.jit, static_argnames="pairs")
def column_products(
    gradient: jax.Array, factors: jax.Array | None, *, pairs: bool
) -> jax.Array:
    """Multiply a gradient's columns with themselves, or each other, in a metric.

    Args:
      gradient: `[..., inputs, outputs]`.
      factors: of the metric, `[slices, inputs, inputs]`; None: the identity's.
      pairs: all pairs of columns.

    Returns:
      `[slices, outputs]`, or `[slices, outputs, outputs]` for pairs.
    """
    flat = gradient.reshape(-1, *gradient.shape[-2:]).astype(jnp.float32)
    high = jax.lax.Precision.HIGHEST
    if factors is not None:
        flat = jnp.matmul(factors, flat, precision=high)
    if pairs:
        return jnp.matmul(flat.swapaxes(1, 2), flat, precision=high)
    return jnp.sum(flat * flat, axis=1)

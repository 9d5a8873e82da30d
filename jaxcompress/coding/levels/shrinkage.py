"""Shrinkage of curvatures, which calibration, coding and planning share."""

from typing import Any

import jax.numpy as jnp


def shrink_to_mean(curvatures: Any, xp: Any = jnp) -> Any:
    """Shrink curvatures toward their mean, because few tokens make them noisy.

    Args:
      curvatures: `[..., outputs]`, not negative.
      xp: the array library, `jax.numpy` or `numpy`.

    Returns:
      `[..., outputs]`: eight parts of each curvature and one of the mean; ones where
      all are zero.
    """
    mean = curvatures.mean(axis=-1, keepdims=True)
    return xp.where(mean > 0, (8 * curvatures + mean) / 9, 1)

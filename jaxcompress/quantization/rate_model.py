"""Rate model: entropy of uniformly quantized Gaussian rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def first_guess(x: jax.Array, factor: jax.Array, rate: float) -> float | None:
    """Return base-2 logarithm of the scale at which rows of Gaussian levels meet the
    rate.
    """
    logs = deviations(x, factor)
    if logs is None:
        return None
    low, high = float(logs.min()) - 16, float(logs.max()) + 6
    for _ in range(40):
        middle = (low + high) / 2
        above = gaussian_bits(logs - middle).mean() > rate
        low, high = (middle, high) if above else (low, middle)
    return high


def deviations(x: jax.Array, factor: jax.Array) -> np.ndarray | None:
    """Return base-2 logarithm of each row's size in units of its step at a scale of
    one.

    None where all weights are zero.
    """
    sizes = np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axis=1))
    if not sizes.any():
        return None
    sizes = np.maximum(sizes, sizes.max() * 1e-6)
    return np.log2(sizes / np.asarray(jnp.diagonal(factor), np.float64))


def gaussian_bits(logs: np.ndarray) -> np.ndarray:
    """Return bits of rounded Gaussian numbers of these standard deviations, as log2."""
    points, bits = _curve()
    return np.interp(logs, points, bits) + np.maximum(0, logs - points[-1])


@functools.cache
def _curve() -> tuple[np.ndarray, np.ndarray]:
    points = np.linspace(-4, 5, 181)
    edges = np.arange(-256, 257) - 0.5
    bits = []
    for point in points:
        scale = 2.0**point * math.sqrt(2)
        below = np.array([math.erf(edge / scale) for edge in edges]) / 2
        shares = np.diff(below)
        shares = shares[shares > 0]
        bits.append(-(shares * np.log2(shares)).sum())
    bits[0] = 0.0
    return points, np.array(bits)

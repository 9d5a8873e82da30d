"""Matrices, inputs, moments and losses, for tests of pruning and of factors."""

import jax.numpy as jnp
import numpy as np

import jaxcompress as jc

INPUTS, OUTPUTS, RANK = 24, 40, 6
SIZES = (12, 6, 5)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wide(x):
    return np.asarray(jc.materialize(x), np.float64)


MATRIX = random(INPUTS, OUTPUTS)


def correlated(inputs, seed=0, tokens=200):
    """Inputs `[tokens, inputs]` of very different sizes that depend on each other."""
    rows = random(tokens, inputs, seed=seed).astype(np.float64)
    return rows @ random(inputs, inputs, seed=seed + 1) * np.geomspace(1, 20, inputs)


def moments_of(rows):
    second = rows.T @ rows / len(rows)
    return jc.moments_from_covariance(jnp.asarray(second, jnp.float32))


def output_loss(x, value, rows):
    """Mean squared change of the outputs, row by row."""
    change = np.asarray(x, np.float64) - wide(value)
    return float(np.mean([np.sum((row @ change) ** 2) for row in rows]))


def squared(x, value):
    return float(np.sum((np.asarray(x, np.float64) - wide(value)) ** 2))


def weights(*shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_t(4, shape), dtype)


def covariance(inputs, seed=0):
    """Correlated inputs of very different size: a decaying spectrum, turned."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(inputs, inputs)))
    second = (basis * np.arange(1.0, inputs + 1) ** -1.2) @ basis.T
    size = np.exp(0.7 * rng.normal(size=inputs))
    return second * np.outer(size, size)


def moments(inputs=24, seed=0):
    return jc.moments_from_covariance(
        jnp.asarray(covariance(inputs, seed), jnp.float32)
    )


def drifted_moments(rows, drifted):
    """Moments of `rows`, `[tokens, inputs]`, and of a compressed prefix's."""
    count = len(rows)
    return jc.Moments(
        count=jnp.ones(()),
        second=jnp.asarray(rows.T @ rows / count, jnp.float32),
        drifted=jnp.asarray(drifted.T @ drifted / count, jnp.float32),
        cross=jnp.asarray(rows.T @ drifted / count, jnp.float32),
    )

"""Matrices, inputs and losses in NumPy float64, for tests of factors."""

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

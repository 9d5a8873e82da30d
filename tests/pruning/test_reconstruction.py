"""Pruning: what the weights that stay do to make up for the others."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices_for_tests import covariance, moments, weights
from oracles import first_largest

from jaxcompress.calibration.error_feedback import layer_loss
from jaxcompress.calibration.moments import moments_from_covariance
from jaxcompress.pruning import (
    alps,
    magnitude,
    sparsegpt,
    wanda,
)

INPUTS, OUTPUTS = 24, 10
RECONSTRUCTIONS = [sparsegpt, alps]


def oracle_sparsegpt(x, second, counts=None, group=None, block=128, damping=0.01):
    """Optimal brain surgeon in float64, inverting anew for every row."""
    x, (inputs, outputs) = np.array(x, np.float64), x.shape
    second = second + damping * np.diag(second).mean() * np.eye(inputs)
    inverse = [np.linalg.inv(second[j:, j:]) for j in range(inputs)]
    mask = np.zeros(x.shape, bool)
    for j in range(inputs):
        if j % block == 0:
            rows = range(j, min(j + block, inputs))
            cost = np.array([x[i] ** 2 / inverse[i][0, 0] for i in rows])
            if group:
                for o in range(outputs):
                    for i in first_largest(cost[:, o], group):
                        mask[j + i, o] = True
            else:
                for at in first_largest(cost.ravel(), counts[j // block]):
                    mask[j + at // outputs, at % outputs] = True
        error = np.where(mask[j], 0, x[j]) / inverse[j][0, 0]
        x[j:] -= np.outer(inverse[j][:, 0], error)
    return x, mask


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({"sparsity": 0.5, "block": 9}, {"counts": [45, 45, 30], "block": 9}),
        ({"sparsity": 0.7}, {"counts": [72]}),
        ({"nm": "2:4"}, {"group": 2, "block": 4}),
    ],
)
def test_sparsegpt_is_the_optimal_brain_surgeon(options, oracle):
    x = weights(INPUTS, OUTPUTS)
    leaf = sparsegpt(x, moments(), **options, shrinkage=0)
    value, mask = oracle_sparsegpt(x, covariance(INPUTS), **oracle)
    np.testing.assert_array_equal(leaf.kept, mask)
    np.testing.assert_allclose(leaf.materialize(), value, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"nm": "2:4"}])
def test_alps_weights_are_the_best_on_their_support(options):
    x, second = weights(INPUTS, OUTPUTS), covariance(INPUTS)
    leaf = alps(x, moments(), **options, shrinkage=0)
    mask, value = np.asarray(leaf.kept), np.asarray(leaf.materialize(), np.float64)
    damped = second + 0.01 * np.diag(second).mean() * np.eye(INPUTS)
    wide, pull = np.asarray(x, np.float64), damped @ np.asarray(x, np.float64)
    best = np.zeros(wide.shape)
    for o in range(OUTPUTS):
        on = mask[:, o]
        best[on, o] = np.linalg.solve(damped[np.ix_(on, on)], pull[on, o])

    def loss(w):
        return np.sum((w - wide) * (damped @ (w - wide)))

    assert loss(best) <= loss(value) * (1 + 1e-6)
    assert loss(value) < loss(best) * 1.001


@pytest.mark.parametrize(("sparsity", "nm"), [(0.5, None), (0.7, None), (None, "2:4")])
def test_better_methods_lose_less(sparsity, nm):
    x, known = weights(64, 48), moments(64)
    small = [
        f(x, known, sparsity=sparsity, nm=nm).materialize()
        for f in (alps, sparsegpt, wanda, magnitude)
    ]
    found = [float(layer_loss(x, value, known.second)) for value in small]
    kept = [int(jnp.sum(value != 0)) for value in small]
    assert found[0] < 0.85 * found[1] < 0.85 * found[2] < 0.85 * found[3]
    exact = round((1 - (sparsity or 0.5)) * 64 * 48)
    per_output = 48 * round((1 - (sparsity or 0.5)) * 64)
    assert kept == [exact, exact, exact if nm else per_output, exact]


@pytest.mark.slow
@pytest.mark.parametrize("method", RECONSTRUCTIONS)
def test_stacks_are_pruned_slice_by_slice(method):
    x, known = weights(2, INPUTS, OUTPUTS), [moments(seed=0), moments(seed=1)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *known)
    whole = jax.jit(method(sparsity=0.5))(x, both)
    for i in range(2):
        one = method(x[i], known[i], sparsity=0.5)
        np.testing.assert_array_equal(whole.kept[i], one.kept)
        part = jax.tree.map(lambda leaf, i=i: leaf[i], whole).materialize()
        np.testing.assert_allclose(part, one.materialize(), rtol=1e-4, atol=1e-4)


def test_drifted_inputs_are_the_inputs():
    x, first, second = weights(INPUTS, OUTPUTS), moments(seed=0), moments(seed=1)
    both = dataclasses.replace(first, drifted=second.second)
    for method in (wanda, *RECONSTRUCTIONS):
        np.testing.assert_array_equal(
            method(x, both, sparsity=0.5).materialize(),
            method(x, second, sparsity=0.5).materialize(),
        )


@pytest.mark.parametrize("method", [magnitude, wanda, sparsegpt, alps])
def test_layers_of_zeros_and_inputs_that_are_always_zero(method):
    zero = jnp.zeros((INPUTS, OUTPUTS))
    leaf = method(zero, moments(), sparsity=0.5)
    np.testing.assert_array_equal(leaf.materialize(), zero)
    assert int(jnp.sum(leaf.kept)) == INPUTS * OUTPUTS // 2
    dead = covariance(INPUTS)
    dead[::2] = dead[:, ::2] = 0
    known = moments_from_covariance(jnp.asarray(dead, jnp.float32))
    value = method(weights(INPUTS, OUTPUTS), known, sparsity=0.5).materialize()
    assert np.all(np.isfinite(value))
    if method in (wanda, sparsegpt):
        np.testing.assert_array_equal(value[::2], 0)
    nothing = moments_from_covariance(jnp.zeros((INPUTS, INPUTS)))
    told = contextlib.nullcontext()
    if method is not magnitude:
        told = pytest.warns(UserWarning, match="no calibration token reached it")
    with told:
        value = method(weights(INPUTS, OUTPUTS), nothing, sparsity=0.5).materialize()
    assert np.all(np.isfinite(value))

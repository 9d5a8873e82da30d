"""Error feedback, learned and mixed grids, against float64 oracles and inequalities."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.calibration.error_feedback import (
    damped,
    descend,
    feed_back,
    inverse_factor,
    layer_loss,
)
from jaxcompress.calibration.targets import corrected_target

INPUTS, OUTPUTS, BLOCK = 48, 40, 16


def correlated(seed=0, inputs=INPUTS):
    """A second moment with a steep spectrum and uneven channels, float64."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((inputs, inputs)))
    scales = np.exp(rng.standard_normal(inputs) / 2)
    middle = (basis * np.exp(np.linspace(0, -5, inputs))) @ basis.T
    return scales[:, None] * middle * scales


@pytest.fixture(scope="module")
def case():
    weights = np.random.default_rng(1).standard_normal((INPUTS, OUTPUTS))
    second = correlated().astype(np.float32)
    moments = jc.moments_from_covariance(jnp.asarray(second))
    return jnp.asarray(weights, jnp.float32), moments


def loss(x, leaf, moments):
    change = np.asarray(leaf.materialize(), np.float64) - np.asarray(x, np.float64)
    return np.trace(change.T @ np.asarray(moments.second, np.float64) @ change)


def gptq_by_definition(x, second, steps, bits, damping):
    """Rows one by one, each followed by the least-squares move of the rest."""
    x, second = np.asarray(x, np.float64).copy(), np.asarray(second, np.float64)
    damping = damping * np.mean(np.diag(second))
    second = second + damping * np.eye(len(second))
    left = list(np.argsort(-np.diag(second), kind="stable"))
    out = np.empty_like(x)
    while left:
        j, rest = left[0], left[1:]
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        out[j] = np.clip(np.round(x[j] / steps[j]), low, high) * steps[j]
        if rest:
            # min over D of (d_j, D)^T S (d_j, D): D = -S_rr^-1 S_rj d_j.
            pull = np.linalg.solve(second[np.ix_(rest, rest)], second[rest, j])
            x[rest] -= np.outer(pull, out[j] - x[j])
        left = rest
    return out


@pytest.mark.parametrize("bits", [4, 2])
def test_gptq_is_sequential_least_squares(case, bits):
    x, moments = case
    options = {"block": BLOCK, "search": False, "shrinkage": 0.0}
    leaf = jc.gptq(x, moments, bits=bits, **options)
    steps = np.repeat(np.asarray(leaf.scale, np.float64), BLOCK, axis=0)
    oracle = gptq_by_definition(x, moments.second, steps, bits, 0.01)
    found = np.asarray(leaf.materialize(), np.float64)
    assert np.mean(np.abs(found - oracle) > 1e-5) < 0.01  # ties may fall either way
    mine, theirs = (
        loss(x, leaf, moments),
        np.trace(
            (oracle - np.asarray(x)).T @ np.asarray(moments.second) @ (oracle - x)
        ),
    )
    assert mine == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "sign_split"])
def test_worse_weights_better_outputs(case, grid):
    x, moments = case
    bits = (2, 2) if grid == "sign_split" else 3
    nearest = getattr(jc, grid)(x, bits=bits, block=BLOCK, search=True)
    fed = jc.gptq(x, moments, bits=bits, block=BLOCK, grid=grid)
    assert loss(x, fed, moments) < 0.6 * loss(x, nearest, moments)
    weight_error = lambda q: float(jnp.sum(jnp.square(q.materialize() - x)))  # noqa: E731
    assert weight_error(fed) > weight_error(nearest)
    learned = jc.learned(x, moments, bits=bits, block=BLOCK, grid=grid, steps=20)
    assert loss(x, learned, moments) < 0.95 * loss(x, fed, moments)


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "sign_split"])
def test_learned_without_moments_is_never_worse_in_any_block(case, grid):
    x, _ = case
    bits = (2, 1) if grid == "sign_split" else 3
    start = getattr(jc, grid)(x, bits=bits, block=BLOCK, search=True)
    found = jc.learned(x, bits=bits, block=BLOCK, grid=grid, steps=60)

    def errors(leaf):
        change = np.asarray(leaf.materialize() - x, np.float64) ** 2
        return change.reshape(-1, BLOCK, OUTPUTS).sum(1)

    assert np.all(errors(found) <= errors(start) * (1 + 1e-5))
    assert errors(found).sum() < 0.9999 * errors(start).sum()


def test_feedback_does_not_depend_on_the_block_of_rows(case):
    x, moments = case
    factor = inverse_factor(moments.second)

    def half(aux, j, row):
        del aux, j
        return jnp.round(row * 2) / 2, jnp.round(row * 2) / 2

    one = feed_back(x, factor, half, block=INPUTS)
    for block in (7, 16, 128):
        np.testing.assert_allclose(feed_back(x, factor, half, block=block), one)


def test_factor_is_that_of_the_inverse():
    second = correlated(3)
    factor = np.asarray(inverse_factor(jnp.asarray(second, jnp.float32)), np.float64)
    damping = 0.01 * np.mean(np.diag(second)) * np.eye(INPUTS)
    inverse = np.linalg.inv(second.astype(np.float32).astype(np.float64) + damping)
    assert np.allclose(np.tril(factor, -1), 0)
    np.testing.assert_allclose(factor.T @ factor, inverse, rtol=1e-5, atol=1e-5)


def test_dead_inputs_and_no_inputs_are_harmless(case):
    x, moments = case
    second = np.asarray(moments.second).copy()
    second[:, 5] = second[5] = 0
    dead = jc.moments_from_covariance(jnp.asarray(second))
    fed = jc.gptq(x, dead, bits=3, block=BLOCK)
    assert np.isfinite(np.asarray(fed.materialize())).all()
    nearest = jc.symmetric(x, bits=3, block=BLOCK, search=True).materialize()
    np.testing.assert_array_equal(fed.materialize()[5], nearest[5])
    nothing = jc.moments_from_covariance(jnp.zeros((INPUTS, INPUTS)))
    with pytest.warns(UserWarning, match="gptq: no calibration token reached it"):
        fed = jc.gptq(x, nothing, bits=3, block=BLOCK)
    np.testing.assert_array_equal(fed.materialize(), nearest)


def test_descent_never_grows_and_ends_at_a_coordinate_optimum(case):
    x, moments = case
    second = damped(moments.second, 0.01)
    levels = lambda row: jnp.clip(jnp.round(row), -2, 2)  # noqa: E731
    value, losses = levels(x), []
    for _ in range(12):
        losses.append(float(layer_loss(x, value, second)))
        value = descend(x, value, second, lambda j, row: levels(row), block=16)
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    value, s = np.asarray(value, np.float64), np.asarray(second, np.float64)
    best = value - (s @ (value - np.asarray(x))) / np.diag(s)[:, None]
    stays = np.abs(np.clip(np.round(best), -2, 2) - value) < 0.5
    assert stays.mean() > 0.995


def test_drift_is_corrected(case):
    """Least squares on drifted inputs, by definition, from samples."""
    x, _ = case
    rng = np.random.default_rng(5)
    seen = rng.multivariate_normal(np.zeros(INPUTS), correlated(), 4000)
    drift = seen + 0.3 * rng.standard_normal(seen.shape) * seen.std(0)
    second, drifted, cross = (
        a.T @ b / 4000 for a, b in ((seen,) * 2, (drift,) * 2, (seen, drift))
    )
    found = corrected_target(
        x,
        jnp.asarray(drifted, jnp.float32),
        jnp.asarray(cross, jnp.float32),
        damping=1e-7,
    )
    oracle, *_ = np.linalg.lstsq(drift, seen @ np.asarray(x, np.float64), rcond=None)
    np.testing.assert_allclose(found, oracle, rtol=2e-3, atol=2e-3)
    plain = jc.moments_from_covariance(jnp.asarray(second, jnp.float32))
    aware = dataclasses.replace(
        plain,
        drifted=jnp.asarray(drifted, jnp.float32),
        cross=jnp.asarray(cross, jnp.float32),
    )

    def output_error(moments):
        value = np.asarray(jc.gptq(x, moments, bits=4, block=BLOCK).materialize())
        return np.mean((seen @ np.asarray(x) - drift @ value) ** 2)

    assert output_error(aware) < 0.9 * output_error(plain)


def test_outlier_inputs_are_worth_keeping(case):
    x, _ = case
    scales = np.ones(INPUTS)
    scales[[3, 17]] = 30
    moments = jc.moments_from_covariance(jnp.diag(jnp.asarray(scales**2, jnp.float32)))
    plain = jc.symmetric(x, bits=4, search=True)
    mixed = jc.mixed_channels(x, moments, bits=3, channels=2, fine_bits=8)
    assert jc.nbytes(mixed) < 1.02 * jc.nbytes(plain)
    assert loss(x, mixed, moments) < 0.2 * loss(x, plain, moments)
    assert set(np.asarray(mixed.order[:2]).tolist()) == {3, 17}
    exact = jc.mixed_channels(x, moments, bits=3, channels=2, axis="outputs")
    columns = np.asarray(exact.order[:2])
    np.testing.assert_array_equal(exact.materialize()[:, columns], x[:, columns])


def test_stacked_moments_stay_with_their_layer(case):
    x, moments = case
    other = jc.moments_from_covariance(jnp.asarray(correlated(7), jnp.float32))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), moments, other)
    stacked = jnp.stack([x, 2 * x])
    for recipe in (jc.gptq(bits=3, block=BLOCK), jc.mixed_channels(bits=3, channels=4)):
        whole = recipe(stacked, both)
        parts = [recipe(stacked[0], moments), recipe(stacked[1], other)]
        for i, part in enumerate(parts):
            ours = jax.tree.map(lambda a, i=i: a[i], whole)
            same = np.asarray(ours.materialize() == part.materialize())
            assert same.mean() > 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: jc.gptq(x, bits=4), "needs moments"),
        (lambda x, m: jc.gptq(x[:-1], m, bits=4), r"shape \(48, 48\)"),
        (lambda x, m: jc.gptq(x, m, bits=4, grid="nope"), "grid=symmetric"),
        (lambda x, m: jc.gptq(x, m, bits=4, order="up"), "order="),
        (lambda x, m: jc.gptq(x, m, bits=9), "from 1 to 8"),
        (lambda x, m: jc.gptq(x, m, bits=4, damping=0), "damping"),
        (lambda x, m: jc.learned(x, m, bits=1), "2 or more"),
        (lambda x, m: jc.learned(x, m, bits=4, steps=0), "steps of 1 or more"),
        (lambda x, m: jc.mixed_channels(x, bits=3, channels=0), "at least one"),
        (lambda x, m: jc.mixed_channels(x, bits=3, channels=48), "fewer than all"),
        (
            lambda x, m: jc.mixed_channels(x, bits=3, channels=2, score="activation"),
            "needs moments",
        ),
        (
            lambda x, m: jc.compress({"kernel": jnp.ones((64, 64))}, "gptq(bits=4)"),
            "^kernel: gptq needs moments",
        ),
    ],
)
def test_errors_say_what_to_do(case, call, message):
    with pytest.raises(ValueError, match=message):
        call(*case)


def test_drift_correction_keeps_its_precision_under_vmap(case):
    x, moments = case
    aware = dataclasses.replace(moments, drifted=moments.second, cross=moments.second)
    both = jax.tree.map(lambda a: jnp.stack([a, a]), aware)
    recipe = jc.gptq(bits=4, block=BLOCK)
    together = jax.vmap(recipe)(jnp.stack([x, x]), both)  # a warning is an error here
    alone = recipe(x, aware).materialize()
    np.testing.assert_array_equal(together.materialize(), jnp.stack([alone, alone]))

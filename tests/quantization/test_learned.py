"""Learned grids: objectives, roundings and widths, each never worse than its start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

INPUTS, OUTPUTS, BLOCK = 48, 24, 16
ASYMMETRIC = {"bits": 3, "block": BLOCK, "grid": "asymmetric"}


def second_moment(seed=0):
    """A steep spectrum and uneven channels, float64."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((INPUTS, INPUTS)))
    scales = np.exp(rng.standard_normal(INPUTS) / 2)
    return (
        scales[:, None] * ((basis * np.exp(np.linspace(0, -4, INPUTS))) @ basis.T)
    ) * scales


@pytest.fixture(scope="module")
def case():
    x = np.random.default_rng(1).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    moments = jc.moments_from_covariance(jnp.asarray(second_moment(), jnp.float32))
    return jnp.asarray(x), moments


def output_error(x, leaf, second):
    change = np.asarray(leaf.materialize(), np.float64) - np.asarray(x, np.float64)
    return np.trace(change.T @ np.asarray(second, np.float64) @ change)


def weight_error(x, leaf):
    change = np.asarray(leaf.materialize(), np.float64) - np.asarray(x, np.float64)
    return (change**2).sum()


@pytest.mark.slow
def test_roundings_by_what_they_reach(case):
    """Coordinates beat relaxed rounding, which beats offsets; all beat the nearest."""
    x, moments = case
    error = lambda leaf: output_error(x, leaf, moments.second)  # noqa: E731
    nearest = error(jc.asymmetric(x, bits=3, block=BLOCK, search=True))
    found = {
        rounding: error(jc.learned(x, moments, rounding=rounding, **ASYMMETRIC))
        for rounding in ("coordinates", "relaxed", "offsets", "nearest")
    }
    assert found["coordinates"] < 0.8 * found["relaxed"]
    assert found["relaxed"] < 0.75 * nearest
    assert found["relaxed"] < 0.9 * found["offsets"]
    assert found["offsets"] < 0.98 * nearest and found["nearest"] < 0.98 * nearest


@pytest.mark.parametrize("grid", ["symmetric", "sign_split"])
def test_relaxed_rounding_stays_on_every_grid(case, grid):
    x, moments = case
    bits = (2, 1) if grid == "sign_split" else 2
    options = {"bits": bits, "block": BLOCK}
    nearest = getattr(jc, grid)(x, search=True, **options)
    leaf = jc.learned(x, moments, grid=grid, rounding="relaxed", steps=60, **options)
    assert output_error(x, leaf, moments.second) < 0.9 * output_error(
        x, nearest, moments.second
    )
    # Each weight stands on one of the two levels around it, or at an end.
    steps = np.repeat(np.asarray(leaf.scale, np.float64), BLOCK, axis=0)
    if grid == "sign_split":
        other = np.repeat(np.asarray(leaf.negative_scale, np.float64), BLOCK, axis=0)
        steps = np.where(np.asarray(x) > 0, steps, other)
    levels = np.asarray(leaf.materialize(), np.float64) / steps
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)


def test_a_function_of_the_weight_is_an_objective(case):
    """A saturating layer: what is beyond the knee may be rounded as it likes."""
    x, _ = case
    inputs = np.random.default_rng(2).multivariate_normal(
        np.zeros(INPUTS), second_moment(), 64
    )
    inputs = jnp.asarray(inputs, jnp.float32)
    target = jnp.tanh(inputs @ x)

    def loss(value):
        return jnp.mean(jnp.square(jnp.tanh(inputs @ value) - target))

    start = jc.asymmetric(x, bits=3, block=BLOCK, search=True)
    before = float(loss(start.materialize()))
    found = jc.learned(x, objective=loss, **ASYMMETRIC)
    assert float(loss(found.materialize())) < 0.5 * before
    default = jc.compress(
        {"kernel": x}, [("kernel", jc.learned(objective=loss, steps=30, **ASYMMETRIC))]
    )["kernel"]
    assert float(loss(default.materialize())) < 0.9 * before


def test_an_objective_that_only_misleads_leaves_the_start(case):
    x, _ = case
    start = jc.asymmetric(x, bits=3, block=BLOCK, search=True)
    best = start.materialize()
    loss = lambda value: jnp.sum(jnp.square(value - best))  # noqa: E731
    for rounding in ("relaxed", "offsets", "nearest"):
        found = jc.learned(x, objective=loss, rounding=rounding, steps=8, **ASYMMETRIC)
        np.testing.assert_array_equal(found.materialize(), best)


def test_drift_is_corrected(case):
    x, _ = case
    rng = np.random.default_rng(5)
    seen = rng.multivariate_normal(np.zeros(INPUTS), second_moment(), 4000)
    drift = seen + 0.3 * rng.standard_normal(seen.shape) * seen.std(0)
    second, drifted, cross = (
        jnp.asarray(a.T @ b / 4000, jnp.float32)
        for a, b in ((seen,) * 2, (drift,) * 2, (seen, drift))
    )
    plain = jc.moments_from_covariance(second)
    aware = dataclasses.replace(plain, drifted=drifted, cross=cross)

    def error(moments):
        leaf = jc.learned(x, moments, steps=20, **ASYMMETRIC)
        value = np.asarray(leaf.materialize(), np.float64)
        return np.mean((seen @ np.asarray(x, np.float64) - drift @ value) ** 2)

    assert error(aware) < 0.9 * error(plain)


def relative(x, leaf, second=None):
    error = weight_error(x, leaf) if second is None else output_error(x, leaf, second)
    wide = np.asarray(x, np.float64)
    size = (wide**2).sum() if second is None else np.trace(wide.T @ second @ wide)
    return error / size


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "sign_split"])
def test_the_width_found_is_nearly_the_best_of_all(case, grid):
    x, _ = case
    sides = lambda n: (n - 1, n - 1) if grid == "sign_split" else n  # noqa: E731

    def nearest(n):
        leaf = getattr(jc, grid)(x, bits=sides(n), block=BLOCK, search=True)
        return relative(x, leaf)

    errors = {n: nearest(n) for n in range(2, 7)}
    found = []
    for cost in (0.1, 0.002):
        leaf = jc.learned(x, bits="auto", cost=cost, block=BLOCK, grid=grid, steps=60)
        width = leaf.bits[0] + 1 if grid == "sign_split" else leaf.bits
        total = relative(x, leaf) + cost * width
        assert total <= errors[4] + cost * 4 + 1e-6  # the start
        # Learned steps gain little here, so that these are nearly the best there is.
        assert total <= 1.1 * min(error + cost * n for n, error in errors.items())
        found.append(width)
    assert found[0] < 4 < found[1] or found[0] < found[1] == 4


@pytest.mark.slow
def test_widths_differ_by_leaf_and_are_judged_by_outputs(case):
    x, moments = case
    easy = jnp.sign(x) * (1 + 0.01 * jnp.abs(x))  # two levels all but suffice
    params = {"easy": {"kernel": easy}, "hard": {"kernel": x}}
    recipe = [(".*kernel", "learned(bits='auto', cost=0.02, block=16)")]
    small = jc.compress(params, recipe)
    assert small["easy"]["kernel"].bits < small["hard"]["kernel"].bits
    leaf = jc.learned(x, moments, bits="auto", cost=0.02, block=BLOCK, steps=40)
    second = np.asarray(moments.second, np.float64)
    start = jc.symmetric(x, bits=4, block=BLOCK, search=True)
    assert relative(x, leaf, second) + 0.02 * leaf.bits <= (
        relative(x, start, second) + 0.02 * 4
    )
    zeros = jc.learned(jnp.zeros((INPUTS, 4)), bits="auto", block=BLOCK, steps=4)
    np.testing.assert_array_equal(zeros.materialize(), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "nope"}, "objective='weights', 'outputs' or a function"),
        ({"objective": "outputs"}, "needs moments"),
        ({"rounding": "coordinates"}, "rounding='nearest' where the objective is weig"),
        ({"rounding": "up"}, "not 'up'"),
        ({"objective": jnp.sum, "rounding": "coordinates"}, "'relaxed' or 'offsets'"),
        ({"bits": "some"}, "bits='auto' or numbers"),
        ({"bits": "auto", "cost": 0}, "cost of bits above 0"),
        ({"bits": 9}, "from 1 to 8, not 9"),
    ],
)
def test_errors_say_what_is_allowed(case, options, message):
    with pytest.raises(ValueError, match=message):
        jc.learned(case[0], **({"bits": 3} | options))


def test_a_width_is_not_chosen_under_a_trace(case):
    with pytest.raises(TypeError, match="learned is a host method"):
        jax.jit(jc.learned(bits="auto"))(case[0])
    assert jax.eval_shape(jc.learned(bits=3), case[0]).shape == (INPUTS, OUTPUTS)

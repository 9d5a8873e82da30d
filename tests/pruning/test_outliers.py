"""What matters most stays finer: channels inside a layer, single weights beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

INPUTS, OUTPUTS = 48, 40


@pytest.fixture(scope="module")
def case():
    """Weights, and inputs that are correlated and of very uneven size."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    mix = rng.standard_normal((INPUTS, INPUTS)) * np.exp(rng.standard_normal(INPUTS))
    second = (mix.T @ mix / INPUTS).astype(np.float32)
    return jnp.asarray(x), jc.moments_from_covariance(jnp.asarray(second))


def importance(x, coarse, second, score, axis):
    """Of each channel, from the definition: what its error does, float64."""
    change = np.asarray(coarse, np.float64) - np.asarray(x, np.float64)
    second = np.asarray(second, np.float64)
    found = []
    for i in range(change.shape[axis]):
        only = np.zeros_like(change)
        where = [slice(None)] * 2
        where[axis] = i
        only[tuple(where)] = change[tuple(where)]
        if score == "weight":
            found.append((only**2).sum())
        elif axis == 1 and score == "second_order":
            found.append(np.trace(only.T @ second @ only))
        elif score == "activation":
            found.append(np.trace(only.T @ np.diag(np.diag(second)) @ only))
        else:  # the others make up for it as well as they can
            rest = [j for j in range(len(second)) if j != i]
            pull = np.linalg.solve(second[np.ix_(rest, rest)], second[rest, i])
            left = second[i, i] - second[i, rest] @ pull
            found.append(left * (only[i] ** 2).sum())
    return np.asarray(found)


@pytest.mark.parametrize("axis", ["inputs", "outputs"])
@pytest.mark.parametrize("score", ["weight", "activation", "second_order"])
def test_the_channels_of_largest_score_stay_exact(case, score, axis):
    x, moments = case
    mixed = jc.mixed_channels(
        x, moments, bits=3, channels=5, score=score, axis=axis, block=16
    )
    coarse = jc.symmetric(x, bits=3, block=16, search=True).materialize()
    where = ["inputs", "outputs"].index(axis)
    second = np.asarray(moments.second, np.float64)
    if score == "second_order" and where == 0:  # as damped as the method's
        second = second + 0.01 * np.mean(np.diag(second)) * np.eye(INPUTS)
    worth = importance(x, coarse, second, score, where)
    first = set(np.argsort(-worth)[:5].tolist())
    assert set(np.asarray(mixed.order)[:5].tolist()) == first
    assert isinstance(mixed.kept, jax.Array) and mixed.kept.dtype == x.dtype
    kept = sorted(first)
    np.testing.assert_array_equal(
        jnp.take(mixed.materialize(), jnp.asarray(kept), axis=where),
        np.take(np.asarray(x), kept, axis=where),
    )


def test_kept_channels_may_have_bits_of_their_own(case):
    x, moments = case
    mixed = jc.mixed_channels(x, moments, bits=2, fraction=0.125, fine_bits=6, block=16)
    assert (mixed.kept.bits, mixed.rest.bits) == (6, 2)
    assert mixed.kept.shape == (6, OUTPUTS) and mixed.rest.shape == (42, OUTPUTS)
    assert mixed.order.dtype == jnp.uint16
    exact = jc.mixed_channels(x.astype(jnp.bfloat16), bits=2, channels=6)
    assert exact.kept.dtype == jnp.bfloat16


@pytest.mark.parametrize("scope", ["leaf", "row"])
@pytest.mark.parametrize("score", ["weight", "activation"])
def test_outliers_split_a_weight_exactly(case, score, scope):
    x, moments = case
    split = jc.outliers(x, moments, fraction=0.05, score=score, scope=scope)
    rest, sparse = split.terms
    np.testing.assert_array_equal(split.materialize(), x)
    worth = np.abs(np.asarray(x, np.float64))
    if score == "activation":
        worth *= np.sqrt(np.diag(np.asarray(moments.second, np.float64)))[:, None]
    mask = np.asarray(sparse.kept)
    if scope == "row":
        assert set(mask.sum(0).tolist()) == {round(0.05 * INPUTS)}
        pairs = [(worth[:, j], mask[:, j]) for j in range(OUTPUTS)]
    else:
        assert mask.sum() == round(0.05 * x.size)
        pairs = [(worth.ravel(), mask.ravel())]
    assert all(w[m].min() > w[~m].max() for w, m in pairs)
    np.testing.assert_array_equal(np.asarray(rest)[mask], 0)
    np.testing.assert_array_equal(np.asarray(sparse.materialize())[~mask], 0)


@pytest.mark.slow
def test_the_rest_is_rounded_with_finer_steps_at_few_more_bytes():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((256, 128)).astype(np.float32)
    x[rng.random(x.shape) < 0.004] *= 15
    params = {"kernel": jnp.asarray(x)}
    coding = ("entropy_code()", "code_floats()")
    rounding = "symmetric(bits=3, block=64)"
    apart = jc.chain(
        "outliers(fraction=0.004)", [("kernel/terms/0", rounding)], *coding
    )
    split = jc.compress(params, apart)
    finer = {
        bits: jc.compress(
            params, jc.chain(f"symmetric(bits={bits}, block=64)", *coding)
        )
        for bits in (3, 4, 5)
    }
    error = lambda tree: np.sum((np.asarray(tree["kernel"].materialize()) - x) ** 2)  # noqa: E731
    assert error(split) < 0.25 * error(finer[3])
    assert error(split) < error(finer[4])
    assert jc.nbytes(split) < jc.nbytes(finer[5])
    text = (jc.Quantized, jc.Sparse)
    assert tuple(map(type, split["kernel"].terms)) == text


def test_the_rest_is_fitted_to_the_layers_inputs(case):
    x, moments = case
    big = jnp.tile(x, (1, 3)).at[3, 7].set(20.0)
    recipe = lambda rounding: jc.chain(  # noqa: E731
        [("kernel", "outliers(fraction=0.002, score='weight')")],
        [("kernel/terms/0", rounding)],
    )
    errors = {}
    for rounding in (
        "symmetric(bits=3, block=16, search=True)",
        "gptq(bits=3, block=16)",
    ):
        small = jc.compress({"kernel": big}, recipe(rounding), {"kernel": moments})
        change = np.asarray(small["kernel"].materialize() - big, np.float64)
        errors[rounding[:4]] = np.trace(
            change.T @ np.asarray(moments.second, np.float64) @ change
        )
        if rounding[:4] == "symm":
            assert change[3, 7] == 0  # feedback may move what stands beside it
    assert errors["gptq"] < 0.7 * errors["symm"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: jc.outliers(x, fraction=0), "above 0 and below 1, not 0"),
        (lambda x: jc.outliers(x, fraction=True), "not True"),
        (lambda x: jc.outliers(x, fraction=1e-6), "would keep 0 of 1920"),
        (lambda x: jc.outliers(x, fraction=0.1, score="up"), "score="),
        (lambda x: jc.outliers(x, fraction=0.1, score="activation"), "needs moments"),
        (lambda x: jc.outliers(x, fraction=0.1, scope="global"), "scope="),
        (lambda x: jc.mixed_channels(x, bits=3, channels=3, score="up"), "score="),
        (
            lambda x: jc.mixed_channels(x, bits=3, channels=3, fine_bits=9),
            "from 1 to 8",
        ),
        (lambda x: jc.mixed_channels(x, bits=3, channels=3, axis="rows"), "axis="),
    ],
)
def test_errors_say_what_is_allowed(case, call, message):
    with pytest.raises(ValueError, match=message):
        call(case[0])


def test_a_stack_is_split_slice_by_slice(case):
    x, _ = case
    stack = jnp.stack([x, x**3])
    split = jax.jit(jc.outliers(fraction=0.03))(stack)
    np.testing.assert_array_equal(split.materialize(), stack)
    counts = np.asarray(split.terms[1].kept).sum((1, 2))
    assert set(counts.tolist()) == {round(0.03 * x.size)}

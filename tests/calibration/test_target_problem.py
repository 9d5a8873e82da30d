"""One problem for every method that goes by data: drift, NaN, slices never seen."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.calibration.moments import Moments
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.methods import parse

INPUTS, OUTPUTS = 64, 96
DATA_DRIVEN = [
    "gptq(bits=3, block=32)",
    "awq(bits=3, block=32)",
    "learned(bits=3, block=32, steps=5)",
    "mixed_channels(bits=3, channels=8, block=32)",
    "mixed_channels(bits=3, channels=8, score='second_order', axis='outputs')",
    "rate_distortion(rate=3, states=0)",
    "wanda(sparsity=0.5)",
    "sparsegpt(sparsity=0.5)",
    "alps(sparsity=0.5)",
    "outliers(fraction=0.05, score='activation')",
    "svd(rank=8)",
    "cp(rank=4, sizes=(64, 8, 12), sweeps=2)",
    "tucker(ranks=(16, 8, 10), sizes=(64, 8, 12), sweeps=2)",
    "corrected(base='gptq(bits=3, block=32)', rank=4)",
    "corrected(base='symmetric(bits=3, block=32)', rank=4)",
]
every = pytest.mark.parametrize("recipe", DATA_DRIVEN)
X = jnp.asarray(np.random.default_rng(0).normal(size=(INPUTS, OUTPUTS)), jnp.float32)


def covariance(seed):
    rows = np.random.default_rng(seed).normal(size=(300, INPUTS))
    rows = rows * np.logspace(0, 1, INPUTS)[np.random.default_rng(seed).permutation(64)]
    return jnp.asarray(rows.T @ rows / 300, jnp.float32)


FIRST, SECOND = covariance(1), covariance(2)


@functools.cache
def value(recipe, which, **_):
    moments = {
        "first": Moments(jnp.float32(300), second=FIRST),
        "second": Moments(jnp.float32(300), second=SECOND),
        # The cross moment of inputs that are the drifted ones: nothing to make up for.
        "drift": Moments(jnp.float32(300), second=FIRST, drifted=SECOND, cross=SECOND),
    }[which]
    tree = jc.compress({"kernel": X}, [("kernel", recipe)], {"kernel": moments})
    return what(recipe, tree["kernel"])


def what(recipe, leaf):
    """The weights; of outliers those that are left: together with them they are x."""
    return np.asarray(dense(leaf.terms[0] if "outliers" in recipe else leaf))


@every
def test_the_inputs_that_the_compressed_model_will_see_count(recipe):
    drifted, seen = value(recipe, "drift"), value(recipe, "second")
    other = np.linalg.norm(value(recipe, "first") - seen)
    assert other > 0.01 * np.linalg.norm(seen)
    # Rounding of the corrected target may move a weight on an edge.
    assert np.linalg.norm(drifted - seen) < 0.1 * other


def test_the_problem_by_definition():
    """The target is the least-squares fit on the drifted inputs, float64 by NumPy."""
    rng = np.random.default_rng(3)
    old = rng.normal(size=(2000, 8))
    new = old + 0.3 * rng.normal(size=old.shape)
    x = rng.normal(size=(8, 5))
    moments = Moments(
        jnp.float32(2000),
        second=jnp.asarray(old.T @ old / 2000, jnp.float32),
        drifted=jnp.asarray(new.T @ new / 2000, jnp.float32),
        cross=jnp.asarray(old.T @ new / 2000, jnp.float32),
    )
    weights = jnp.asarray(x, jnp.float32)
    target, second = moments.target_problem(weights, "m", damping=1e-9)
    oracle, *_ = np.linalg.lstsq(new, old @ x, rcond=None)
    np.testing.assert_allclose(target, oracle, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(second, moments.drifted)
    same, second = moments.target_problem(weights, "m")
    assert same is weights
    np.testing.assert_array_equal(second, moments.drifted)
    plain = dataclasses.replace(moments, drifted=None, cross=None)
    same, second = plain.target_problem(weights, "m", damping=0.1)
    assert same is weights
    np.testing.assert_array_equal(second, moments.second)
    with pytest.raises(ValueError, match="m needs the moments' 'cross'"):
        dataclasses.replace(moments, cross=None).target_problem(
            weights, "m", damping=0.1
        )


# Every registered method on weights that is not in the list goes by no data.


def test_the_list_is_complete():
    data = {parse(recipe).func.__name__ for recipe in DATA_DRIVEN}
    others = "symmetric asymmetric sign_split nf4 fp8 mxfp4 nvfp4 hqq magnitude"
    public = {name: getattr(jc, name) for name in dir(jc)}
    methods = {n: f.traits for n, f in public.items() if hasattr(f, "traits")}
    weights = {name: t.data for name, t in methods.items() if t.selects == "weights"}
    assert {name for name, uses in weights.items() if uses} == data
    assert {name for name, uses in weights.items() if not uses} == set(others.split())


@every
def test_moments_that_are_not_finite_are_refused(recipe):
    for bad in (jnp.nan, jnp.inf):
        moments = Moments(jnp.float32(300), second=FIRST.at[3, 5].set(bad))
        with pytest.raises(
            ValueError, match=r"a/kernel: 1 of 4096 .*'second'.*collect"
        ):
            jc.compress(
                {"a": {"kernel": X}}, [("a/kernel", recipe)], {"a/kernel": moments}
            )


def test_moments_that_are_not_finite_are_refused_outside_of_a_tree():
    moments = Moments(jnp.float32(300), second=FIRST.at[3, 5].set(jnp.nan))
    for call in (
        lambda: jc.gptq(X, moments, bits=4),
        lambda: jc.planning.plan_ranks(
            {"kernel": X}, fraction=0.5, moments={"kernel": moments}
        ),
    ):
        with pytest.raises(ValueError, match="'second' are NaN or infinite"):
            call()


STACK = jnp.stack([X, 2 * X[::-1], X + 1])
UNSEEN = Moments(
    jnp.asarray([300.0, 0.0, 300.0]),
    second=jnp.stack([FIRST, jnp.zeros_like(FIRST), SECOND]),
)
EXPERTS = jc.Layout((0,), (1,), (2,))


def experts(recipe, moments=UNSEEN):
    small = jc.compress(
        {"moe": {"kernel": STACK}},
        [("moe/kernel", recipe)],
        moments and {"moe/kernel": moments},
        layouts={"moe/kernel": EXPERTS},
    )
    leaf = small["moe"]["kernel"]
    return what(recipe, getattr(leaf, "inner", leaf))


@every
def test_an_expert_that_saw_no_token_is_compressed_without_data(recipe):
    with pytest.warns(UserWarning, match=r"moe/kernel: no .* 1 of 3 slices \(1\)"):
        value = experts(recipe)
    # With inputs that all count alike, which is what a method does without data; the
    # other experts do not notice.
    every = jnp.stack([FIRST, jnp.eye(INPUTS), SECOND])
    alike = experts(recipe, Moments(jnp.full(3, 300.0), second=every))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    close(value[[0, 2]], alike[[0, 2]])
    assert np.linalg.norm(value[1] - alike[1]) < 0.01 * np.linalg.norm(alike[1])


@pytest.mark.parametrize(
    ("recipe", "plain"),
    [
        ("wanda(sparsity=0.5)", "magnitude(sparsity=0.5, scope='row')"),
        ("sparsegpt(nm='2:4')", "magnitude(nm='2:4')"),
        ("gptq(bits=3, search=False)", "symmetric(bits=3)"),
        ("svd(rank=8)", "svd(rank=8, weighted=False)"),
    ],
)
def test_without_data_is_what_the_plain_method_does(recipe, plain):
    with pytest.warns(UserWarning, match="no calibration token"):
        value = experts(recipe)
    alone = experts(plain, None)[1]
    np.testing.assert_allclose(value[1], alone, rtol=1e-4, atol=1e-4)


def test_an_expert_without_tokens_under_drift_keeps_its_target():
    seen = dataclasses.replace(
        UNSEEN, drifted=jnp.stack([FIRST, FIRST, SECOND]), cross=UNSEEN.second
    )
    target, second = seen.checked("moe").target_problem(STACK, "m", damping=0.01)
    np.testing.assert_allclose(target[1], STACK[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(second[1], FIRST)


def test_a_data_free_method_does_not_warn_of_tokens():
    experts("symmetric(bits=3)")


@pytest.mark.parametrize(
    "method",
    [
        "gptq(bits=3, block=32, {})",
        "rate_distortion(rate=3, states=0, {})",
        "sparsegpt(sparsity=0.5, {})",
        "alps(sparsity=0.5, {})",
    ],
)
def test_shrinkage_is_that_of_the_second_moments(method):
    """As if the moments had smaller entries off their diagonal; a tenth by default."""
    second = covariance(3)
    weak = second - 0.1 * (second - jnp.diag(jnp.diagonal(second)))
    plain, shrunk = (jc.moments_from_covariance(s) for s in (second, weak))
    found = parse(method.format("shrinkage=0.1"))(X, plain)
    default = parse(method.replace(", {}", ""))(X, plain)
    wanted = parse(method.format("shrinkage=0"))(X, shrunk)
    unlike = parse(method.format("shrinkage=0"))(X, plain)
    same = lambda a, b: np.mean(np.isclose(dense(a), dense(b), atol=1e-3))  # noqa: E731
    assert same(found, default) == 1
    assert same(found, wanted) > 0.98 and same(found, unlike) < 0.98

"""One rate shared out over leaves: measured curvatures, and plans."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.evaluation import divergence
from jaxcompress.rates import _entropy

VOCABULARY, FEATURES = 96, 64


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, FEATURES, name="embed")
        x = embed(tokens)
        x = x + 0.2 * nn.Dense(FEATURES, name="soft")(nn.gelu(x))
        x = x + 2 * nn.Dense(FEATURES, name="hard")(jnp.cumsum(nn.tanh(x), axis=1) / 8)
        return embed.attend(nn.LayerNorm(name="norm")(x)) / 2


def apply(params, tokens):
    return Model().apply({"params": params}, tokens)


@pytest.fixture(scope="module")
def case():
    tokens = jax.random.randint(jax.random.key(1), (12, 32), 0, VOCABULARY)
    params = jax.jit(Model().init)(jax.random.key(0), tokens)["params"]
    moments = jc.collect_moments(Model(), params, [tokens])
    found = jc.measure_curvatures(
        apply, params, [{"tokens": tokens}], moments, key=jax.random.key(2)
    )
    return params, tokens, moments, found


@pytest.mark.parametrize("name", ["soft/kernel", "hard/kernel", "embed/embedding"])
def test_curvature_foretells_the_divergence(case, name):
    """Of an error that is white in the metric of the inputs, averaged over draws."""
    params, tokens, moments, found = case
    top, last = name.split("/")
    kernel = params[top][last]
    second = np.asarray(moments[name].second, np.float64)
    second = second + 0.01 * np.mean(np.diag(second)) * np.eye(FEATURES)
    root = np.linalg.inv(np.linalg.cholesky(second)).T  # root^T S root = 1
    variance = 1e-4

    @jax.jit
    def moved(noise):
        change = jnp.matmul(jnp.asarray(root, jnp.float32), noise)
        change = change.T if last == "embedding" else change
        new = {**params, top: {**params[top], last: kernel + change}}
        return divergence(apply(params, tokens), apply(new, tokens)).mean()

    shape = (FEATURES, kernel.size // FEATURES)
    draws = [
        moved(variance**0.5 * jax.random.normal(jax.random.key(i), shape))
        for i in range(12)
    ]
    foretold = found[name] * variance * kernel.size
    assert float(np.mean(draws)) == pytest.approx(foretold, rel=0.25)


def test_what_matters_more_is_coded_finer(case):
    params, _, moments, found = case
    assert found["hard/kernel"] > 10 * found["soft/kernel"]
    rules = dict(jc.plan_rates(params, moments, rate=3.0, curvatures=found, states=8))
    rates = {
        name: float(re.search(r"rate=([\d.]+)", rules[re.escape(name)])[1])
        for name in found
    }
    assert rates["hard/kernel"] > rates["soft/kernel"] + 1
    sizes = {"embed/embedding": VOCABULARY * FEATURES}
    sizes |= dict.fromkeys(("soft/kernel", "hard/kernel"), FEATURES**2)
    mean = sum(rates[n] * sizes[n] for n in sizes) / sum(sizes.values())
    assert mean == pytest.approx(3.0, abs=0.001)
    small = jc.compress(params, list(rules.items()), moments)
    assert isinstance(small["hard"]["kernel"], jc.RateCoded)
    assert small["hard"]["kernel"].levels.trellis == 8


def test_an_equal_slope_costs_less_than_an_equal_rate(case):
    params, tokens, moments, found = case
    planned = jc.plan_rates(params, moments, rate=2.5, curvatures=found)
    kl = {}
    for name, recipe in (("planned", planned), ("even", "rate_distortion(rate=2.5)")):
        small = jc.compress(params, recipe, moments)
        kl[name] = divergence(apply(params, tokens), apply(small, tokens)).mean()
    assert kl["planned"] < 0.8 * kl["even"]


def test_the_entropy_of_rounded_gaussians():
    for scale in (0.2, 0.5, 1.0, 3.0):
        draws = np.round(scale * np.random.default_rng(0).standard_normal(400_000))
        _, counts = np.unique(draws, return_counts=True)
        shares = counts / counts.sum()
        measured = -(shares * np.log2(shares)).sum()
        assert float(_entropy(np.log2(scale))) == pytest.approx(measured, abs=0.01)
    assert float(_entropy(np.float64(-9))) == 0
    high = float(_entropy(np.float64(7)))
    assert high == pytest.approx(7 + 0.5 * np.log2(2 * np.pi * np.e), abs=0.001)


def test_bad_input_is_told(case):
    params, tokens, moments, found = case
    with pytest.raises(ValueError, match=r"soft/kernel: a curvature of 0\.0"):
        jc.plan_rates(
            params, moments, rate=3.0, curvatures=found | {"soft/kernel": 0.0}
        )
    with pytest.raises(ValueError, match=r"hard/kernel: a curvature of 0\.0"):
        less = {name: x for name, x in found.items() if name != "hard/kernel"}
        jc.plan_rates(params, moments, rate=3.0, curvatures=less)
    with pytest.raises(ValueError, match="rows and columns takes the first"):
        jc.plan_rates(params, moments, rate=0.1)
    with pytest.raises(ValueError, match="there are no batches"):
        jc.measure_curvatures(apply, params, [], moments, key=jax.random.key(0))
    broken = jax.tree.map(lambda x: x, params)
    broken["hard"]["kernel"] = broken["hard"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="its gradient is nan"):
        jc.measure_curvatures(
            apply, broken, [{"tokens": tokens}], moments, key=jax.random.key(0)
        )
    with pytest.raises(TypeError, match="plan_rates reads values"):
        jax.jit(lambda p: jc.plan_rates(p, moments, rate=3.0))(params)

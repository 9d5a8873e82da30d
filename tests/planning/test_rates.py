"""One rate shared out over leaves: measured curvatures, and plans."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.evaluation import divergence
from jaxcompress.quantization.rate_model import gaussian_bits

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
    foretold = float(found[name].curvatures.mean()) * variance * kernel.size
    assert float(np.mean(draws)) == pytest.approx(foretold, rel=0.25)


@pytest.mark.slow
def test_what_matters_more_is_coded_finer(case):
    params, _, _, found = case
    rows = np.asarray(found["embed/embedding"].curvatures)
    assert (rows == rows[0]).all(), "an embedding has one curvature"
    hard, soft = (found[f"{name}/kernel"].curvatures for name in ("hard", "soft"))
    assert hard.mean() > 10 * soft.mean()
    rules = dict(jc.planning.plan_rates(params, found, bits_per_weight=3.0, states=8))
    rates = {
        name: float(re.search(r"rate=([\d.]+)", rules[re.escape(name)])[1])
        for name in ("soft/kernel", "hard/kernel", "embed/embedding")
    }
    assert rates["hard/kernel"] > rates["soft/kernel"] + 1
    sizes = {"embed/embedding": VOCABULARY * FEATURES}
    sizes |= dict.fromkeys(("soft/kernel", "hard/kernel"), FEATURES**2)
    mean = sum(rates[n] * sizes[n] for n in sizes) / sum(sizes.values())
    assert mean == pytest.approx(3.0, abs=0.001)
    small = jc.compress(params, list(rules.items()), found)
    assert isinstance(small["hard"]["kernel"], jc.RateCoded)
    assert small["hard"]["kernel"].levels.trellis == 8


def test_uneven_outputs_are_planned_as_what_is_left_of_them():
    """Equal curvatures: equal steps, though the outputs of one leaf differ in size."""
    rng = np.random.default_rng(0)
    shape = 96, 512
    kernels = {
        "even": rng.standard_normal(shape),
        "uneven": rng.standard_normal(shape) * np.exp2(rng.uniform(-6, 1, shape[1])),
    }
    params = {k: {"kernel": jnp.asarray(x, jnp.float32)} for k, x in kernels.items()}
    one = jc.moments_from_covariance(jnp.eye(shape[0]))
    moments = {
        f"{name}/kernel": dataclasses.replace(one, curvatures=jnp.ones(shape[1]))
        for name in kernels
    }
    plan = jc.planning.plan_rates(params, moments, bits_per_weight=3.0, states=0)
    small = jc.compress(params, plan, moments)
    steps = {
        k: float(jnp.mean(x["kernel"].steps.astype(jnp.float32)))
        for k, x in small.items()
    }
    assert steps["uneven"] == pytest.approx(steps["even"], rel=0.05)


@pytest.mark.slow
def test_plans_of_a_file_are_those_of_its_tree(case, tmp_path):
    """Rates, bits and ranks; the leaves are read one at a time."""
    params, _, _, found = case
    path, where = tmp_path / "model.safetensors", ".*kernel"
    jc.save(path, {"params": params})
    plans = {
        jc.planning.plan_rates: {"bits_per_weight": 3.0},
        jc.planning.plan_bits: {"bits_per_weight": 5.0},
        jc.planning.plan_ranks: {"fraction": 0.7},
    }
    for plan, budget in plans.items():
        wanted = plan(params, found, where=where, **budget)
        assert plan(path, found, where=where, **budget) == wanted
        with jc.open_checkpoint(path) as stored:
            assert plan(stored, found, where=where, **budget) == wanted


def test_slices_of_a_stack_are_planned_one_by_one(case):
    """As the same layers by themselves."""
    params, _, _, found = case
    names = "soft/kernel", "hard/kernel"
    apart = {"a": {"kernel": params["soft"]["kernel"]}} | {
        "b": {"kernel": params["hard"]["kernel"]}
    }
    known = {"a/kernel": found[names[0]], "b/kernel": found[names[1]]}
    plan = jc.planning.plan_rates(apart, known, bits_per_weight=3.0)
    stacked = {"c": {"kernel": jnp.stack([x["kernel"] for x in apart.values()])}}
    both = jax.tree.map(lambda *x: jnp.stack(x), *known.values())
    ((name, method),) = jc.planning.plan_rates(
        stacked,
        {"c/kernel": both},
        bits_per_weight=3.0,
        layouts={"c/kernel": jc.Layout((0,), (1,), (2,))},
    )
    rates = [float(re.search(r"rate=([\d.]+)", rule[1])[1]) for rule in plan]
    assert name == "c/kernel"
    assert f"rate=({rates[0]}, {rates[1]})" in method


def test_curvatures_of_a_scanned_model_are_by_slice():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(16, name="dense")(nn.tanh(x)), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(32, 16, name="embed")
            axes, split = {"params": 0}, {"params": True}
            scan = nn.scan(Block, variable_axes=axes, split_rngs=split, length=2)
            x, _ = scan(name="layers")(embed(tokens), None)
            return embed.attend(x)

    def looped(params, tokens):
        x = params["embed"]["embedding"][tokens]
        for i in range(2):
            dense = params[f"layer_{i}"]["dense"]
            x = x + nn.tanh(x) @ dense["kernel"] + dense["bias"][None, None]
        return x @ params["embed"]["embedding"].T

    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 32)
    params = jax.jit(Scanned().init)(jax.random.key(0), tokens)["params"]
    apart = {"embed": params["embed"]} | {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(2)
    }
    second = jnp.stack([jnp.eye(16), 4 * jnp.eye(16)])
    one = jc.moments_from_covariance
    batches, key = [{"tokens": tokens}], jax.random.key(3)
    found = jc.measure_curvatures(
        lambda p, t: Scanned().apply({"params": p}, t),
        params,
        batches,
        {"layers/dense/kernel": one(second)},
        layouts=jc.find_layouts(Scanned(), params, tokens),
        where=".*kernel",
        key=key,
    )
    alone = jc.measure_curvatures(
        looped,
        apart,
        batches,
        {f"layer_{i}/dense/kernel": one(second[i]) for i in range(2)},
        where=".*kernel",
        key=key,
    )
    for i in range(2):
        np.testing.assert_allclose(
            found["layers/dense/kernel"].curvatures[i],
            alone[f"layer_{i}/dense/kernel"].curvatures,
            rtol=1e-3,
        )


def test_the_curvature_of_an_output_is_that_of_its_errors(case):
    params, tokens, _, found = case
    curvatures = np.asarray(found["hard/kernel"].curvatures, np.float64)
    second = np.asarray(found["hard/kernel"].second, np.float64)
    second = second + 0.01 * np.mean(np.diag(second)) * np.eye(FEATURES)
    root = np.linalg.inv(np.linalg.cholesky(second)).T
    order = np.argsort(curvatures)
    kl = []
    for part in (order[:16], order[-16:]):
        noise = np.zeros((FEATURES, FEATURES))
        for seed in range(8):
            draws = np.random.default_rng(seed).standard_normal((FEATURES, 16))
            noise[:, part] = 0.01 * root @ draws
            kernel = params["hard"]["kernel"] + jnp.asarray(noise, jnp.float32)
            new = {**params, "hard": {**params["hard"], "kernel": kernel}}
            kl.append(divergence(apply(params, tokens), apply(new, tokens)).mean())
    measured = np.mean(kl[8:]) / np.mean(kl[:8])
    foretold = curvatures[order[-16:]].sum() / curvatures[order[:16]].sum()
    assert foretold > 1.5
    assert measured == pytest.approx(foretold, rel=0.3)


@pytest.mark.slow
def test_an_equal_slope_costs_less_than_an_equal_rate(case):
    params, tokens, moments, found = case
    planned = jc.planning.plan_rates(params, found, bits_per_weight=2.5)
    kl = {}
    for name, recipe, known in (
        ("planned", planned, found),
        ("even", "rate_distortion(rate=2.5)", moments),
    ):
        small = jc.compress(params, recipe, known)
        kl[name] = divergence(apply(params, tokens), apply(small, tokens)).mean()
    assert kl["planned"] < 0.8 * kl["even"]


def test_the_entropy_of_rounded_gaussians():
    for scale in (0.2, 0.5, 1.0, 3.0):
        draws = np.round(scale * np.random.default_rng(0).standard_normal(400_000))
        _, counts = np.unique(draws, return_counts=True)
        shares = counts / counts.sum()
        measured = -(shares * np.log2(shares)).sum()
        assert float(gaussian_bits(np.log2(scale))) == pytest.approx(measured, abs=0.01)
    assert float(gaussian_bits(np.float64(-9))) == 0
    high = float(gaussian_bits(np.float64(7)))
    assert high == pytest.approx(7 + 0.5 * np.log2(2 * np.pi * np.e), abs=0.001)


@pytest.mark.slow
def test_batches_are_tokens_or_hold_them(case):
    params, tokens, moments, _ = case
    options = {"where": "soft/kernel", "key": jax.random.key(2)}
    measure = functools.partial(jc.measure_curvatures, apply, params, **options)
    alone = measure([tokens], moments)["soft/kernel"].curvatures
    held = measure([{"tokens": tokens}], moments)["soft/kernel"].curvatures
    np.testing.assert_array_equal(alone, held)
    with pytest.raises(ValueError, match="a dict of \\['ids'\\] has none"):
        measure([{"ids": tokens}], moments)
    with pytest.raises(TypeError, match="one dict"):
        measure({"tokens": tokens}, moments)


def test_bad_input_is_told(case):
    params, tokens, moments, found = case
    zero = dataclasses.replace(found["soft/kernel"], curvatures=jnp.zeros(FEATURES))
    with pytest.raises(ValueError, match="soft/kernel: curvatures that are all zero"):
        jc.planning.plan_rates(
            params, found | {"soft/kernel": zero}, bits_per_weight=3.0
        )
    with pytest.raises(ValueError, match=r"hard/kernel: .*measure them with the same"):
        less = found | {"hard/kernel": moments["hard/kernel"]}
        jc.planning.plan_rates(params, less, bits_per_weight=3.0)
    with pytest.raises(ValueError, match="rows and columns takes the first"):
        jc.planning.plan_rates(params, moments, bits_per_weight=0.1)
    with pytest.raises(ValueError, match="there are no batches"):
        jc.measure_curvatures(apply, params, [], moments, key=jax.random.key(0))
    broken = jax.tree.map(lambda x: x, params)
    broken["hard"]["kernel"] = broken["hard"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="its gradient is not finite"):
        jc.measure_curvatures(
            apply, broken, [{"tokens": tokens}], moments, key=jax.random.key(0)
        )
    with pytest.raises(TypeError, match="plan_rates reads values"):
        jax.jit(lambda p: jc.planning.plan_rates(p, moments, bits_per_weight=3.0))(
            params
        )

"""Training through rounding: gradients by definition, equal values, better models."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import jaxcompress as jc
from jaxcompress.calibration.error_feedback import float64
from jaxcompress.quantization.grids import Steps
from jaxcompress.training.qat_leaf import quantize_through

GRIDS = [
    ("symmetric", 3, 5),
    ("symmetric", 2, "tensor"),
    ("symmetric", 1, 4),
    ("asymmetric", 3, 5),
    ("sign_split", (2, 1), 7),
    ("symmetric", 3, None),
]


def weights(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_t(4, shape) * 0.1 + rng.uniform(-0.05, 0.05, shape[-1:])


def lsq_by_definition(x, pull, grid, bits, block, scale, zero, negative):
    """d <pull, value> / d (x, scale, zero, negative scale), one weight at a time."""
    gx = np.zeros_like(x)
    gs, gz, gn = (np.zeros_like(scale) for _ in range(3))
    for where, at in oracles.groups(x.shape, block):
        z = None if zero is None else zero[at]
        n = None if negative is None else negative[at]
        table = np.sort(oracles.grid_values(grid, bits, scale[at], z, n))
        if grid == "sign_split":
            positive = 2 ** bits[0] - 1
        else:
            positive = max(1, 2 ** (bits - (grid == "symmetric")) - 1)
        values, pulls = np.ravel(x[where]), np.ravel(pull[where])
        g = 1 / np.sqrt(values.size * positive)
        slopes = np.zeros(values.size)
        for i, (v, p) in enumerate(zip(values, pulls, strict=True)):
            nearest = table[np.abs(table - v).argmin()]
            inside = table[0] < v < table[-1]
            slopes[i] = p * inside
            if grid == "sign_split" and v <= 0:
                side = 1 / np.sqrt(values.size * (2 ** bits[1] - 1))
                gn[at] += side * p * (nearest / n - inside * v / n)
            else:
                gs[at] += g * p * (nearest / scale[at] - inside * v / scale[at])
            gz[at] -= p * (not inside) * scale[at]
        gx[where] = slopes.reshape(gx[where].shape)
    return gx, gs, gz, gn


@pytest.mark.parametrize(("grid", "bits", "block"), GRIDS)
def test_gradients_are_those_of_learned_step_sizes(grid, bits, block):
    x, pull = weights(14, 3), np.random.default_rng(1).standard_normal((14, 3))
    shape = oracles.steps_shape(x.shape, block)
    rng = np.random.default_rng(2)
    scale, negative = rng.uniform(0.03, 0.09, (2, *shape))
    zero = rng.integers(2, 6, shape).astype(np.float64)
    zero = zero if grid == "asymmetric" else None
    negative = negative if grid == "sign_split" else None
    with float64(True):

        def total(x, scale, zero, negative):
            steps = Steps(scale, zero, negative)
            value = quantize_through(x, steps, grid=grid, bits=bits, block=block)
            assert value.dtype == jnp.float64
            return jnp.sum(pull * value)

        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))
        found = gradient(x, scale, zero, negative)
    want = lsq_by_definition(x, pull, grid, bits, block, scale, zero, negative)
    assert 0 < np.mean(np.asarray(found[0]) == 0) < 1  # some clipped, not all
    for mine, theirs in zip(found, want, strict=True):
        if mine is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


KERNEL = jnp.asarray(weights(64, 96), jnp.float32)
STACK = jnp.asarray(weights(2, 96, 64), jnp.float32)
PARAMS = {"a": {"kernel": KERNEL, "bias": jnp.ones(96)}, "b": {"kernel": STACK}}
LAYOUT = {"b/kernel": jc.Layout((0,), (2,), (1,))}  # stored as [layers, out, in]
MOMENTS = {
    "a/kernel": jc.moments_from_covariance(jnp.diag(jnp.linspace(0.1, 5, 64))),
    "b/kernel": jc.moments_from_covariance(jnp.stack([jnp.eye(64), 2 * jnp.eye(64)])),
}
OUTLIERS = jnp.where(jnp.abs(KERNEL) > 0.3, KERNEL, 0)


def noisy(x, moments=None):
    """Codes other than the nearest, as a method with data chooses them."""
    return jc.symmetric(bits=4, block=16)(x + 0.1 * jnp.roll(x, 1, axis=-2))


RECIPES = {
    "symmetric": "symmetric(bits=3, block=16, full_range=True)",
    "asymmetric": "asymmetric(bits=3, block=24)",
    "sign_split": "sign_split(bits=(2, 3))",
    "one bit": "symmetric(bits=1, block='tensor')",
    "learned": "learned(bits=2, block=32, steps=5)",
    "other codes": noisy,
    "mixed": "mixed_channels(bits=2, channels=4, fine_bits=4)",
    "mixed outputs": "mixed_channels(bits=2, channels=4, axis='outputs')",
    "factors": jc.chain("svd(rank=32)", "symmetric(bits=4)"),
    "affine": "hqq(bits=2, block=32)",
    "scaled": jc.chain([("a/kernel", "awq(bits=3, block=16)")]),
    "nested scales": "nvfp4()",
    "floating point": "fp8()",
    "coded": jc.chain("symmetric(bits=3)", "entropy_code()", "code_floats()"),
}


@functools.cache
def both(name):
    compress = functools.partial(
        jc.compress, recipe=RECIPES[name], moments=MOMENTS, layouts=LAYOUT
    )

    def make(params):
        small = compress(params)
        return small, jc.qat.prepare(lambda _: small)(params)

    return make(PARAMS) if name == "coded" else jax.jit(make)(PARAMS)


def latents(tree):
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jc.FakeQuantized))
    return [x for x in nodes if isinstance(x, jc.FakeQuantized)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_latent_weight_reads_as_its_quantized_one_bit_for_bit(name):
    small, tree = both(name)
    read = jax.jit(jc.materialize)
    chex.assert_trees_all_equal(read(tree), read(small))
    settled = jc.qat.convert(tree) if name == "coded" else jax.jit(jc.qat.convert)(tree)
    assert not latents(settled)
    chex.assert_trees_all_equal(read(settled), read(small))
    if name != "coded":  # whose codes come back packed
        chex.assert_trees_all_equal(settled, small)
    trainable, frozen = jc.partition(tree)
    floats = jax.tree.leaves(trainable)
    assert all(x.dtype in (jnp.float32, jnp.bfloat16) for x in floats)
    assert all(
        x.weight.dtype == x.steps.scale.dtype == "float32" for x in latents(tree)
    )
    chex.assert_trees_all_equal(jc.combine(trainable, frozen), tree)


def test_latents_start_at_the_originals_that_have_the_same_codes():
    (weight, *_) = latents(both("symmetric")[1]["a"])
    np.testing.assert_array_equal(weight.weight, KERNEL)
    small, tree = both("other codes")
    (weight,) = latents(tree["a"])
    same = np.asarray(weight.weight == KERNEL)
    assert 0.3 < same.mean() < 1
    values = np.asarray(small["a"]["kernel"].materialize())
    np.testing.assert_array_equal(np.asarray(weight.weight)[~same], values[~same])
    kept, rest = (
        both("mixed")[1]["a"]["kernel"].kept,
        both("mixed")[1]["a"]["kernel"].rest,
    )
    order = np.asarray(both("mixed")[0]["a"]["kernel"].order)
    found = np.concatenate([kept.weight, rest.weight])
    np.testing.assert_array_equal(found, np.asarray(KERNEL)[order])
    (turned,) = latents(both("symmetric")[1]["b"])
    np.testing.assert_array_equal(turned.weight, STACK.transpose(0, 2, 1))


def test_a_term_of_a_sum_starts_at_what_it_stands_for():
    def split(params):
        rest = jc.symmetric(params["kernel"] - OUTLIERS, bits=3, block=16)
        return {"kernel": jc.Sum((rest, OUTLIERS))}

    small = split({"kernel": KERNEL})
    tree = jc.qat.prepare(split)({"kernel": KERNEL})
    chex.assert_trees_all_equal(jc.materialize(tree), jc.materialize(small))
    (weight,) = latents(tree)
    np.testing.assert_allclose(weight.weight, KERNEL - OUTLIERS, atol=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_come_back_and_gradients_pass(dtype):
    params = {"kernel": KERNEL.astype(dtype)}
    tree = jax.jit(jc.qat.prepare("symmetric(bits=3, block=16)"))(params)
    assert tree["kernel"].dtype == tree["kernel"].materialize().dtype == dtype
    trainable, frozen = jc.partition(tree)
    total = lambda t: jnp.sum(jc.combine(t, frozen)["kernel"].materialize())  # noqa: E731
    gradient = jax.jit(jax.grad(total))(trainable)["kernel"]
    assert gradient.weight.dtype == jnp.float32
    assert np.mean(np.asarray(gradient.weight) == 1) > 0.8
    small = jax.jit(jc.qat.convert)(tree)["kernel"]
    assert small.dtype == dtype and small.scale.dtype == jnp.bfloat16


def forward(params, x):
    return jnp.tanh(x @ jc.materialize(params["a"]["kernel"])) @ params["out"]


def test_an_ordinary_optax_loop_beats_rounding():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((256, 64)), jnp.float32)
    out = jnp.asarray(rng.standard_normal((96, 4)), jnp.float32)
    params = {"a": {"kernel": KERNEL}, "out": out}
    target = forward(params, x)
    recipe = [("a/kernel", "symmetric(bits=2, block=16, full_range=True)")]
    start = jc.compress(params, recipe)
    tree = jc.qat.prepare(recipe)(params)
    trainable, frozen = jc.partition(tree)
    optimizer = optax.adamw(2e-3, weight_decay=1e-3)

    def loss(tree):
        return jnp.mean(jnp.square(forward(tree, x) - target))

    @jax.jit
    def step(trainable, state):
        objective = lambda trainable: loss(jc.combine(trainable, frozen))  # noqa: E731
        value, gradient = jax.value_and_grad(objective)(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = optimizer.init(trainable), []
    for _ in range(60):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[0] == pytest.approx(float(loss(start)), rel=1e-5)
    trained = jc.combine(trainable, frozen)
    small = jc.qat.convert(trained)
    assert isinstance(small["a"]["kernel"], jc.Quantized)
    assert jc.nbytes(small) == jc.nbytes(start)
    assert float(loss(small)) == pytest.approx(float(loss(trained)), rel=1e-6)
    assert float(loss(small)) < 0.4 * losses[0]
    changed = small["a"]["kernel"].scale != start["a"]["kernel"].scale
    assert np.asarray(changed).mean() > 0.5


def test_scales_and_norms_alone_train_with_codes_frozen():
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.standard_normal((128, 64)), jnp.float32)
    params = {
        "a": {"kernel": KERNEL},
        "norm": {"scale": jnp.ones(64)},
        "out": jnp.ones(2),
    }
    small = jc.compress(params, [("a/kernel", "asymmetric(bits=2, block=16)")])
    trainable, frozen = jc.partition(small, r".*scale")
    held = [path for path, _ in jax.tree_util.tree_leaves_with_path(trainable)]
    assert len(held) == 2  # the steps and the norm; not the array beside them
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    optimizer = optax.adam(3e-3)

    def loss(tree):
        made = (x * tree["norm"]["scale"][None]) @ tree["a"]["kernel"].materialize()
        return jnp.mean(jnp.square(made - x @ KERNEL))

    @jax.jit
    def step(trainable, state):
        objective = lambda trainable: loss(jc.combine(trainable, frozen))  # noqa: E731
        value, gradient = jax.value_and_grad(objective)(trainable)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = optimizer.init(trainable), []
    for _ in range(80):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    tuned = jc.combine(trainable, frozen)
    assert losses[-1] < 0.9 * losses[0]
    old, new = small["a"]["kernel"], tuned["a"]["kernel"]
    np.testing.assert_array_equal(new.codes.packed, old.codes.packed)
    chex.assert_trees_all_equal(new.zero_point, old.zero_point)
    np.testing.assert_array_equal(tuned["out"], params["out"])


def test_inside_a_loss_gradients_reach_the_weights():
    quantize = jc.qat.prepare(jc.symmetric(bits=3, block=16, full_range=True))
    x = jnp.asarray(weights(8, 64, seed=5), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(params):
        small = quantize(params)
        return jnp.sum(x @ small["kernel"].materialize()) + small["bias"].sum()

    found = gradient({"kernel": KERNEL, "bias": jnp.ones(3)})
    expected = np.broadcast_to(np.asarray(x).sum(0)[:, None], KERNEL.shape)
    got = np.asarray(found["kernel"])
    passed = np.isclose(got, expected, rtol=1e-4)
    assert passed.mean() > 0.8 and np.all(got[~passed] == 0)  # those are clipped
    np.testing.assert_array_equal(found["bias"], 1)


def test_latents_live_in_stacks_and_scans():
    tree = both("symmetric")[1]["b"]
    one = jax.tree.map(lambda x: x[1], tree)
    whole = tree["kernel"].materialize()
    np.testing.assert_array_equal(one["kernel"].materialize(), whole[1])
    read = lambda _, layer: (None, layer["kernel"].materialize())  # noqa: E731
    np.testing.assert_array_equal(jax.lax.scan(read, None, tree)[1], whole)


def test_a_tree_of_latents_is_saved_and_comes_back(tmp_path):
    tree = both("mixed")[1]
    jc.save(tmp_path / "training.safetensors", tree)
    chex.assert_trees_all_equal(jc.load(tmp_path / "training.safetensors"), tree)


def test_nothing_to_pass_through_is_said():
    with pytest.raises(ValueError, match="found no quantized weight"):
        jc.qat.prepare("svd(rank=8)")({"kernel": KERNEL})
    with pytest.raises(ValueError, match="matches no leaf"):
        jc.qat.prepare([("nope", "symmetric(bits=2)")])({"kernel": KERNEL})

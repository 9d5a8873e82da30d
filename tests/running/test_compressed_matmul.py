"""Unmodified models multiply by what compressed weights store."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_for_tests import TOKENS, WIDTH, Ensemble, language, layouts
from running.factors import (
    FACTORS,
    applied,
    materialize,
    random,
    shapes_in,
    thin,
    with_biases,
)

import jaxcompress as jc

# Whole models


@functools.cache
def factorized(kind):
    """The model, and factors of every kernel and embedding; the same for every kind."""
    model, params = language(kind)
    if kind != "loop":
        params = factorized("loop")[1]
    else:
        params = jc.compress(with_biases(params), FACTORS, layouts=layouts(params))
    if "scan" in kind:
        params = dict(params)
        blocks = [params.pop(f"block_{i}") for i in range(2)]
        params["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    return model, params


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loop", "scan", "remat", "scan_remat"])
def test_a_model_multiplies_by_factors(kind):
    model, small = factorized(kind)
    dense = materialize(small)
    quick = applied(model, jc.compressed_matmul)
    plain = applied(model).lower(dense, TOKENS).compile()
    parts = quick.lower(small, TOKENS).compile()
    want = plain(dense, TOKENS)
    np.testing.assert_allclose(parts(small, TOKENS), want, atol=1e-5)
    operations = parts.cost_analysis()["flops"]
    assert operations < 0.75 * plain.cost_analysis()["flops"]
    made = shapes_in(quick, small, TOKENS)
    kernels = {
        x.shape[1:] if path[0].key == "blocks" else x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(dense)
        if path[-1].key == "kernel"
    }
    kernels -= {(WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)}  # the embedding's: Flax asks
    assert len(kernels) == 4 and not made & kernels
    assert made & {(3, WIDTH, 4)}  # the convolution's left factor


def test_vmapped_modules_and_examples():
    model, x = Ensemble(), random(4, WIDTH)
    params = with_biases(model.init(jax.random.key(0), x)["params"])
    small = jc.compress(params, [(".*kernel", thin(4))], layouts=layouts(params))
    want = applied(model)(materialize(small), x)
    np.testing.assert_allclose(
        applied(model, jc.compressed_matmul)(small, x), want, atol=1e-5
    )
    each = jax.jit(jax.vmap(applied(model, jc.compressed_matmul), in_axes=(None, 0)))
    np.testing.assert_allclose(each(small, x), want, atol=1e-5)
    assert (3, WIDTH, WIDTH) not in shapes_in(each, small, x)


class Few(nn.Module):
    """One layer of each kind."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Conv)(WIDTH, (3,), name="conv")(x)
        x = nn.gelu(nn.DenseGeneral((2, 8), name="split")(x))
        x = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="join")(x)
        return nn.Einsum((WIDTH, 2 * WIDTH), "btd,df->btf", name="up")(x)


def test_gradients_are_those_of_the_array():
    model, x = Few(), random(2, 6, WIDTH)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: jnp.asarray(random(*p.shape)), params)
    recipe = [
        rule for rule in FACTORS if "query" not in rule[0] and "out" not in rule[0]
    ]
    recipe[-1] = (".*kernel", thin(4))
    small = jc.compress(params, recipe, layouts=layouts(params))

    def loss(params, context):
        with context():
            return jnp.square(model.apply({"params": params}, x)).mean()

    plain, quick = (
        jax.jit(jax.grad(loss), static_argnums=1)(small, context)
        for context in (contextlib.nullcontext, jc.compressed_matmul)
    )
    plain, quick = (jax.tree.leaves(tree) for tree in (plain, quick))
    largest = max(np.abs(a).max() for a in plain)
    assert largest > 1e-3
    for a, b in zip(plain, quick, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * largest)


@pytest.mark.slow
def test_factors_may_be_compressed_too():
    model, params = factorized("loop")
    inside = [(r".*/(left|right|factors/\d|core)", "symmetric(bits=8)")]
    small = jc.compress(params, inside)
    assert "block_0/up/kernel/left/codes" in jc.leaf_names(small)
    want = applied(model)(materialize(small), TOKENS)
    quick = applied(model, jc.compressed_matmul)
    np.testing.assert_allclose(quick(small, TOKENS), want, atol=1e-5)
    assert (2, WIDTH // 2, WIDTH) not in shapes_in(quick, small, TOKENS)


def test_eager_and_uncompressed_models_run_as_ever():
    model, x = nn.Sequential([nn.Dense(32), nn.Dense(24)]), random(4, 24)
    params = model.init(jax.random.key(0), x)["params"]
    small = jc.compress(params, [(".*kernel", thin(4))])
    with jc.compressed_matmul():
        got = model.apply({"params": params}, x)
        again = model.init(jax.random.key(0), x)["params"]
        quick = model.apply({"params": small}, x)
    np.testing.assert_array_equal(got, model.apply({"params": params}, x))
    for a, b in zip(*map(jax.tree.leaves, (again, params)), strict=True):
        np.testing.assert_array_equal(a, b)
    want = model.apply({"params": materialize(small)}, x)
    np.testing.assert_allclose(quick, want, atol=1e-5)


def test_it_ends_with_its_context():
    model, x = nn.Dense(32), random(4, 24)
    params = model.init(jax.random.key(0), x)["params"]
    small = jc.compress(params, [("kernel", thin(4))])
    with jc.compressed_matmul():
        assert (24, 32) not in shapes_in(applied(model), small, x)
    assert (24, 32) in shapes_in(applied(model), small, x)

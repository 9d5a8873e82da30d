"""Pruning: which weights stay, how they are stored, masks over trees, bad input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices_for_tests import covariance, moments, weights
from oracles import first_largest, oracle_mask

import jaxcompress as jc
from jaxcompress.coding.integers.leaf import Coded, entropy_code, stored_bytes
from jaxcompress.pruning import Sparse, alps, magnitude, sparse, sparsegpt, wanda
from jaxcompress.pruning.choices import keep_largest
from jaxcompress.pruning.masks import (
    apply as apply_masks,
)
from jaxcompress.pruning.masks import (
    magnitude_scores,
    taylor_scores,
    wanda_scores,
)
from jaxcompress.pruning.masks import (
    make as make_masks,
)
from jaxcompress.pruning.masks import (
    of as masks_of,
)
from jaxcompress.quantization import symmetric
from jaxcompress.storage import load, save
from jaxcompress.tree.compress import chain, compress
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import dense, materialize, nbytes

INPUTS, OUTPUTS = 24, 10
CHOICES = [
    {"sparsity": 0.5},
    {"sparsity": 0.7},
    {"sparsity": 0.7, "scope": "row"},
    {"sparsity": 0.0},
    {"nm": "2:4"},
    {"nm": "1:3"},
    {"nm": "4x5", "sparsity": 0.5},
]
RECONSTRUCTIONS = [sparsegpt, alps]


# Which weights stay.


@pytest.mark.parametrize("axis", [0, -1])
def test_exactly_the_largest_stay_and_of_equal_ones_the_first(axis):
    score = np.random.default_rng(0).integers(0, 4, (9, 7)).astype(np.float32)
    score[2] = 1e-42  # subnormal: still larger than zero
    lines = score.T if axis == 0 else score
    for kept in range(lines.shape[1] + 1):
        mask = np.asarray(keep_largest(jnp.asarray(score), kept, axis=axis))
        for line, got in zip(lines, mask.T if axis == 0 else mask, strict=True):
            assert sorted(first_largest(line, kept)) == list(np.flatnonzero(got))


@pytest.mark.parametrize("options", CHOICES)
def test_magnitude_keeps_what_a_sort_keeps(options):
    x = weights(2, INPUTS, OUTPUTS).round(1)  # many ties
    leaf = magnitude(x, **options)
    assert leaf.shape == x.shape and leaf.dtype == x.dtype
    for whole, one in zip(np.asarray(x), np.asarray(leaf.materialize()), strict=True):
        mask = oracle_mask(np.abs(whole), **options)
        np.testing.assert_array_equal(one, np.where(mask, whole, 0))


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.6}, {"nm": "2:4"}, {"sparsity": 0.6, "scope": "leaf"}],
)
def test_wanda_weighs_by_the_norm_of_the_input(options):
    x, known = weights(INPUTS, OUTPUTS), moments()
    norm = np.sqrt(np.diag(covariance(INPUTS)))[:, None]
    mask = oracle_mask(np.abs(np.asarray(x)) * norm, **{"scope": "row", **options})
    expected = np.where(mask, x, 0)
    np.testing.assert_array_equal(wanda(x, known, **options).materialize(), expected)
    assert np.any(magnitude(x, **options).materialize() != expected)


def test_a_threshold_drops_what_is_not_above_it():
    x = weights(2, INPUTS, OUTPUTS).at[1].multiply(2)  # slices keep unequal numbers
    leaf = magnitude(x, threshold=1.5)
    assert leaf.values.shape[-1] == 1
    np.testing.assert_array_equal(leaf.materialize(), jnp.where(abs(x) > 1.5, x, 0))
    none = magnitude(x, threshold=1e9)
    np.testing.assert_array_equal(none.materialize(), jnp.zeros_like(x))
    even = magnitude(magnitude(x, nm="2:4").materialize(), threshold=0)
    assert even.values.shape == (2, INPUTS // 2, OUTPUTS)
    with pytest.raises(TypeError, match="host method"):
        jax.jit(lambda x: magnitude(x, threshold=0.5))(x)


# Storage.


@pytest.mark.parametrize("options", CHOICES)
def test_bytes_are_those_of_the_values_and_the_bitmap(options):
    x = weights(INPUTS, OUTPUTS, dtype=jnp.bfloat16)
    leaf = magnitude(x, **options)
    kept = int(oracle_mask(np.abs(np.asarray(x, np.float32)), **options).sum())
    bits = (6 * 2 if "x" in options.get("nm", "") else INPUTS * OUTPUTS) / 8
    assert nbytes(leaf) == 2 * kept + -(-bits // 1)
    assert leaf.materialize().dtype == jnp.bfloat16
    back = sparse(leaf.materialize(), leaf.kept)
    assert back.values.size == kept
    np.testing.assert_array_equal(back.materialize(), leaf.materialize())


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"sparsity": 0.8}, -(0.8 * np.log2(0.8) + 0.2 * np.log2(0.2))),
        ({"nm": "2:4"}, np.log2(6) / 4),
    ],
)
def test_a_coded_mask_takes_the_entropy_of_the_mask(options, bits):
    x = weights(256, 256)
    small = compress({"kernel": x}, chain(magnitude(**options), "entropy_code()"))
    mask = small["kernel"].mask
    assert isinstance(mask, Coded)
    taken = 8 * stored_bytes(mask) / x.size
    assert bits - 0.01 < taken < bits + 0.03
    expected = magnitude(x, **options).materialize()
    np.testing.assert_array_equal(small["kernel"].materialize(), expected)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(40, name="out")(nn.gelu(nn.Dense(72, name="up")(x)))


def test_pruned_quantized_coded_saved_and_run(tmp_path):
    model, x = Model(), weights(3, 64)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    known = {"up/kernel": moments(64), "out/kernel": moments(72)}
    recipe = chain(
        [("up/kernel", alps(sparsity=0.5)), ("out/kernel", sparsegpt(nm="2:4"))],
        [(".*kernel/values", symmetric(bits=4, block=16))],
        [("up/kernel/mask", "entropy_code()")],
    )
    small = compress(params, recipe, known)
    save(tmp_path / "small.safetensors", small)
    back = load(tmp_path / "small.safetensors")
    for a, b in zip(*map(jax.tree.leaves, (small, back)), strict=True):
        np.testing.assert_array_equal(a, b)
    expected = model.apply({"params": materialize(small)}, x)
    got = jax.jit(model.apply)({"params": back}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    kernel = materialize(small)["up"]["kernel"]
    assert np.mean(kernel == 0) >= 0.5
    exact = alps(params["up"]["kernel"], known["up/kernel"], sparsity=0.5)
    error = jnp.linalg.norm(kernel - exact.materialize())
    assert 0 < error < 0.2 * jnp.linalg.norm(kernel)


# Masks over trees.

TREE = {
    "embed": {"embedding": weights(64, 66, seed=1)},
    "mlp": {"kernel": 3 * weights(68, 64, seed=2), "bias": jnp.ones(64)},
    "stack": {"kernel": weights(2, 36, 60, seed=3)},
}
STACK = {"stack/kernel": Layout((0,), (1,), (2,))}


def test_masks_of_a_tree_are_those_of_its_leaves():
    scores = magnitude_scores(TREE)
    assert scores["mlp"]["bias"] is None
    masks = make_masks(TREE, scores, 0.7, scope="row", layouts=STACK)
    assert masks["mlp"]["bias"] is None
    by_row = functools.partial(oracle_mask, sparsity=0.7, scope="row")
    size = {key: np.abs(np.asarray(x)) for key, x in flat(TREE).items()}
    got = flat(masks)
    np.testing.assert_array_equal(got["mlp/kernel"], by_row(size["mlp/kernel"]))
    expected = by_row(size["embed/embedding"].T).T  # a row of the table is an output
    np.testing.assert_array_equal(got["embed/embedding"], expected)
    for mask, one in zip(got["stack/kernel"], size["stack/kernel"], strict=True):
        np.testing.assert_array_equal(mask, by_row(one))
    pruned = apply_masks(TREE, masks)
    assert pruned["mlp"]["bias"] is TREE["mlp"]["bias"]
    np.testing.assert_array_equal(
        pruned["mlp"]["kernel"], np.where(got["mlp/kernel"], TREE["mlp"]["kernel"], 0)
    )
    recipe = magnitude(sparsity=0.7, scope="row")
    small = compress(TREE, recipe, layouts=STACK)
    for a, b in zip(*map(jax.tree.leaves, (masks_of(small), masks)), strict=True):
        np.testing.assert_array_equal(a, b)


def flat(tree):
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in found}


def test_all_leaves_compete_where_the_scope_is_global():
    scores = magnitude_scores(TREE)
    masks = flat(jax.jit(lambda s: make_masks(TREE, s, 0.8, scope="global"))(scores))
    names = list(masks)
    pooled = np.concatenate([np.abs(flat(TREE)[name]).ravel() for name in names])
    mask = np.concatenate([masks[name].ravel() for name in names])
    assert mask.sum() == round(0.2 * pooled.size)
    assert pooled[mask].min() >= pooled[~mask].max()
    shares = [masks[name].mean() for name in names]
    assert max(shares) > 2 * min(shares)


def test_scores_weigh_by_gradients_and_inputs():
    slopes = jax.tree.map(lambda x: weights(*x.shape, seed=9), TREE)
    scores = taylor_scores(TREE, slopes, where="mlp/.*")
    assert scores["embed"]["embedding"] is None
    for leaf in ("kernel", "bias"):
        expected = np.abs(np.asarray(TREE["mlp"][leaf]) * slopes["mlp"][leaf])
        np.testing.assert_allclose(scores["mlp"][leaf], expected, rtol=1e-6)
    known = {"mlp/kernel": moments(68)}
    scores = wanda_scores(TREE, known)
    assert jax.tree.leaves(scores)[0] is scores["mlp"]["kernel"]
    mask = make_masks(TREE, scores, 0.5, scope="row")["mlp"]["kernel"]
    expected = wanda(TREE["mlp"]["kernel"], known["mlp/kernel"], sparsity=0.5)
    np.testing.assert_array_equal(mask, expected.kept)


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "not None"),
        ({"sparsity": 1.0}, "below 1, not 1.0"),
        ({"sparsity": -0.1}, "not -0.1"),
        ({"sparsity": True}, "not True"),
        ({"sparsity": 0.999}, "keep none of 240"),
        ({"nm": "2:7"}, "multiple of 7 inputs, these weights have 24"),
        ({"nm": "5:4"}, "not '5:4'"),
        ({"nm": "half"}, "not 'half'"),
        ({"nm": "2:4", "sparsity": 0.7}, "a sparsity of 0.5, not 0.7"),
        ({"nm": "5x5", "sparsity": 0.5}, "5x5 do not divide 24 inputs"),
        ({"nm": "4x5"}, "not None"),
        ({"sparsity": 0.5, "threshold": 1.0}, "not both"),
        ({"threshold": -1.0}, "0 or more, not -1.0"),
        ({"sparsity": 0.5, "scope": "global"}, "not 'global'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        magnitude(weights(INPUTS, OUTPUTS), **options)


@pytest.mark.parametrize("method", [wanda, *RECONSTRUCTIONS])
def test_moments_that_are_missing_or_of_another_model(method):
    x = weights(INPUTS, OUTPUTS)
    with pytest.raises(ValueError, match=f"{method.__name__} needs moments"):
        method(x, sparsity=0.5)
    with pytest.raises(ValueError, match=r"shape \(20, 20\).*needs \(24, 24\)"):
        method(x, moments(20), sparsity=0.5)
    with pytest.raises(TypeError, match="not int32"):
        method(x.astype(jnp.int32), moments(), sparsity=0.5)


def test_what_masks_and_scores_refuse():
    with pytest.raises(ValueError, match=r"sparsegpt takes .* not blocks"):
        sparsegpt(weights(INPUTS, OUTPUTS), moments(), sparsity=0.5, nm="4x5")
    with pytest.raises(ValueError, match="damping above 0 and below 1, not 0"):
        alps(weights(INPUTS, OUTPUTS), moments(), sparsity=0.5, damping=0)
    with pytest.raises(ValueError, match="no Sparse leaf"):
        masks_of(TREE)
    with pytest.raises(ValueError, match=r"stack/kernel: .* 3 axes"):
        make_masks(TREE, magnitude_scores(TREE), 0.5, scope="row")
    with pytest.raises(ValueError, match=r"a: scores of shape \(3,\), .* \(2, 2\)"):
        make_masks({"a": jnp.ones((2, 2))}, {"a": jnp.ones(3)}, 0.5)
    with pytest.raises(ValueError, match="'nothing' matches no"):
        magnitude_scores(TREE, where="nothing")
    with pytest.raises(ValueError, match="needs gradients"):
        taylor_scores(TREE)
    with pytest.raises(ValueError, match="not scope='global'"):
        make_masks(TREE, magnitude_scores(TREE), 0.5, scope="global", nm="2:4")
    with pytest.raises(ValueError, match=r"mask of shape \(2, 2\)"):
        apply_masks({"a": jnp.ones(3)}, {"a": jnp.ones((2, 2), bool)})
    small = {"a": magnitude(weights(INPUTS, OUTPUTS), sparsity=0.5)}
    assert isinstance(small["a"], Sparse)
    with pytest.raises(ValueError, match="mask on a Sparse"):
        apply_masks(small, masks_of(small))
    assert dense(entropy_code(dense(small["a"].mask))).dtype == jnp.uint8


def test_a_threshold_works_in_a_recipe():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((96, 64)), jnp.float32)
    small = jc.compress({"a": {"kernel": x}}, "magnitude(threshold=1.0)")
    wanted = jnp.where(jnp.abs(x) > 1, x, 0)
    np.testing.assert_array_equal(small["a"]["kernel"].materialize(), wanted)
    with pytest.raises(TypeError, match="host method"):
        jax.jit(lambda x: jc.magnitude(x, threshold=1.0))(x)

"""Pruning: which weights stay, what the others make up for, storage, and bad input."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import jaxcompress as jc
from jaxcompress.calibration.feedback import layer_loss
from jaxcompress.calibration.moments import moments_from_covariance
from jaxcompress.entropy.integers import Coded, entropy_code, stored_bytes
from jaxcompress.optimizers import cubic_sparsity, gradual_pruning, keep_masked_zero
from jaxcompress.pruning import (
    Sparse,
    alps,
    apply_masks,
    keep_largest,
    magnitude,
    magnitude_scores,
    make_masks,
    masks_of,
    sparse,
    sparsegpt,
    taylor_scores,
    wanda,
    wanda_scores,
)
from jaxcompress.quantization import symmetric
from jaxcompress.storage import load, save
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaves import dense, materialize, nbytes
from jaxcompress.tree.rules import chain, compress

INPUTS, OUTPUTS = 24, 10
CHOICES = [
    {"sparsity": 0.5},
    {"sparsity": 0.7},
    {"sparsity": 0.7, "scope": "row"},
    {"sparsity": 0.0},
    {"pattern": "2:4"},
    {"pattern": "1:3"},
    {"pattern": "4x5", "sparsity": 0.5},
]
RECONSTRUCTIONS = [sparsegpt, alps]


def weights(*shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_t(4, shape), dtype)


def covariance(inputs, seed=0):
    """Correlated inputs of very different size: a decaying spectrum, turned."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(inputs, inputs)))
    second = (basis * np.arange(1.0, inputs + 1) ** -1.2) @ basis.T
    size = np.exp(0.7 * rng.normal(size=inputs))
    return second * np.outer(size, size)


def moments(inputs=INPUTS, seed=0):
    return moments_from_covariance(jnp.asarray(covariance(inputs, seed), jnp.float32))


def first_largest(scores, kept):
    """Indices of the `kept` largest of a list, equal ones in order."""
    ranked = sorted(range(len(scores)), key=lambda i: -float(scores[i]))  # stable
    return ranked[:kept]


def oracle_mask(score, sparsity=None, pattern=None, scope="leaf"):
    """The mask of one matrix of scores, by sorting whatever competes."""
    inputs, outputs = score.shape
    mask = np.zeros(score.shape, bool)
    if pattern and ":" in pattern:
        keep, group = map(int, pattern.split(":"))
        for o, start in itertools.product(range(outputs), range(0, inputs, group)):
            for i in first_largest(score[start : start + group, o], keep):
                mask[start + i, o] = True
    elif pattern:
        rows, columns = map(int, pattern.split("x"))
        corners = list(
            itertools.product(range(0, inputs, rows), range(0, outputs, columns))
        )
        norms = [(score[i : i + rows, o : o + columns] ** 2).sum() for i, o in corners]
        for at in first_largest(norms, round((1 - sparsity) * len(corners))):
            i, o = corners[at]
            mask[i : i + rows, o : o + columns] = True
    elif scope == "row":
        for o in range(outputs):
            mask[first_largest(score[:, o], round((1 - sparsity) * inputs)), o] = True
    else:
        kept = first_largest(score.ravel(), round((1 - sparsity) * score.size))
        mask.ravel()[kept] = True
    return mask


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
    [{"sparsity": 0.6}, {"pattern": "2:4"}, {"sparsity": 0.6, "scope": "leaf"}],
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
    even = magnitude(magnitude(x, pattern="2:4").materialize(), threshold=0)
    assert even.values.shape == (2, INPUTS // 2, OUTPUTS)
    with pytest.raises(TypeError, match="host method"):
        jax.jit(lambda x: magnitude(x, threshold=0.5))(x)


# What is moved to make up for it.


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
        ({"pattern": "2:4"}, {"group": 2, "block": 4}),
    ],
)
def test_sparsegpt_is_the_optimal_brain_surgeon(options, oracle):
    x = weights(INPUTS, OUTPUTS)
    leaf = sparsegpt(x, moments(), **options)
    value, mask = oracle_sparsegpt(x, covariance(INPUTS), **oracle)
    np.testing.assert_array_equal(leaf.kept, mask)
    np.testing.assert_allclose(leaf.materialize(), value, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_alps_weights_are_the_best_on_their_support(options):
    x, second = weights(INPUTS, OUTPUTS), covariance(INPUTS)
    leaf = alps(x, moments(), **options)
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


@pytest.mark.parametrize(
    ("sparsity", "pattern"), [(0.5, None), (0.7, None), (None, "2:4")]
)
def test_better_methods_lose_less(sparsity, pattern):
    x, known = weights(64, 48), moments(64)
    small = [
        f(x, known, sparsity=sparsity, pattern=pattern).materialize()
        for f in (alps, sparsegpt, wanda, magnitude)
    ]
    found = [float(layer_loss(x, value, known.second)) for value in small]
    kept = [int(jnp.sum(value != 0)) for value in small]
    assert found[0] < 0.85 * found[1] < 0.85 * found[2] < 0.85 * found[3]
    exact = round((1 - (sparsity or 0.5)) * 64 * 48)
    per_output = 48 * round((1 - (sparsity or 0.5)) * 64)
    assert kept == [exact, exact, exact if pattern else per_output, exact]


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
    value = method(weights(INPUTS, OUTPUTS), nothing, sparsity=0.5).materialize()
    assert np.all(np.isfinite(value))


# Storage.


@pytest.mark.parametrize("options", CHOICES)
def test_bytes_are_those_of_the_values_and_the_bitmap(options):
    x = weights(INPUTS, OUTPUTS, dtype=jnp.bfloat16)
    leaf = magnitude(x, **options)
    kept = int(oracle_mask(np.abs(np.asarray(x, np.float32)), **options).sum())
    bits = (6 * 2 if "x" in options.get("pattern", "") else INPUTS * OUTPUTS) / 8
    assert nbytes(leaf) == 2 * kept + -(-bits // 1)
    assert leaf.materialize().dtype == jnp.bfloat16
    back = sparse(leaf.materialize(), leaf.kept)
    assert back.values.size == kept
    np.testing.assert_array_equal(back.materialize(), leaf.materialize())


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"sparsity": 0.8}, -(0.8 * np.log2(0.8) + 0.2 * np.log2(0.2))),
        ({"pattern": "2:4"}, np.log2(6) / 4),
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
        [("up/kernel", alps(sparsity=0.5)), ("out/kernel", sparsegpt(pattern="2:4"))],
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
    masks = make_masks(TREE, scores, 0.7, scope="row", layout=STACK)
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
    small = compress(TREE, recipe, layout=STACK)
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
    scores = taylor_scores(TREE, slopes, names="mlp/.*")
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


# In training.


def quadratic(target):
    return jax.grad(
        lambda p: sum(
            0.5 * jnp.sum((x - y) ** 2)
            for x, y in zip(*map(jax.tree.leaves, (p, target)), strict=True)
        )
    )


def train(optimizer, params, steps, state=None, *, pass_on=False, seen=lambda *_: None):
    target = jax.tree.map(lambda x: weights(*x.shape, seed=5), params)
    state = jax.jit(optimizer.init)(params) if state is None else state

    @jax.jit
    def step(params, state):
        slopes = quadratic(target)(params)
        extra = {"gradients": slopes} if pass_on else {}
        updates, state = optimizer.update(slopes, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        seen(params, state)
    return params, state


def small_tree():
    return {"a": {"kernel": weights(12, 8)}, "b": {"bias": jnp.ones(5)}}


def test_masked_weights_stay_zero_under_adamw_while_others_train():
    params = small_tree()
    scores = magnitude_scores(params, names=".*kernel")
    masks = make_masks(params, scores, pattern="2:4")
    adamw = optax.adamw(0.05, weight_decay=0.1)
    optimizer = optax.chain(adamw, keep_masked_zero(masks))
    trained, state = train(optimizer, params, 4)  # starts dense: set to zero at once
    mask = np.asarray(masks["a"]["kernel"])
    value = np.asarray(trained["a"]["kernel"])
    np.testing.assert_array_equal(value != 0, mask)
    free, _ = train(adamw, params, 4)
    np.testing.assert_allclose(value[mask], free["a"]["kernel"][mask], rtol=1e-6)
    np.testing.assert_array_equal(trained["b"]["bias"], free["b"]["bias"])
    np.testing.assert_array_equal(state[-1].masks["a"]["kernel"], mask)
    sparse_params = {"kernel": magnitude(params["a"]["kernel"], sparsity=0.5)}
    assert jax.tree.structure(masks_of(sparse_params)).num_leaves == 1
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    updates, _ = optax.chain(keep_masked_zero(masks)).update(short, state[-1:], params)
    value = optax.apply_updates(params, updates)["a"]["kernel"]
    np.testing.assert_array_equal(value[~mask], 0)
    with pytest.raises(ValueError, match="mask of shape"):
        optimizer.init({"a": {"kernel": jnp.ones((4, 4))}, "b": {"bias": jnp.ones(5)}})
    with pytest.raises(ValueError, match="needs the parameters"):
        keep_masked_zero(masks).update(params, state[-1])


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_gradual_pruning_follows_its_schedule_and_never_turns_back(pattern):
    score = functools.partial(magnitude_scores, names=".*kernel")
    schedule = cubic_sparsity(0.5, start=2, stop=8)
    optimizer = optax.chain(
        optax.adam(0.05), gradual_pruning(score, schedule, every=2, pattern=pattern)
    )
    zeros = []

    def seen(params, state):
        zero = np.asarray(params["a"]["kernel"]) == 0
        np.testing.assert_array_equal(zero, ~np.asarray(state[-1].masks["a"]["kernel"]))
        zeros.append(zero)

    half, state = train(optimizer, small_tree(), 6, seen=seen)
    # A checkpoint in the middle goes on as if nothing had happened.
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    restored = jax.tree.map(jnp.asarray, restored)
    resumed, _ = train(optimizer, half, 5, restored)
    whole, _ = train(optimizer, half, 5, state, seen=seen)
    np.testing.assert_array_equal(resumed["a"]["kernel"], whole["a"]["kernel"])
    for before, after in itertools.pairwise(zeros):
        assert np.all(after[before])
    for step, zero in enumerate(zeros):
        t = min(max((step - step % 2 - 2) / 6, 0), 1)
        wanted = 0.5 - 0.5 * (1 - t) ** 3
        if pattern:
            kept = max(2, round((1 - wanted) * 4))
            groups = (~zero).reshape(3, 4, 8).sum(axis=1)
            np.testing.assert_array_equal(groups, kept)
        else:
            assert zero.sum() == 96 - round((1 - wanted) * 96)


def test_gradual_pruning_by_gradients():
    score = functools.partial(taylor_scores, names=".*kernel")
    optimizer = optax.chain(optax.sgd(0.0), gradual_pruning(score, lambda step: 0.75))
    params = small_tree()
    pruned, _ = train(optimizer, params, 1, pass_on=True)
    kernel = np.asarray(params["a"]["kernel"])
    slopes = kernel - np.asarray(weights(12, 8, seed=5))
    mask = oracle_mask(np.abs(kernel * slopes), sparsity=0.75)
    np.testing.assert_array_equal(pruned["a"]["kernel"], np.where(mask, kernel, 0))
    with pytest.raises(ValueError, match="needs gradients"):
        train(optimizer, params, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cubic_sparsity(1.0, stop=5), "final sparsity .* not 1.0"),
        (lambda: cubic_sparsity(0.5, start=5, stop=5), "not from 5 to 5"),
        (lambda: gradual_pruning(magnitude_scores, abs, every=0), "not 0"),
    ],
)
def test_schedules_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "not None"),
        ({"sparsity": 1.0}, "below 1, not 1.0"),
        ({"sparsity": -0.1}, "not -0.1"),
        ({"sparsity": True}, "not True"),
        ({"sparsity": 0.999}, "keep none of 240"),
        ({"pattern": "2:7"}, "multiple of 7 inputs, these weights have 24"),
        ({"pattern": "5:4"}, "not '5:4'"),
        ({"pattern": "half"}, "not 'half'"),
        ({"pattern": "2:4", "sparsity": 0.7}, "a sparsity of 0.5, not 0.7"),
        ({"pattern": "5x5", "sparsity": 0.5}, "5x5 do not divide 24 inputs"),
        ({"pattern": "4x5"}, "not None"),
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
        sparsegpt(weights(INPUTS, OUTPUTS), moments(), sparsity=0.5, pattern="4x5")
    with pytest.raises(ValueError, match="damping between 0 and 1, not 0"):
        alps(weights(INPUTS, OUTPUTS), moments(), sparsity=0.5, damping=0)
    with pytest.raises(ValueError, match="no Sparse leaf"):
        masks_of(TREE)
    with pytest.raises(ValueError, match=r"stack/kernel: .* 3 axes"):
        make_masks(TREE, magnitude_scores(TREE), 0.5, scope="row")
    with pytest.raises(ValueError, match=r"a: scores of shape \(3,\), .* \(2, 2\)"):
        make_masks({"a": jnp.ones((2, 2))}, {"a": jnp.ones(3)}, 0.5)
    with pytest.raises(ValueError, match="'nothing' matches no"):
        magnitude_scores(TREE, names="nothing")
    with pytest.raises(ValueError, match="needs gradients"):
        taylor_scores(TREE)
    with pytest.raises(ValueError, match="not scope='global'"):
        make_masks(TREE, magnitude_scores(TREE), 0.5, scope="global", pattern="2:4")
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

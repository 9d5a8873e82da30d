"""Masks that hold, and that grow, while a tree trains."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from matrices_for_tests import weights
from oracles import oracle_mask

from jaxcompress.pruning import magnitude
from jaxcompress.pruning.masks import (
    magnitude_scores,
    taylor_scores,
)
from jaxcompress.pruning.masks import (
    make as make_masks,
)
from jaxcompress.pruning.masks import (
    of as masks_of,
)
from jaxcompress.training.optimizers import (
    cubic_sparsity,
    gradual_pruning,
    keep_masked_zero,
)


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
    scores = magnitude_scores(params, where=".*kernel")
    masks = make_masks(params, scores, nm="2:4")
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
    score = functools.partial(magnitude_scores, where=".*kernel")
    schedule = cubic_sparsity(0.5, start=2, stop=8)
    optimizer = optax.chain(
        optax.adam(0.05), gradual_pruning(score, schedule, every=2, nm=pattern)
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
    score = functools.partial(taylor_scores, where=".*kernel")
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

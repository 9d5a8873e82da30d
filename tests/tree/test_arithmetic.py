"""Norms, averages and boxes of trees: by what leaves stand for, not by their parts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

RANDOM = np.random.default_rng(0)
PARAMS = {
    "dense": {"kernel": jnp.asarray(RANDOM.normal(size=(64, 64)), jnp.bfloat16)},
    "scale": jnp.asarray(RANDOM.normal(size=64), jnp.float32),
    "steps": jnp.arange(7),
}
SMALL = jc.compress(PARAMS, "symmetric(bits=4, block=16)")


def floats(tree):
    arrays = map(np.asarray, jax.tree.leaves(jc.materialize(tree)))
    return [x.astype(np.float64) for x in arrays if x.dtype != np.int32]


@pytest.mark.parametrize("tree", [PARAMS, SMALL, {}], ids=["dense", "small", "empty"])
def test_norm_is_that_of_the_dense_weights(tree):
    wanted = np.sqrt(sum((x**2).sum() for x in floats(tree)))
    np.testing.assert_allclose(jax.jit(jc.tree.norm)(tree), wanted, rtol=1e-6)


def test_average_is_that_of_the_dense_weights():
    mean = jax.jit(lambda *trees: jc.tree.average(trees, [1, 3]))(SMALL, PARAMS)
    for got, a, b in zip(floats(mean), floats(SMALL), floats(PARAMS), strict=True):
        np.testing.assert_allclose(got, 0.25 * a + 0.75 * b, rtol=1e-2, atol=1e-7)
    kernel = mean["dense"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and isinstance(kernel, jax.Array)
    np.testing.assert_array_equal(mean["steps"], PARAMS["steps"])
    for trees, weights in (([], None), ([PARAMS], [1, 2]), ([PARAMS, SMALL], [1, -1])):
        with pytest.raises(ValueError, match="as many weights, whose sum is not 0"):
            jc.tree.average(trees, weights)


def test_unbox_removes_boxes_and_keeps_leaves():
    box = lambda x: nn.Partitioned(x, names=("in", "out"))  # noqa: E731
    leaf = SMALL["dense"]["kernel"]
    tree = {"a": box(leaf), "b": box(PARAMS["dense"]["kernel"]), "c": leaf}
    opened = jc.tree.unbox(tree)
    assert opened["a"] is leaf and opened["c"] is leaf
    assert opened["b"] is PARAMS["dense"]["kernel"]


def test_a_box_around_layers_along_another_axis_is_refused():
    x = jnp.asarray(RANDOM.normal(size=(32, 4, 48)), jnp.float32)
    layouts = {"w": jc.Layout((1,), (0,), (2,))}
    rules = [("w", "symmetric(bits=4)")]
    boxed = {"w": nn.Partitioned(x, names=("in", "layers", "out"))}
    with pytest.raises(ValueError, match=r"w: a Partitioned .*tree\.unbox"):
        jc.compress(boxed, rules, layouts=layouts)
    small = jc.compress(jc.tree.unbox(boxed), rules, layouts=layouts)
    assert small["w"].shape == x.shape

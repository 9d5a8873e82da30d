"""`check` names the leaf that a model cannot take, and computes nothing."""

import jax
import jax.numpy as jnp
import pytest

import jaxcompress as jc

PARAMS = {
    name: {"kernel": jnp.eye(64) + jnp.float32(i)} for i, name in enumerate("abc")
}
BATCH = jax.ShapeDtypeStruct((2, 64), jnp.float32)  # so nothing can be computed


def fine(params, x):
    return x @ params["a"]["kernel"] @ params["b"]["kernel"].T @ params["c"]["kernel"]


def picky(params, x):
    assert not params["b"]["kernel"].weak_type  # leaves have no such attribute
    return fine(params, x)


def test_a_tree_that_runs_passes():
    assert jc.check(fine, jc.compress(PARAMS, "symmetric(bits=4)"), BATCH) is None


def test_the_leaf_that_fails_is_named():
    small = jc.compress(PARAMS, "symmetric(bits=4)")
    with pytest.raises(
        ValueError, match=r"b/kernel: .*cannot take a Quantized.*'weak_type'"
    ):
        jc.check(picky, small, BATCH)
    kept = jc.compress(PARAMS, [("[ac]/kernel", "symmetric(bits=4)")])
    assert jc.check(picky, kept, BATCH) is None


def test_a_model_that_fails_by_itself_says_so():
    small = jc.compress(PARAMS, "symmetric(bits=4)")
    with pytest.raises(TypeError, match="dot_general"):
        jc.check(fine, small, jax.ShapeDtypeStruct((2, 63), jnp.float32))


def test_a_dense_tree_is_warned_about():
    with pytest.warns(UserWarning, match=r"no compressed leaf.*tree\.unbox"):
        jc.check(fine, PARAMS, BATCH)

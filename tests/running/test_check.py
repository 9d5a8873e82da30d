"""`check` names the leaf that a model cannot take, and computes nothing."""

import flax.linen as nn
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


class Wrapped(nn.Module):
    norm: str

    @nn.compact
    def __call__(self, x):
        if self.norm == "spectral":
            return nn.SpectralNorm(nn.Dense(64))(x, update_stats=False)
        return nn.WeightNorm(nn.Dense(64))(x)


@pytest.mark.parametrize("norm", ["spectral", "weight"])
def test_a_norm_around_a_kernel_says_what_to_do(norm):
    model = Wrapped(norm)
    variables = model.init(jax.random.key(0), jnp.ones((2, 64)))
    params = variables.pop("params")
    layouts = jc.find_layouts(model, params, BATCH, variables=variables)
    # The power iteration, which no batch reaches, is no use of the kernel.
    assert layouts == {"Dense_0/kernel": jc.Layout((), (0,), (1,))}
    small = jc.compress(params, "symmetric(bits=4)", layouts=layouts)
    with pytest.raises(ValueError, match=r"Dense_0/kernel: .*Fold the norm into"):
        jc.check(model, small, BATCH, variables=variables)

"""A leaf answers what a model asks of an array, with the values of `materialize`."""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

SQUARE = jax.random.normal(jax.random.key(0), (64, 64))
SMALL = jc.compress({"kernel": SQUARE}, "symmetric(bits=4, block=32)")["kernel"]
DENSE = np.asarray(SMALL.materialize(), np.float64)
ROWS = np.asarray(jax.random.normal(jax.random.key(1), (3, 64)))

ACCESS = {
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "astype": lambda w: w.astype(jnp.float32),
    "reshape": lambda w: w.reshape(32, 128),
    "transpose": lambda w: w.transpose(1, 0),
    "index": lambda w: w[1:3, ::2],
    "rows": lambda w: w[jnp.array([5, 7])],
    "mean": lambda w: w.mean(0),
    "iteration": lambda w: [row for row in w][63],
    "negative": operator.neg,
    "add": lambda w: w + 1,
    "subtract from": lambda w: 1 - w,
    "multiply": lambda w: w * w,
    "divide": lambda w: w / 3.0,
    "power": lambda w: w**2,
    "product with an array": lambda w: jnp.asarray(ROWS) @ w,
    "product with NumPy": lambda w: ROWS @ w,
    "product from the left": lambda w: w @ ROWS.T,
    "jnp.dot": lambda w: jnp.dot(ROWS, w),
    "einsum": lambda w: jnp.einsum("ti,io->to", ROWS, w),
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
    "take": lambda w: jnp.take(w, jnp.arange(4), axis=0),
    "concatenate": lambda w: jnp.concatenate([w, w], axis=-1),
    "comparison": lambda w: w > 0,
}


@pytest.mark.parametrize("name", ACCESS)
def test_access_gives_what_the_dense_array_gives(name):
    got = np.asarray(ACCESS[name](SMALL))
    want = np.asarray(ACCESS[name](jnp.asarray(DENSE, jnp.float32)))
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_shape_len_and_truth():
    assert (SMALL.shape, SMALL.ndim, len(SMALL), bool(SMALL)) == ((64, 64), 2, 64, True)
    assert (SMALL.itemsize, SMALL.nbytes) == (4, jc.nbytes({"kernel": SMALL}))


def test_no_other_attribute_is_invented():
    assert not hasattr(SMALL, "sharding") and not hasattr(SMALL, "apply")
    with pytest.raises(AttributeError, match="'Quantized' object has no attribute"):
        _ = SMALL.kernels


def test_access_under_jit_and_its_gradient():
    def loss(scale, frozen):
        return (frozen * scale).sum()

    got = jax.jit(jax.grad(loss))(2.0, SMALL)
    np.testing.assert_allclose(got, DENSE.sum(), rtol=1e-3)


def test_a_failing_property_says_why():
    broken = jax.tree.map(lambda x: None, SMALL)
    with pytest.raises(AttributeError, match="NoneType"):
        broken.materialize()


class Tied(nn.Module):
    """Reads the table of its embedding past the layer, for the head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(128, 64, name="wte")
        x = nn.Dense(64)(embed(tokens))
        table = self.variables["params"]["wte"]["embedding"]
        head = nn.Dense(128, use_bias=False, parent=None)
        return head.apply({"params": {"kernel": table.T}}, x)


def test_a_tied_model_reads_its_table_past_the_layer():
    tokens = jnp.arange(12)[None]
    params = Tied().init(jax.random.key(0), tokens)["params"]
    small = jc.compress(params, "symmetric(bits=8)")
    got = Tied().apply({"params": small}, tokens)
    want = Tied().apply({"params": jc.materialize(small)}, tokens)
    np.testing.assert_array_equal(got, want)


def test_repr_is_one_line():
    assert repr(SMALL) == (
        "Quantized(64x64, symmetric 4 bits, blocks of 32, "
        f"{jc.nbytes(SMALL) / 1e3:.2f} kB)"
    )
    big = jc.compress({"kernel": jnp.ones((256, 256))}, "svd(rank=32)")["kernel"]
    assert repr(big).startswith("LowRank(256x256, ") and repr(big).endswith("0.07 MB)")
    assert "\n" not in repr(jax.tree.structure(SMALL))


@pytest.mark.parametrize("recipe", ["symmetric(bits=8)", "magnitude(sparsity=0.5)"])
def test_codes_that_became_floats_raise(recipe):
    tree = {"layer": {"kernel": SQUARE}}
    small = jc.compress(tree, recipe)
    mean = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, small, small)
    with pytest.raises(TypeError, match=r"not integers.*jc\.tree\.average"):
        jc.materialize(mean)
    with pytest.raises(TypeError, match="not integers"):
        mean["layer"]["kernel"].unbox()

"""Large weights are multiplied by tile by tile, and 16-bit ones as float32."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.coding.levels.rate_coded import RateCoded
from jaxcompress.running.compressed_matmul.narrow import is_narrow
from jaxcompress.tree import products
from jaxcompress.tree.leaf import Arithmetic, Leaf, contract

ROWS, WIDTH = 130, 48  # of the embedding; tiles of 2048 weights do not divide it


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(products, "TILE", 2048)
    monkeypatch.setattr(products, "LEAST", 4096)


def weight(*shape):
    return jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)


METHODS = {
    "8 bits": "symmetric(bits=8)",
    "8 bits, one step": 'symmetric(bits=8, block="tensor")',
    "4 bits in blocks": "asymmetric(bits=4, block=16)",
    "3 bits in two fields": "symmetric(bits=3, block=32)",
    "two sides": "sign_split(bits=(3, 4))",
    "levels of a format": "nf4(block=16)",
    "levels": None,
}


def compressed(name):
    if METHODS[name]:
        return jc.compress({"kernel": weight(WIDTH, ROWS)}, METHODS[name])["kernel"]
    random = np.random.default_rng(6)
    levels = jnp.asarray(random.integers(-9, 10, (WIDTH, ROWS)), jnp.int8)
    scales = jc.pack_bits(jnp.asarray(random.integers(0, 9, (1, ROWS))), bits=4)
    steps = jnp.asarray(random.uniform(0.5, 1.5, WIDTH), jnp.bfloat16)
    return RateCoded(levels, steps, scales, jnp.dtype("float32"))


@pytest.mark.parametrize("name", METHODS)
def test_tiles_multiply_as_the_dense_weight_does(name):
    """Against NumPy in float64; the largest temporary is no dense weight."""
    small = compressed(name)
    x = weight(3, WIDTH)
    multiply = jax.jit(lambda x, small: contract(x, small, Arithmetic()))
    dense = np.asarray(small.materialize(), np.float64)
    want = np.asarray(x, np.float64) @ dense
    np.testing.assert_allclose(multiply(x, small), want, rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(multiply)(x, small))
    assert f"f32[{WIDTH},{ROWS}]" not in text and "f32[48,33]" in text


def test_entropy_coded_codes_are_decoded_before_the_tiles():
    small = jc.compress(
        {"kernel": weight(WIDTH, ROWS) ** 5},
        jc.chain("symmetric(bits=4)", "entropy_code()"),
    )["kernel"]
    assert any(x.entropy_coded for x in jax.tree.leaves(small.codes, is_leaf=is_leaf))
    x = weight(2, WIDTH)
    multiply = jax.jit(lambda x, small: contract(x, small, Arithmetic()))
    want = np.asarray(x) @ np.asarray(small.materialize())
    np.testing.assert_allclose(multiply(x, small), want, rtol=1e-4, atol=1e-4)


def is_leaf(x):
    return isinstance(x, Leaf)


def test_gradients_pass_through_tiles():
    """With respect to inputs and steps: those of the product with the dense weight."""
    small = jc.compress({"kernel": weight(WIDTH, ROWS)}, "symmetric(bits=4, block=16)")
    trainable, frozen = jc.partition(small)
    x = weight(2, WIDTH)

    def loss(trainable, x, dense):
        kernel = jc.combine(trainable, frozen)["kernel"]
        y = x @ kernel.materialize() if dense else contract(x, kernel, Arithmetic())
        return jnp.sum(jnp.sin(y))

    def gradients(dense):
        return jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(trainable, x, dense)

    tiled, want = gradients(False), gradients(True)
    assert len(jax.tree.leaves(want)) == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), tiled, want
    )


class Tied(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(ROWS, WIDTH, dtype=self.dtype, name="embed")
        x = nn.Dense(WIDTH, dtype=self.dtype, name="dense")(embed(tokens))
        return embed.attend(x)


def applied(model, params, context=contextlib.nullcontext):
    @jax.jit
    def apply(params, tokens):
        with context():
            return model.apply({"params": params}, tokens)

    return apply, params, jnp.arange(5)[None]


@pytest.mark.parametrize("context", [jc.compressed_matmul, jc.low_memory])
@pytest.mark.parametrize("recipe", ["symmetric(bits=8)", "symmetric(bits=4, block=16)"])
def test_a_tied_head_is_never_dense(recipe, context):
    params = {
        "embed": {"embedding": weight(ROWS, WIDTH)},
        "dense": {"kernel": weight(WIDTH, WIDTH), "bias": jnp.zeros(WIDTH)},
    }
    small = jc.compress(params, recipe)
    apply, *arguments = applied(Tied(), small, context)
    dense, *_ = applied(Tied(), small)
    want = dense(jc.materialize(small), arguments[1])
    np.testing.assert_allclose(apply(*arguments), want, rtol=1e-4, atol=1e-4)
    compiled = apply.lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * ROWS * WIDTH


def test_a_large_head_with_a_bias_is_never_dense_in_low_memory():
    random = weight(2, ROWS, WIDTH)
    params = {"kernel": random[0].T, "bias": random[1, :, 0]}
    small = jc.compress(params, [("kernel", "symmetric(bits=8)")])
    model, x = nn.Dense(ROWS), weight(3, WIDTH)

    @jax.jit
    def apply(params, x):
        with jc.low_memory():
            return model.apply({"params": params}, x)

    kernel = np.asarray(small["kernel"].materialize(), np.float64)
    want = np.asarray(x, np.float64) @ kernel + np.asarray(params["bias"])
    np.testing.assert_allclose(apply(small, x), want, rtol=1e-5, atol=1e-5)
    compiled = apply.lower(small, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * ROWS * WIDTH


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_16_bit_weights_are_widened_where_they_are_multiplied(dtype):
    """Sums in float32: nearer to float64 than Flax's own products in bfloat16 are."""
    params = {
        "embed": {"embedding": weight(ROWS, WIDTH)},
        "dense": {"kernel": weight(WIDTH, WIDTH), "bias": jnp.zeros(WIDTH)},
    }
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    model = Tied(dtype)
    apply, *arguments = applied(model, half, jc.compressed_matmul)
    got = apply(*arguments)
    plain, *_ = applied(model, half)
    assert got.dtype == plain(*arguments).dtype
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), half)
    table = wide["embed"]["embedding"]
    hidden = table[:5] @ wide["dense"]["kernel"]
    if got.dtype == jnp.bfloat16:
        hidden = np.asarray(jnp.asarray(hidden, jnp.bfloat16), np.float64)
    want = hidden @ table.T
    error = lambda y: np.abs(np.asarray(y[0], np.float64) - want).max()  # noqa: E731
    assert error(got) <= error(plain(*arguments)) + 1e-5
    assert error(got) < (0.5 if got.dtype == jnp.bfloat16 else 1e-4)


def test_gradients_of_16_bit_weights_are_those_of_a_plain_apply():
    kernel = {"kernel": weight(WIDTH, WIDTH).astype(jnp.bfloat16)}
    x = weight(2, WIDTH)

    def gradient(context):
        def loss(params, x):
            with context():
                y = nn.Dense(WIDTH, use_bias=False).apply({"params": params}, x)
            return jnp.sum(jnp.sin(y))

        return jax.jit(jax.grad(loss))(kernel, x)["kernel"]

    got, want = gradient(jc.compressed_matmul), gradient(contextlib.nullcontext)
    assert got.dtype == want.dtype == jnp.bfloat16 and np.abs(want).max() > 0.1
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=0.02, atol=0.02
    )


def test_dense_float32_weights_are_left_to_flax():
    assert not is_narrow(weight(2, 2)) and is_narrow(weight(2, 2).astype(jnp.bfloat16))
    assert not is_narrow(jnp.zeros(2, jnp.int8)) and not is_narrow(None)

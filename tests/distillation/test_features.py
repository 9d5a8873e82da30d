"""Features of unmodified models, by checked names; objectives and students on them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_for_tests import HEADS, TOKENS, WIDTH, language

from jaxcompress import distillation as d
from jaxcompress.models.stacking import unstack_layers
from jaxcompress.models.transformer import Transformer

SIZES = {"vocab_size": 32, "width": 16, "heads": 2, "kv_heads": 1, "head_size": 8}
MODEL = Transformer(**SIZES, layers=3, mlp_width=24, scan=True, sow_intermediates=True)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loop", "remat"])
def test_modules_of_an_unmodified_model(kind):
    model, params = language(kind)
    names = ("split", "join", "block_1/up", "block_0/attention/query", "block_1/0")
    run = jax.jit(d.capture(model, names))
    output, found = run(params, TOKENS)
    np.testing.assert_allclose(
        output, model.apply({"params": params}, TOKENS), rtol=1e-5, atol=1e-5
    )
    assert found.keys() == set(names)
    assert found["block_0/attention/query"].shape == (2, 6, HEADS, WIDTH // HEADS)
    join = nn.DenseGeneral(WIDTH, axis=(-2, -1))
    again = join.apply({"params": params["join"]}, found["split"])
    np.testing.assert_allclose(again, found["join"], rtol=1e-5, atol=1e-6)
    # The last block's output, through the layers after it.
    x = found["block_1/0"]
    x = x + nn.Conv(WIDTH, (3,)).apply({"params": params["conv"]}, x)
    split = nn.DenseGeneral((HEADS, WIDTH // HEADS))
    again = split.apply({"params": params["split"]}, x)
    np.testing.assert_allclose(again, found["split"], rtol=1e-5, atol=1e-5)


def test_every_name_is_listed_and_nothing_else():
    model, params = language("loop")
    names = d.feature_names(model, params, TOKENS)
    assert names["block_0/up"].shape == (2, 6, 2 * WIDTH)
    assert {"embed", "conv", "block_1/norm", "block_0/attention/out"} < names.keys()
    _, found = jax.jit(d.capture(model, names))(params, TOKENS)
    assert {k: x.shape for k, x in found.items()} == {
        k: x.shape for k, x in names.items()
    }


def test_later_calls_of_a_shared_module_have_numbers():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="shared")
            return layer(jnp.tanh(layer(x)))

    x = jnp.ones((2, 3))
    params = Twice().init(jax.random.key(0), x)["params"]
    output, found = d.capture(Twice(), ["shared", "shared[1]"])(params, x)
    np.testing.assert_allclose(found["shared[1]"], output)
    first = x @ params["shared"]["kernel"] + params["shared"]["bias"][None]
    np.testing.assert_allclose(found["shared"], first, rtol=1e-6)


@pytest.mark.slow
def test_what_our_models_sow(params):
    """Stacked where the model is scanned, the same by layer where it is not."""
    names = ("hidden", "layers/hidden", "layers/attention/attention")
    _, found = jax.jit(d.capture(MODEL, names))(params, TOKENS)
    maps = found["layers/attention/attention"]
    assert maps.shape == (3, 2, 2, 6, 6) and found["layers/hidden"].shape == (
        3,
        2,
        6,
        16,
    )
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.triu(maps[0, 0, 0], 1), 0)
    looped = MODEL.clone(scan=False)
    run = jax.jit(d.capture(looped, ["layer_2/hidden", "layer_2/attention/attention"]))
    _, layer = run(unstack_layers(params), TOKENS)
    np.testing.assert_allclose(
        layer["layer_2/hidden"], found["layers/hidden"][2], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        layer["layer_2/attention/attention"], maps[2], rtol=1e-4, atol=1e-6
    )


def test_gradients_reach_what_comes_before_a_feature(params):
    run = d.capture(MODEL, ["layers/hidden"])

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.square(run(params, TOKENS)[1]["layers/hidden"][1]).mean()

    found = gradient(params)["layers"]["mlp"]["up_proj"]["kernel"]
    assert np.any(found[0]) and np.any(found[1]) and not np.any(found[2])


def test_names_that_are_not_there():
    model, params = language("loop")
    with pytest.raises(ValueError, match=r"nothing called block_0/upp; .* block_0/up"):
        d.capture(model, ["join", "block_0/upp"])(params, TOKENS)
    scanned, stacked = language("scan")
    with pytest.raises(ValueError, match=r"blocks/up; .*variable_axes"):
        d.capture(scanned, ["blocks/up"])(stacked, TOKENS)
    with pytest.raises(ValueError, match="capture needs a list"):
        d.capture(model, [])
    with pytest.raises(ValueError, match="capture needs a list"):
        d.capture(model, "join")
    with pytest.raises(TypeError, match="not a function"):
        d.capture(lambda x: x, ["join"])
    with pytest.raises(TypeError, match="Linen module, not a dict"):
        d.feature_names({}, params, TOKENS)

"""Sibling layers that read the same inputs are multiplied by as one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.models.transformer import Transformer
from jaxcompress.running.merged import Elsewhere, Merged, merge_layers

TOKENS = jnp.arange(10).reshape(2, 5)
MODEL = Transformer(
    vocab_size=64,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    mlp_width=48,
    qkv_bias=True,
)
RECIPES = {
    "8 bits": "symmetric(bits=8)",
    "4 bits in blocks": "asymmetric(bits=4, block=16)",
    "bfloat16": None,
}


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]
    random = np.random.default_rng(4)
    one = lambda x: jnp.asarray(random.normal(size=x.shape) / 4, x.dtype)  # noqa: E731
    return jax.tree.map(one, shapes)


def fast(model, params, tokens=TOKENS):
    @jax.jit
    def apply(params, tokens):
        with jc.compressed_matmul():
            return model.apply({"params": params}, tokens)

    return apply(params, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_merged_layers_compute_what_they_did(params, recipe, scan):
    """Against the plain model on the dense arrays of the same weights."""
    model = MODEL.clone(scan=scan)
    params = jc.models.stack_layers(params) if scan else params
    if RECIPES[recipe]:
        recipe = [(".*kernel", RECIPES[recipe])]
        layouts = jc.find_layouts(model, params, {"tokens": TOKENS})
        small = jc.compress(params, recipe, layouts=layouts)
        ready = merge_layers(small)
    else:
        small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        ready = merge_layers(small, arrays=True)
    layer = ready["layers" if scan else "layer_1"]
    assert layer["attention"]["q_proj"]["kernel"].whole.shape[-1] == 64
    assert isinstance(layer["mlp"]["gate_proj"]["kernel"], Merged)
    for part, name in (("attention", "v_proj"), ("mlp", "up_proj")):
        assert isinstance(layer[part][name]["kernel"], Elsewhere)
    dense = jax.tree.map(lambda x: x.astype(jnp.float32), jc.materialize(small))
    want = model.apply({"params": dense}, TOKENS)
    np.testing.assert_allclose(fast(model, ready), want, rtol=2e-4, atol=2e-4)
    assert jc.nbytes(ready) == jc.nbytes(small)


def test_one_product_serves_a_group(params):
    small = jc.compress(params, [(".*kernel", "symmetric(bits=8)")])

    def count(params):
        def apply(params):
            with jc.compressed_matmul():
                return MODEL.apply({"params": params}, TOKENS)

        return str(jax.make_jaxpr(apply)(params)).count("dot_general")

    assert count(small) - count(merge_layers(small)) == 3 * MODEL.layers


class Pair(nn.Module):
    same: bool = True
    order: tuple[str, ...] = ("up_proj", "gate_proj")

    @nn.compact
    def __call__(self, x):
        total = 0.0
        for name in self.order:
            total = total + nn.Dense(8, name=name)(x)
            x = x if self.same else x + 1.0
        return total


def test_a_pair_adds_up():
    random = np.random.default_rng(2).normal(size=(5, 8, 8)).astype(np.float32)
    x, model = jnp.asarray(random[4, :3]), Pair()
    params = {
        name: {"kernel": jc.symmetric(random[i], bits=8), "bias": random[2 + i, 0]}
        for i, name in enumerate(model.order)
    }
    dense = [np.asarray(p["kernel"].materialize(), np.float64) for p in params.values()]
    biases = random[2, 0] + random[3, 0].astype(np.float64)
    merged = merge_layers(params, [model.order])
    want = np.asarray(x, np.float64) @ (dense[0] + dense[1]) + biases
    np.testing.assert_allclose(fast(model, merged, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [Pair(same=False), Pair(order=Pair.order[::-1])])
def test_layers_that_read_other_inputs_or_come_in_another_order_are_refused(model):
    kernel = jc.symmetric(jnp.eye(8), bits=8)
    params = {n: {"kernel": kernel, "bias": jnp.zeros(8)} for n in model.order}
    merged = merge_layers(params, [("up_proj", "gate_proj")])
    with pytest.raises(ValueError, match="gate_proj was merged with up_proj"):
        fast(model, merged, jnp.ones((2, 8)))


def test_kernels_that_differ_are_left_alone(params):
    kernels = {
        "q_proj": {"kernel": jc.symmetric(jnp.eye(8), bits=8)},
        "k_proj": {"kernel": jc.symmetric(jnp.eye(8), bits=4)},
        "v_proj": {"kernel": jc.symmetric(jnp.eye(8), bits=8)},
    }
    pair = {"gate_proj": kernels["q_proj"], "up_proj": kernels["v_proj"]}
    merged = merge_layers({**kernels, **pair})
    assert merged["q_proj"] is not None and "k_proj" in merged
    assert merged["q_proj"]["kernel"] is kernels["q_proj"]["kernel"]
    assert isinstance(merged["up_proj"]["kernel"], Elsewhere)
    for tree in (kernels, params):
        with pytest.raises(ValueError, match="no layers to merge"):
            merge_layers(tree)


def test_without_compressed_matmul_the_error_says_what_to_do(params):
    merged = merge_layers(jc.compress(params, [(".*kernel", "symmetric(bits=8)")]))
    with pytest.raises(ValueError, match="run the model inside"):
        MODEL.apply({"params": merged}, TOKENS)

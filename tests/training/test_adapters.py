"""LoRA on compressed weights: exact at first, only factors train, merged or apart."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.distillation import init_state
from jaxcompress.training import ADAPTERS, attach, detach, lora, merge

ROWS, WIDTH = 16, 12


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(ROWS, WIDTH, name="embed")(tokens)
        x = nn.DenseGeneral((3, 4), name="heads")(x)
        x = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="join")(jnp.tanh(x))
        return nn.Dense(ROWS, name="head")(x)


MODEL = Model()
TOKENS = jnp.arange(24).reshape(4, 6) % ROWS


@pytest.fixture(scope="module")
def small():
    params = jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]
    layouts = jc.find_layouts(MODEL, params, TOKENS)
    return jc.compress(
        params, [(".*kernel", "symmetric(bits=4, block=4)")], layouts=layouts
    )


@pytest.fixture(scope="module")
def tree(small):
    return lora(small, rank=2, key=jax.random.key(1))


def apply(params):
    return jax.jit(MODEL.apply)({"params": params}, TOKENS)


def trained(tree):
    """The tree with second factors that are not zero."""
    trainable, frozen = jc.partition(tree, ADAPTERS)
    random = np.random.default_rng(0)
    return jc.combine(
        jax.tree.map(
            lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), trainable
        ),
        frozen,
    )


def test_nothing_changes_at_first_and_products_are_added_afterwards(small, tree):
    assert (apply(tree) == apply(small)).all()
    adapted = trained(tree)
    products = detach(adapted)
    assert sorted(products) == ["head/kernel", "heads/kernel", "join/kernel"]
    dense = jc.materialize(small)
    for name, product in products.items():
        layer = dense[name.split("/")[0]]
        change = np.asarray(product.left, np.float64) @ np.asarray(product.right)
        assert product.left.shape[1] == 2 and np.abs(change).max() > 0.5
        layer["kernel"] = layer["kernel"] + change.reshape(layer["kernel"].shape)
    np.testing.assert_allclose(apply(adapted), apply(dense), atol=1e-4)
    np.testing.assert_allclose(apply(merge(adapted)), apply(dense), atol=1e-4)
    assert isinstance(merge(adapted)["head"]["kernel"], jax.Array)


def test_only_the_factors_train(small, tree):
    """Weight decay, which would shrink every float it is shown, shows it."""

    def loss_fn(params, batch, key):
        logits = MODEL.apply({"params": params}, batch["tokens"])
        labels = jnp.roll(batch["tokens"], -1, axis=1)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, {}

    optimizer = optax.adamw(3e-2, weight_decay=0.1)
    state = init_state(tree, optimizer, where=ADAPTERS, key=jax.random.key(2))
    step = jc.make_train_step(loss_fn, optimizer, where=ADAPTERS)
    losses = []
    for _ in range(12):
        state, metrics = step(state, {"tokens": TOKENS})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.85 * losses[0]
    _, before = jc.partition(tree, ADAPTERS)
    after, frozen = jc.partition(state.params, ADAPTERS)
    assert all(
        (a == b).all()
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True)
    )
    assert all(x.any() for x in jax.tree.leaves(after))
    assert len(jax.tree.leaves(after)) == 6


def test_products_are_saved_apart(small, tree, tmp_path):
    adapted = trained(tree)
    jc.save(tmp_path / "adapters.safetensors", detach(adapted))
    again = attach(small, jc.load(tmp_path / "adapters.safetensors"))
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    assert all(
        (a == b).all()
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True)
    )


def test_mistakes_name_what_is_wrong(small, tree):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"'nothing' matches no weight"):
        lora(small, rank=2, where="nothing", key=key)
    with pytest.raises(ValueError, match="rank"):
        lora(small, rank=0, key=key)
    with pytest.raises(ValueError, match=r"head/kernel is a Sum already"):
        lora(tree, rank=2, where="head/kernel", key=key)
    with pytest.raises(ValueError, match=r"heads/kernel is dense, .*\(12, 3, 4\)"):
        lora(jc.materialize(small), rank=2, key=key)
    products = detach(tree)
    with pytest.raises(ValueError, match="no weights named other"):
        attach(small, {"other": products["head/kernel"]})
    with pytest.raises(ValueError, match="belong to different models"):
        attach(small, {"join/kernel": products["head/kernel"]})

"""Layouts found by tracing, for every kind of layer and of loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
from jaxcompress.tracing.layouts import find_layouts
from jaxcompress.tree.generic_leaves import Reshaped
from jaxcompress.tree.layouts import (
    DENSE,
    ROWS,
    Layout,
    check_layout,
    matricize,
    restore,
)
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.paths import roots

KEY = jax.random.key(0)
SCANNED = Layout((0,), (1,), (2,))


class Kinds(nn.Module):
    """One layer of each kind, no biases, with names that say what they are."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 2), strides=2, use_bias=False, name="conv")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=2, use_bias=False, name="grouped")(x)
        x = nn.ConvTranspose(6, (2, 2), use_bias=False, name="up")(x)
        x = x.reshape(x.shape[0], -1, 6)
        x = nn.MultiHeadDotProductAttention(2, use_bias=False, name="mha")(x, x)
        x = nn.DenseGeneral((2, 3), use_bias=False, name="split")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), use_bias=False, name="merge")(x)
        x = nn.Einsum((5, 2, 7), "...i,iho->...ho", use_bias=False, name="einsum")(x)
        each = nn.vmap(
            nn.Dense,
            in_axes=2,
            out_axes=2,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
        )
        x = each(3, use_bias=False, name="each")(x)
        return nn.Dense(4, use_bias=False, name="dense")(x)


EXPECTED = {
    "conv/kernel": Layout((), (0, 1, 2), (3,)),
    "grouped/kernel": Layout((), (0, 1, 2), (3,)),
    "up/kernel": Layout((), (0, 1, 2), (3,)),
    "mha/query/kernel": Layout((), (0,), (1, 2)),
    "mha/key/kernel": Layout((), (0,), (1, 2)),
    "mha/value/kernel": Layout((), (0,), (1, 2)),
    "mha/out/kernel": Layout((), (0, 1), (2,)),
    "split/kernel": Layout((), (0,), (1, 2)),
    "merge/kernel": Layout((), (0, 1), (2,)),
    "einsum/kernel": Layout((), (0,), (1, 2)),
    "each/kernel": SCANNED,
    "dense/kernel": DENSE,
}


def abstract(model, *inputs):
    return jax.eval_shape(lambda: model.init(KEY, *inputs))["params"]


def test_kinds_without_any_array():
    image = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)
    params = jax.eval_shape(Kinds().init, KEY, image)["params"]
    found = find_layouts(Kinds(), params, image)
    assert found == EXPECTED
    assert list(found) == list(EXPECTED)  # in the order of use
    for name, value in roots(params):
        check_layout(name, value.shape, found[name])


def test_matricized_and_restored():
    rng = np.random.default_rng(0)
    for kind in EXPECTED.values():
        axes = len(kind.stack + kind.inputs + kind.outputs)
        x = jnp.asarray(rng.normal(size=(2, 3, 4, 5)[:axes]))
        matrix = matricize(x, kind)
        assert matrix.ndim == 2 + len(kind.stack)
        np.testing.assert_array_equal(dense(restore(matrix, x.shape, kind)), x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 4, dtype=jnp.bfloat16, name="embed")
        return embed.attend(nn.Dense(4, name="dense")(embed(tokens)))


def test_embeddings_tied_or_not():
    tokens = jnp.zeros((2, 3), jnp.int32)
    found = find_layouts(Tied(), abstract(Tied(), tokens), tokens)
    assert found == {"embed/embedding": ROWS, "dense/kernel": DENSE}
    embed = nn.Embed(11, 4)
    assert find_layouts(embed, abstract(embed, tokens), tokens) == {"embedding": ROWS}


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.remat(nn.Dense)(8, name="up")(x)
        return x + nn.DenseGeneral(4, axis=-1, name="down")(nn.gelu(y)), None


def scanned(axis, length=3):
    return nn.scan(
        Step,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=length,
    )()


@pytest.mark.parametrize("length", [1, 3])
def test_a_scan_stacks_along_axis_0(length):
    x = jnp.zeros((2, 4))
    model = scanned(0, length)
    found = find_layouts(
        lambda params, batch: model.apply({"params": params}, batch, None),
        abstract(model, x, None),
        x,
    )
    assert found == {"up/kernel": SCANNED, "down/kernel": SCANNED}


def test_another_scan_axis_is_a_stack():
    x, model = jnp.zeros((2, 4)), scanned(1)
    params = abstract(model, x, None)
    call = lambda params, batch: model.apply({"params": params}, batch, None)  # noqa: E731
    layouts = find_layouts(call, params, x)
    assert layouts["up/kernel"] == Layout((1,), (0,), (2,))
    check_layout("up/kernel", params["up"]["kernel"].shape, layouts["up/kernel"])


def test_nested_scans_and_experts_stack_in_order():
    w = jnp.zeros((2, 3, 4, 4))  # layers, experts, inputs, outputs

    def experts(params, x):
        def step(x, w):
            return jnp.einsum("ebi,eio->ebo", x, w), None

        return jax.lax.scan(step, x, params["w"])

    expected = {"w": Layout((0, 1), (2,), (3,))}
    assert find_layouts(experts, {"w": w}, jnp.zeros((3, 5, 4))) == expected

    def nested(params, x):
        def outer(x, w):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], None

        return jax.lax.scan(outer, x, params["w"])

    assert find_layouts(nested, {"w": w}, jnp.zeros((5, 4))) == expected


@jax.custom_vjp
def cubed(x, w):
    return (x @ w) ** 3


cubed.defvjp(lambda x, w: (cubed(x, w), (x, w)), lambda saved, g: saved)


@jax.custom_jvp
def squared(x, w):
    return (x @ w) ** 2


squared.defjvp(lambda primals, tangents: (squared(*primals), tangents[0]))

FOUND = {
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "a jitted cast": lambda w, x: x @ jax.jit(lambda w: w.astype(jnp.bfloat16))(w),
    "weight first": lambda w, x: w.T @ x.T,
    "checkpoint": lambda w, x: jax.checkpoint(lambda w, x: x @ w)(w, x),
    "custom_vjp": lambda w, x: cubed(x, w),
    "custom_jvp": lambda w, x: squared(x, w),
    "barrier": lambda w, x: x @ jax.lax.optimization_barrier((x, w))[1],
    "vmapped inputs": lambda w, x: jax.vmap(lambda x: x @ w)(x),
    "repeated": lambda w, x: jnp.einsum(
        "bi,bio->bo", x, jnp.broadcast_to(w, (5, *w.shape))
    ),
    "reshaped": lambda w, x: x @ w.reshape(2, 2, 3, 2).reshape(4, 6),
    "a new axis": lambda w, x: x @ w[None, :, None].squeeze((0, 2)),
    "split outputs": lambda w, x: jnp.einsum("bi,ikh->bkh", x, w.reshape(4, 2, 3)),
    "scan constant": lambda w, x: jax.lax.scan(
        lambda c, x: (c + x @ w, None), jnp.zeros(6), x
    ),
    "scan carry": lambda w, x: jax.lax.scan(
        lambda c, x: ((c[0], c[1] + x @ c[0]), None), (w, jnp.zeros(6)), x
    ),
    "while": lambda w, x: jax.lax.while_loop(
        lambda c: c.sum() < 1, lambda c: c + (x @ w).sum(), jnp.zeros(1)
    ),
    "fori": lambda w, x: jax.lax.fori_loop(
        0, 3, lambda i, c: (c[0] + (x @ c[1]).sum(), c[1]), (0.0, w)
    ),
    "scaled": lambda w, x: x @ (w * 2),
    "normalized": lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)),
    "sliced": lambda w, x: x @ w[:, :3],
    "cond": lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w * 2),
}
LOST = {
    "rounded": lambda w, x: x @ w.astype(jnp.int32).astype(jnp.float32),
    "diagonal": lambda w, x: jnp.einsum("bi,ii->b", x, w[:, :4]),
    "an axis with two roles": lambda w, x: jnp.einsum(
        "bij,ijo->bio", x.reshape(5, 2, 2), w.reshape(2, 2, 6)
    ),
    "tiled": lambda w, x: x.repeat(2, 1) @ jnp.broadcast_to(w, (2, 4, 6)).reshape(8, 6),
    "cut across axes": lambda w, x: x[:, :3] @ w.reshape(3, 8),
}


@pytest.mark.parametrize("name", FOUND)
def test_weights_followed(name):
    shape = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    x = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    found = find_layouts(lambda p, x: FOUND[name](p["w"], x), {"w": shape}, x)
    assert found == {"w": DENSE}


@pytest.mark.parametrize("name", LOST)
def test_weights_changed_first_are_not_found(name):
    shape = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    x = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    assert find_layouts(lambda p, x: LOST[name](p["w"], x), {"w": shape}, x) == {}


def test_uses_must_agree():
    shared = lambda p, x: x @ p["a/b"]["w"] @ p["a/b"]["w"]  # noqa: E731
    params = {"a/b": {"w": jnp.zeros((4, 4))}}
    assert find_layouts(shared, params, jnp.zeros((2, 4))) == {"a/b/w": DENSE}
    there_and_back = lambda p, x: x @ p["w"] @ p["w"].T  # noqa: E731
    with pytest.warns(UserWarning, match=r"w: .*inputs=\(0,\).*inputs=\(1,\).*first"):
        find_layouts(there_and_back, {"w": jnp.zeros((4, 6))}, jnp.zeros((2, 4)))


def test_an_nnx_model_through_a_function():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)

        def __call__(self, x):
            return self.conv(self.attention(x))

    graph, state, rest = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)
    call = lambda params, x: nnx.merge(graph, params, rest)(x)  # noqa: E731
    found = find_layouts(call, state, jnp.zeros((2, 5, 4)))
    assert {name.removesuffix("/value"): kind for name, kind in found.items()} == {
        "attention/query/kernel": Layout((), (0,), (1, 2)),
        "attention/key/kernel": Layout((), (0,), (1, 2)),
        "attention/value/kernel": Layout((), (0,), (1, 2)),
        "attention/out/kernel": Layout((), (0, 1), (2,)),
        "conv/kernel": Layout((), (0, 1), (2,)),
    }


def test_a_leaf_counts_as_its_array():
    tokens = jnp.zeros((2, 3), jnp.int32)
    params = abstract(Tied(), tokens)
    small = {**params, "embed": {"embedding": transposed(params["embed"]["embedding"])}}
    assert find_layouts(Tied(), small, tokens) == find_layouts(Tied(), params, tokens)


def transposed(x):
    inner = jax.ShapeDtypeStruct((x.shape[1], x.shape[0]), x.dtype)
    return Reshaped(inner, sizes=(x.shape[1], x.shape[0]), order=(-1, -2))


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, tokens, scale):
        return nn.Embed(11, 4, name="embed")(tokens) * scale


def test_what_a_linen_module_is_called_with():
    batch = {"tokens": jnp.zeros((2, 3), jnp.int32), "mask": 1, "labels": 1}
    params = abstract(Tied(), batch["tokens"])
    assert len(find_layouts(Tied(), params, batch)) == 2
    scale = jnp.ones((2, 3, 1))
    params = abstract(TwoInputs(), batch["tokens"], scale)
    found = find_layouts(TwoInputs(), params, {**batch, "scale": scale})
    assert found == {"embed/embedding": ROWS}
    with pytest.raises(TypeError, match=r"has only .*'labels'.*function of"):
        find_layouts(Tied(), params, {"labels": jnp.zeros(2)})
    with pytest.raises(TypeError, match=r"'weights', which .* it has tokens, scale\."):
        find_layouts(TwoInputs(), params, {**batch, "scale": scale, "weights": scale})
    with pytest.raises(TypeError, match=r"array or a dict.* not a list"):
        find_layouts(Tied(), params, [batch])
    with pytest.raises(TypeError, match="not a dict; wrap it"):
        find_layouts(params, params, batch)


class Switched(nn.Module):
    """Branches on a flag and a name, as models do on `train` and `mode`."""

    @nn.compact
    def __call__(self, x, train, mode="wide"):
        x = nn.Dense(6, use_bias=False)(x)
        return x if train or mode != "wide" else nn.Dense(3, use_bias=False)(x)


def test_flags_and_names_in_a_batch_are_passed_as_they_are():
    model, x = Switched(), np.ones((5, 4), np.float32)
    params = model.init(jax.random.key(0), x, False)["params"]
    both, one = ["Dense_0/kernel", "Dense_1/kernel"], ["Dense_0/kernel"]
    batch = {"x": x, "train": False, "mode": "wide"}
    for changed, names in (({}, both), ({"train": True}, one), ({"mode": "a"}, one)):
        assert list(find_layouts(model, params, batch | changed)) == names

    def called(params, batch):
        assert batch["train"] is False
        return model.apply({"params": params}, **batch)

    assert list(find_layouts(called, params, batch)) == both


@pytest.mark.slow
def test_flags_are_passed_in_calibration_too():
    model, x = Switched(), np.ones((5, 4), np.float32)
    batch = {"x": x, "train": False}
    params = model.init(jax.random.key(0), x, False)["params"]
    moments = jc.collect_moments(model, params, [batch, batch], where=".*")
    assert list(moments) == ["Dense_0/kernel", "Dense_1/kernel"]
    np.testing.assert_allclose(moments["Dense_0/kernel"].count, 10)
    recipe = [(".*", "symmetric(bits=8)")]
    small = jc.compress_blockwise(model, params, recipe, [batch])
    jc.check(model, small, batch)


def test_the_apply_of_a_module_and_its_class():
    model, x = nn.Dense(6), np.ones((5, 4), np.float32)
    params = model.init(jax.random.key(0), x)["params"]
    assert list(find_layouts(model.apply, params, x)) == ["kernel"]
    with pytest.raises(TypeError, match=r"Dense is a class; .*Dense\(\.\.\.\)"):
        find_layouts(nn.Dense, params, x)


class Holder:
    """A model as transformers wraps it: a module within, parameters as an argument."""

    module = Tied()

    def __call__(self, input_ids, attention_mask=None, params=None):
        assert attention_mask is not None
        return self.module.apply({"params": params}, input_ids)


def test_a_holder_of_a_module_is_called_with_params():
    batch = {"input_ids": jnp.zeros((2, 3), jnp.int32), "attention_mask": 1}
    params = abstract(Tied(), batch["input_ids"])
    want = find_layouts(Tied(), params, batch["input_ids"])
    assert want and find_layouts(Holder(), params, batch) == want

"""Unmodified Linen and NNX models run on compressed parameters."""

import contextlib
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models_for_tests import (
    ROWS,
    TOKENS,
    WIDTH,
    Ensemble,
    language,
    layouts,
    product,
    rounded,
)

import jaxcompress as jc
from jaxcompress.quantization.nearest import symmetric
from jaxcompress.running import nnx as running_nnx
from jaxcompress.running.low_memory import low_memory
from jaxcompress.tree.leaf import before_use, is_leaf

WEIGHTS = r".*(kernel|embedding)"
KINDS = ("loop", "scan", "remat", "scan_remat")


def shrink(params):
    """Every kernel and embedding compressed."""
    return jc.compress(params, [(WEIGHTS, rounded())], layouts=layouts(params))


def nest(params):
    """Every kernel and embedding a product of compressed factors."""
    inside = [(r".*(left|right)", rounded())]
    stages = jc.chain([(WEIGHTS, product())], inside)
    return jc.compress(params, stages, layouts=layouts(params))


def leaves(params):
    return [x for x in jax.tree.leaves(params, is_leaf=is_leaf) if is_leaf(x)]


def applied(model, context=contextlib.nullcontext):
    """`model.apply` of parameters, jitted anew."""

    @jax.jit
    def apply(params, x):
        with context():
            return model.apply({"params": params}, x)

    return apply


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_linen_model_runs_on_leaves(kind):
    model, params = language(kind)
    small = shrink(params)
    assert len(leaves(small)) == (11 if "scan" in kind else 18)
    want = applied(model)(jc.materialize(small), TOKENS)
    assert np.abs(want - applied(model)(params, TOKENS)).max() > 1e-4
    np.testing.assert_allclose(applied(model)(small, TOKENS), want, atol=2e-5)
    streamed = applied(model, low_memory)(small, TOKENS)
    np.testing.assert_allclose(streamed, want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loop", "scan"])
def test_nested_leaves_run_plain_and_streaming(kind):
    model, params = language(kind)
    small = nest(params)
    want = applied(model)(jc.materialize(small), TOKENS)
    np.testing.assert_allclose(applied(model)(small, TOKENS), want, atol=2e-5)
    streamed = applied(model, low_memory)(small, TOKENS)
    np.testing.assert_allclose(streamed, want, atol=2e-5)


def test_vmapped_module_runs_on_leaves():
    model, x = Ensemble(), jnp.ones((4, WIDTH))
    params = model.init(jax.random.key(0), x)["params"]
    small = shrink(params)
    assert small["many"]["kernel"].shape == (3, WIDTH, WIDTH)
    want = applied(model)(jc.materialize(small), x)
    for context in (contextlib.nullcontext, low_memory):
        got = applied(model, context)(small, x)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_eager_apply_is_bit_identical_to_materialized():
    model = nn.Sequential([nn.Embed(ROWS, WIDTH), nn.Dense(WIDTH), nn.Dense(WIDTH)])
    small = shrink(model.init(jax.random.key(0), TOKENS)["params"])
    want = model.apply({"params": jc.materialize(small)}, TOKENS)
    np.testing.assert_array_equal(model.apply({"params": small}, TOKENS), want)
    with low_memory():
        np.testing.assert_array_equal(model.apply({"params": small}, TOKENS), want)


class OneDense(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(WIDTH, use_bias=False, name="dense")(x), None


class Stacked(nn.Module):
    """Three Dense layers by `nn.scan`, stacked along `axis`."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            OneDense,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return body(name="layers")(x, None)[0]


@pytest.mark.parametrize("axis", [1, -1])
def test_scan_over_another_axis_needs_its_layout(axis):
    model, x = Stacked(axis), jnp.ones((4, WIDTH))
    params = model.init(jax.random.key(0), x)["params"]
    kind = {"layers/dense/kernel": jc.Layout((axis % 3,), (0,), (3 - axis % 3,))}
    small = jc.compress(params, [(WEIGHTS, rounded())], layouts=kind)
    got = model.apply({"params": small}, x)
    want = model.apply({"params": jc.materialize(small)}, x)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    forced = rounded(jnp.ones((3, WIDTH, 3)))  # every data array could be sliced
    with pytest.raises(ValueError, match=r"sliced along axis.*find_layouts"):
        model.apply({"params": {"layers": {"dense": {"kernel": forced}}}}, x)


class Annotated(nn.Module):
    """Dense and Embed whose parameters carry partitioning names."""

    @nn.compact
    def __call__(self, tokens):
        init = nn.with_partitioning(nn.initializers.normal(1.0), ("rows", "width"))
        x = nn.Embed(ROWS, WIDTH, embedding_init=init, name="embed")(tokens)
        init = nn.with_partitioning(nn.initializers.normal(1.0), ("width", "rows"))
        return nn.Dense(WIDTH, kernel_init=init, use_bias=False, name="dense")(x)


def test_partitioned_boxes_keep_their_names_and_run():
    model = Annotated()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    assert jc.leaf_names(params) == ["dense/kernel", "embed/embedding"]
    small = jc.compress(params, [(WEIGHTS, rounded())])
    box = small["embed"]["embedding"]
    assert box.names == ("rows", "width") and box.value.shape == (ROWS, WIDTH)
    assert box.value.inner.scale.shape == (1, ROWS)  # one per row: it is a table
    want = applied(model)(nn.unbox(jc.materialize(small)), TOKENS)
    for context in (contextlib.nullcontext, low_memory):
        got = applied(model, context)(small, TOKENS)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_embedding_keeps_flax_semantics():
    model = nn.Embed(ROWS, WIDTH, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    small = jc.compress(params, [("embedding", symmetric(bits=8, block="tensor"))])
    tokens = jnp.array([[0, 3, -1], [ROWS - 1, ROWS, 5]])
    want = applied(model)(jc.materialize(small), tokens)
    got = applied(model, low_memory)(small, tokens)
    assert got.dtype == jnp.bfloat16 and np.isnan(want[1, 1]).all()
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (got, want)))
    with pytest.raises(ValueError, match="integer"):
        applied(model, low_memory)(small, jnp.ones(3))


def temporary(model, context, params, x):
    """Bytes of temporaries of the compiled `model.apply`."""
    compiled = applied(model, context).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_streaming_embedding_takes_its_rows(monkeypatch):
    model, asked = nn.Embed(ROWS, WIDTH), []
    params = model.init(jax.random.key(0), TOKENS)["params"]
    small = jc.compress(params, [("embedding", symmetric(bits=8))])
    take_rows = jc.Reshaped.take_rows

    def noting(leaf, indices):
        asked.append(indices.shape)
        return take_rows(leaf, indices)

    monkeypatch.setattr(jc.Reshaped, "take_rows", noting)
    want = applied(model)(small, TOKENS)
    assert not asked
    np.testing.assert_allclose(applied(model, low_memory)(small, TOKENS), want)
    assert asked == [TOKENS.shape]


def test_streaming_differentiates_and_vmaps():
    model, x = Stacked(), jnp.ones((4, WIDTH))
    small = shrink(model.init(jax.random.key(0), x)["params"])
    trainable, frozen = jc.partition(small)

    def loss(trainable, context):
        with context():
            small = jc.combine(trainable, frozen)
            return jnp.square(model.apply({"params": small}, x)).mean()

    plain, streamed = (
        jax.jit(jax.grad(loss), static_argnums=1)(trainable, context)
        for context in (contextlib.nullcontext, low_memory)
    )
    assert np.abs(jax.tree.leaves(plain)[0]).min() > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, streamed
    )
    each = jax.vmap(applied(model, low_memory), in_axes=(None, 0))
    np.testing.assert_allclose(each(small, x), applied(model)(small, x), atol=1e-5)


def test_streaming_ends_with_its_context_and_its_thread():
    model, x = Stacked(), jnp.ones((4, WIDTH))
    small = shrink(model.init(jax.random.key(0), x)["params"])
    other = []

    def program():
        return applied(model).lower(small, x).as_text()

    with low_memory():
        thread = threading.Thread(target=lambda: other.append(program()))
        thread.start()
        thread.join()
        assert "optimization_barrier" in program()
        with low_memory():
            pass
        assert "optimization_barrier" in program()
    assert before_use.get() is None
    for text in (*other, program()):
        assert "optimization_barrier" not in text


class Deep(nn.Module):
    """Wide Dense layers, looped."""

    layers: int = 6

    @nn.compact
    def __call__(self, x):
        for layer in range(self.layers):
            x = nn.gelu(nn.Dense(256, use_bias=False, name=f"layer_{layer}")(x))
        return x


@pytest.mark.parametrize(
    ("method", "most"),
    [(symmetric(bits=4), 1.5), (product(), 3.5)],  # the latter copies its factors
)
def test_streaming_holds_about_one_dense_layer(method, most):
    model, x, layer = Deep(), jnp.ones((1, 8, 256)), 4 * 256 * 256
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    small = jax.eval_shape(lambda p: jc.compress(p, method), params)
    assert temporary(model, contextlib.nullcontext, small, x) > 4 * layer
    assert temporary(model, low_memory, small, x) < most * layer
    each = jax.vmap(applied(model, low_memory), in_axes=(None, 0))
    vmapped = jax.jit(each).lower(small, jnp.ones((4, 8, 256))).compile()
    assert vmapped.memory_analysis().temp_size_in_bytes < most * layer


CODED = {
    "levels": [(".*", jc.rate_distortion(rate=2.0, states=8))],
    "floats": [(".*", "code_floats()")],
    "codes": jc.chain([(".*", "symmetric(bits=8)")], [(".*codes", "entropy_code()")]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CODED)
def test_streaming_decodes_where_a_layer_asks(kind):
    x, layer = jnp.ones((1, 8, 256)), 4 * 256 * 256
    random = np.random.default_rng(0).standard_normal((256, 256)) / 16
    one = jc.compress({"kernel": jnp.asarray(random, jnp.float32)}, CODED[kind])
    few, small = ({f"layer_{i}": one for i in range(n)} for n in (2, 4))
    kept, streamed = (
        temporary(Deep(4), context, small, x) - temporary(Deep(2), context, few, x)
        for context in (contextlib.nullcontext, low_memory)
    )
    assert kept > 1.8 * layer and streamed < layer / 4  # for two layers more
    want = applied(Deep(2))(jc.materialize(few), x)
    np.testing.assert_array_equal(applied(Deep(2))(few, x), want)
    np.testing.assert_array_equal(applied(Deep(2), low_memory)(few, x), want)
    each = jax.vmap(applied(Deep(2), low_memory), in_axes=(None, 0))
    np.testing.assert_allclose(each(few, x[None])[0], want, rtol=1e-5, atol=1e-6)


class Network(nnx.Module):
    """Embedding, a list and a dict of layers, attention, a tied kernel, statistics."""

    def __init__(self, rngs):
        new = hasattr(nnx, "List")
        layers = [nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)]
        named = {"conv": nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs)}
        self.embed = nnx.Embed(ROWS, WIDTH, rngs=rngs)
        self.layers = nnx.List(layers) if new else layers
        self.named = nnx.Dict(named) if new else named
        self.attention = nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False)
        self.tied = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.tied.kernel = self.layers[0].kernel
        self.norm = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = nnx.gelu(layer(x))
        x = self.named["conv"](x) + self.tied(x)
        return self.embed.attend(self.norm(x + self.attention(x)))


@pytest.fixture(scope="module")
def network():
    model = Network(nnx.Rngs(0))
    params = running_nnx.params_of(model)
    kinds = {
        f"attention/{name}/kernel": jc.Layout((), (0,), (1, 2))
        for name in ("query", "key", "value")
    }
    kinds["attention/out/kernel"] = jc.Layout((), (0, 1), (2,))
    kinds["named/conv/kernel"] = jc.Layout((), (0, 1), (2,))
    return model, params, jc.compress(params, [(WEIGHTS, rounded())], layouts=kinds)


@pytest.mark.slow
def test_nnx_model_runs_on_leaves(network):
    model, _, small = network
    assert len(leaves(small)) == 8  # the tied kernel once
    dense_model = running_nnx.with_params(model, jc.materialize(small))
    small_model = running_nnx.with_params(model, small)
    want = dense_model(TOKENS)
    assert np.abs(want - model(TOKENS)).max() > 1e-4
    np.testing.assert_allclose(small_model(TOKENS), want, atol=1e-5)
    jitted = nnx.jit(lambda model, tokens: model(tokens))
    np.testing.assert_allclose(jitted(small_model, TOKENS), want, atol=1e-5)
    definition, state = nnx.split(small_model)
    merged = jax.jit(lambda state, tokens: nnx.merge(definition, state)(tokens))
    np.testing.assert_allclose(merged(state, TOKENS), want, atol=1e-5)
    assert jc.nbytes(nnx.state(small_model, nnx.Param)) == jc.nbytes(small)
    assert isinstance(running_nnx.stored(model.embed.embedding), jax.Array)


def test_nnx_parameters_round_trip(network):
    model, params, small = network
    again = running_nnx.params_of(running_nnx.with_params(model, small))
    assert jax.tree.structure(again) == jax.tree.structure(small)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(a, b)
    small_model = running_nnx.with_params(model, small)
    assert small_model.tied.kernel is small_model.layers[0].kernel
    assert small_model.embed.embedding.shape == (ROWS, WIDTH)
    np.testing.assert_array_equal(
        small_model.embed.embedding[3], small["embed"]["embedding"].materialize()[3]
    )
    back = running_nnx.with_params(small_model, params)
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))


def test_nnx_module_may_be_abstract(network):
    model, _, small = network
    abstract = nnx.eval_shape(lambda: Network(nnx.Rngs(0)))
    abstract.norm = model.norm
    ready = running_nnx.with_params(abstract, small)
    want = running_nnx.with_params(model, small)(TOKENS)
    np.testing.assert_array_equal(ready(TOKENS), want)


def test_nnx_errors_name_the_parameter(network):
    model, params, small = network
    cases = (
        ({**small, "extra": TOKENS}, "^extra: the module has no such parameter"),
        ({k: v for k, v in small.items() if k != "embed"}, "embed/embedding: the tree"),
        ({**params, "embed": {"embedding": TOKENS}}, r"\(2, 6\).*wants \(32, 16\)"),
    )
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            running_nnx.with_params(model, given)

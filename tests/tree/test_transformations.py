"""JAX's transformations see through compressed parameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from models_for_tests import product, rounded

import jaxcompress as jc
from jaxcompress.tree.leaf import is_leaf
from jaxcompress.tree.paths import entries

STACK = {"kernel": jc.Layout((0,), (1,), (2,))}
TRANSPOSED = {"kernel": jc.Layout((0,), (2,), (1,))}
RECIPES = {
    "rounded": ([("kernel", rounded())], STACK),
    "packed": ([("kernel", jc.symmetric(bits=4, block=5))], STACK),
    "reshaped": ([("kernel", jc.symmetric(bits=3, block=8))], TRANSPOSED),
    "nested": (
        jc.chain(
            [("kernel", product())],
            [("kernel/left", jc.symmetric(bits=4)), ("kernel/right", rounded())],
        ),
        STACK,
    ),
    "coded": (
        jc.chain([("kernel", jc.symmetric(bits=8))], [(".*codes", jc.entropy_code())]),
        STACK,
    ),
}
LAYERS = 4


@functools.cache
def compressed(kind):
    """A stack of kernels and biases, the kernels compressed."""
    random = np.random.default_rng(0)
    width = 64 if kind == "coded" else 16  # a stream must pay for its table
    kernel = random.normal(size=(LAYERS, width, width)).astype(np.float32)
    if kind == "coded":
        kernel[:, 1:] = np.where(np.abs(kernel[:, 1:]) > 2.5, 2.5, 0)
    bias = jnp.full((LAYERS, width), 0.1)
    recipe, layout = RECIPES[kind]
    params = {"bias": bias, "kernel": jnp.asarray(kernel / 4)}
    return jc.compress(params, recipe, layouts=layout)


@pytest.fixture
def small(request):
    return compressed(request.param)


every = pytest.mark.parametrize("small", RECIPES, indirect=True)
some = pytest.mark.parametrize("small", ["packed", "nested"], indirect=True)
packed = pytest.mark.parametrize("small", ["packed"], indirect=True)


def batch(small):
    rows = np.random.default_rng(1).normal(size=(6, small["bias"].shape[-1]))
    return jnp.asarray(rows, jnp.float32)


def one_layer(x, layer):
    return jnp.tanh(x @ jc.materialize(layer["kernel"]) + layer["bias"][None])


def forward(small, x):
    """All layers by `lax.scan`, which slices the stored arrays."""
    return jax.lax.scan(lambda x, layer: (one_layer(x, layer), None), x, small)[0]


def expected(small, x):
    """The same in NumPy float64 from the materialized kernels."""
    kernels = np.asarray(small["kernel"].materialize(), np.float64)
    x = np.asarray(x, np.float64)
    for kernel, bias in zip(kernels, np.asarray(small["bias"]), strict=True):
        x = np.tanh(x @ kernel + bias)
    return x


def codes(params):
    """Every array that must not be trained, by name."""
    return {
        entry.name: entry.value
        for entry in entries(params)
        if is_leaf(entry.value) or not jnp.issubdtype(entry.value.dtype, jnp.floating)
    }


@every
def test_jit_and_scan(small):
    assert is_leaf(small["kernel"]) and codes(small)
    x = batch(small)
    got = jax.jit(forward)(small, x)
    np.testing.assert_allclose(got, expected(small, x), atol=1e-5)
    jitted = jax.jit(jc.materialize)(small)
    chex.assert_trees_all_close(jitted, jc.materialize(small), rtol=1e-6)


def test_coded_really_is_coded():
    assert isinstance(compressed("coded")["kernel"].codes, jc.Coded)


@every
def test_vmap_over_the_stack(small):
    x = batch(small)
    each = jax.jit(jax.vmap(one_layer, in_axes=(None, 0)))(x, small)
    kernels = np.asarray(small["kernel"].materialize(), np.float64)
    want = np.tanh(np.asarray(x) @ kernels + 0.1)
    np.testing.assert_allclose(each, want, atol=1e-5)


@every
def test_eval_shape(small):
    abstract = jax.eval_shape(lambda p: p, small)
    kernel = abstract["kernel"]
    assert kernel.shape == small["kernel"].shape
    assert kernel.dtype == small["kernel"].dtype
    assert jc.nbytes(abstract) == jc.nbytes(small)
    shapes = jax.eval_shape(jc.materialize, small)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, jc.materialize(small))


@every
def test_partition_and_combine(small):
    trainable, frozen = jc.partition(small)
    chex.assert_trees_all_equal(jc.combine(trainable, frozen), small)
    for x in jax.tree.leaves(trainable):
        assert jnp.issubdtype(x.dtype, jnp.floating)
    total = len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen))
    assert total == len(jax.tree.leaves(small)) and jax.tree.leaves(frozen)
    frozen_names = [
        jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(frozen)
    ]
    assert not any("scale" in name or "bias" in name for name in frozen_names)


def test_only_named_arrays_train():
    tree = compressed("packed")
    trainable, frozen = jc.partition(tree, "kernel/scale")
    (only,) = jax.tree.leaves(trainable)
    assert only is tree["kernel"].scale
    assert frozen["bias"] is tree["bias"]
    chex.assert_trees_all_equal(jc.combine(trainable, frozen), tree)
    for pattern in ("scales", "kernel/codes"):
        with pytest.raises(ValueError, match=r"no floating-point array; .*kernel/"):
            jc.partition(tree, pattern)


@jc.leaf
class Exact(jc.Leaf):
    """Two halves of an array: what a lossless leaf may hold."""

    top: jax.Array
    bottom: jax.Array

    lossless = True

    def materialize(self):
        return jnp.concatenate([self.top, self.bottom], axis=-2)


def test_lossless_leaves_are_frozen_whole():
    tree = {"scale": Exact(jnp.ones((2, 3)), jnp.zeros((1, 3)))}
    trainable, frozen = jc.partition(tree)
    assert not jax.tree.leaves(trainable)
    chex.assert_trees_all_equal(jc.combine(trainable, frozen), tree)


@packed
def test_grad_with_respect_to_scales(small):
    x = batch(small)
    trainable, frozen = jc.partition(small)

    @jax.jit
    def loss(trainable):
        return jnp.square(forward(jc.combine(trainable, frozen), x)).mean()

    gradient = jax.grad(loss)(trainable)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, trainable)
    # A scale stretches its block: d loss / d scale = <d loss / d kernel, codes>.
    dense = jax.grad(lambda p: jnp.square(forward(p, x)).mean())(jc.materialize(small))
    scale = np.asarray(small["kernel"].scale, np.float32)  # [layers, blocks, outputs]
    spread = np.repeat(scale, 5, axis=1)[:, :16]
    units = np.asarray(small["kernel"].materialize()) / spread
    product = np.asarray(dense["kernel"]) * units
    product = np.pad(product, ((0, 0), (0, 4), (0, 0))).reshape(LAYERS, 4, 5, 16)
    got = np.asarray(gradient["kernel"].scale, np.float32)
    np.testing.assert_allclose(got, product.sum(2), rtol=0.02, atol=2e-4)
    np.testing.assert_allclose(gradient["bias"], dense["bias"], rtol=1e-4, atol=1e-6)


@packed
def test_gradients_refuse_integers(small):
    with pytest.raises(TypeError, match="grad requires"):
        jax.grad(lambda p: forward(p, batch(small)).sum())(small)


@every
def test_adamw_with_decay_leaves_codes_alone(small):
    optimizer = optax.adamw(1e-3, weight_decay=0.1)
    trainable, frozen = jc.partition(small)
    before = small["kernel"].materialize()

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return jc.combine(trainable, frozen)["kernel"].materialize().sum()

        updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable, _ = step(*step(trainable, optimizer.init(trainable)))
    trained = jc.combine(trainable, frozen)
    assert codes(small)
    chex.assert_trees_all_equal(codes(trained), codes(small))
    assert trained["kernel"].materialize().sum() < before.sum() - 0.01


@some
def test_pmap_over_layers(small):
    x = batch(small)
    pairs = jax.tree.map(lambda a: a.reshape(2, LAYERS // 2, *a.shape[1:]), small)
    got = jax.pmap(forward, in_axes=(0, None))(pairs, x)
    for half in range(2):
        part = jax.tree.map(lambda a, half=half: a[half], pairs)
        np.testing.assert_allclose(got[half], expected(part, x), atol=1e-5)


def mesh():
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))


@some
def test_shard_map_over_examples_and_over_layers(small):
    x, devices = batch(small), mesh()
    spec = PartitionSpec("data")
    for specs, function, want in (
        ((PartitionSpec(), spec), forward, expected(small, x)),
        (
            (spec, PartitionSpec()),
            lambda small, x: jax.vmap(one_layer, in_axes=(None, 0))(x, small),
            np.stack(
                [
                    one_layer(x, jax.tree.map(lambda a, i=i: a[i], small))
                    for i in range(LAYERS)
                ]
            ),
        ),
    ):
        split = jax.shard_map(
            function, mesh=devices, in_specs=specs, out_specs=spec, check_vma=False
        )
        np.testing.assert_allclose(jax.jit(split)(small, x), want, atol=1e-5)


@every
def test_sharded_parameters_give_the_same(small):
    x = batch(small)
    sharding = NamedSharding(mesh(), PartitionSpec("data"))
    split = jax.device_put(small, sharding)
    held = jax.tree.leaves(split)
    assert all(len(a.sharding.device_set) == 2 for a in held)
    assert held[0].addressable_shards[0].data.shape[0] == LAYERS // 2
    got = jax.jit(forward)(split, x)
    np.testing.assert_allclose(got, expected(small, x), atol=1e-5)


def test_a_sharded_weight_is_compressed_where_it_lies():
    random = np.random.default_rng(2)
    kernel = jnp.asarray(random.normal(size=(64, 64)), jnp.float32)
    sharding = NamedSharding(mesh(), PartitionSpec(None, "data"))
    recipe = [("kernel", jc.symmetric(bits=4, block=16))]
    split = jc.compress({"kernel": jax.device_put(kernel, sharding)}, recipe)
    whole = jc.compress({"kernel": kernel}, recipe)
    chex.assert_trees_all_equal(jax.device_get(split), jax.device_get(whole))
    packed = split["kernel"].codes.packed
    assert packed.addressable_shards[0].data.shape[-1] == 32

"""What every method owes, whatever it does: a new one joins with a line in METHODS."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.storage import load, save
from jaxcompress.tree.methods import parse, traits

# Stages of a chain stand between ">".
METHODS = [
    "symmetric(bits=4, block=16)",
    "symmetric(bits=2, block=25, full_range=True, search=True)",
    "symmetric(bits=1, block='tensor')",
    "asymmetric(bits=3, block=25)",
    "sign_split(bits=(3, 3))",
    "learned(bits=3, block=16, steps=10)",
    "hqq(bits=3, block=25, steps=3)",
    "nf4(block=16)",
    "fp8(kind='e5m2')",
    "mxfp4(search=True)",
    "nvfp4()",
    "mixed_channels(bits=3, channels=4, fine_bits=8, block=16)",
    "sign_split(bits=(3, 3)) > entropy_code()",
    "rate_distortion(rate=3, states=8)",
    "rate_distortion(rate=3, states=0, order='natural')",
    "outliers(fraction=0.02)",
    "svd(rank=40)",
    "corrected(base='symmetric(bits=3, block=16)', rank=8)",
    "tucker(ranks=(48, 8, 10), sizes=(64, 8, 12), sweeps=2)",
    "magnitude(nm='2:4')",
    "magnitude(threshold=0.02)",
    "magnitude(sparsity=0.25) > symmetric(bits=4, block=16) > entropy_code()",
    "code_floats()",
    "asymmetric(bits=3, block=16) > entropy_code() > code_floats()",
]


def is_traceable(method):
    return all(traits(parse(stage)).traceable for stage in method.split(">"))


TRACEABLE = [method for method in METHODS if is_traceable(method)]
every = pytest.mark.parametrize("method", METHODS)
traceable = pytest.mark.parametrize("method", TRACEABLE)

FEATURES, HIDDEN, LAYERS = 64, 96, 2
TOKENS = jnp.arange(10).reshape(2, 5) * 9
STACK = jc.Layout((0,), (1,), (2,))
SCANNED = {"layers/up/kernel": STACK}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + y[..., :FEATURES] * y[..., -FEATURES:], None


class Model(nn.Module):
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(HIDDEN, FEATURES, name="embed")
        x = embed(tokens)
        if self.scanned:
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = layers(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = Layer(name=f"layer_{i}")(x)
        return embed.attend(x)


@functools.cache
def parameters(scanned=False, dtype="float32"):
    """NumPy arrays, so that a method that writes into its input is seen."""
    params = jax.jit(Model(scanned).init)(jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda x: np.array(x.astype(dtype)), params)


def apply(method, params, scanned=False):
    recipe = jc.chain(*(stage.strip() for stage in method.split(">")))
    return jc.compress(params, recipe, layouts=SCANNED if scanned else None)


@functools.cache
def compressed(method, scanned=False, dtype="float32"):
    return apply(method, parameters(scanned, dtype), scanned)


@functools.cache
def dense(method, scanned=False, dtype="float32"):
    return materialize(compressed(method, scanned, dtype))


materialize = jax.jit(jc.materialize)
run = {scanned: jax.jit(Model(scanned).apply) for scanned in (False, True)}


def contents(tree):
    """Structure, dtypes, shapes and bytes of all arrays."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(x) for x in leaves]
    return structure, [(x.dtype, x.shape, x.tobytes()) for x in arrays]


def check_same(a, b, original):
    """Equal, but for weights that lie within 1e-5 of a step from a tie."""
    for x, y, weight in zip(*map(jax.tree.leaves, (a, b, original)), strict=True):
        x, y, weight = (np.asarray(v, np.float64) for v in (x, y, weight))
        noise = 1e-6 * np.abs(weight).max()
        other = np.abs(x - y) > noise
        tie = np.abs(np.abs(x - weight) - np.abs(y - weight))
        assert np.all(tie[other] <= 2e-5 * np.abs(x - y)[other] + noise)
        assert other.mean() < 0.01


@traceable
def test_jit_equals_eager(method):
    params = parameters()
    f, weight = parse(method), params["layer_0"]["up"]["kernel"]
    inside = jax.jit(lambda x: f(x).materialize())(weight)
    # Before jax 0.8 disable_jit mixes up executables of float64 and float32.
    old = not hasattr(jax, "enable_x64")
    with contextlib.nullcontext() if old else jax.disable_jit():
        outside = f(jnp.asarray(weight)).materialize()
    check_same(inside, outside, weight)
    check_same(dense(method)["layer_0"]["up"]["kernel"], outside, weight)


@traceable
def test_eval_shape_equals_the_result(method):
    abstract = jax.eval_shape(lambda params: apply(method, params), parameters())
    result = compressed(method)
    assert jax.tree.structure(abstract) == jax.tree.structure(result)
    for a, b in zip(*map(jax.tree.leaves, (abstract, result)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert jc.nbytes(abstract) == jc.nbytes(result)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_materialize_restores_structure_shapes_and_dtypes(method, dtype):
    params, back = parameters(dtype=dtype), dense(method, dtype=dtype)
    assert jax.tree.structure(params) == jax.tree.structure(back)
    is_leaf = lambda x: isinstance(x, jc.Leaf)  # noqa: E731
    leaves = jax.tree.leaves(compressed(method, dtype=dtype), is_leaf=is_leaf)
    assert any(map(is_leaf, leaves))
    pairs = zip(*map(jax.tree.leaves, (params, back)), leaves, strict=True)
    for weight, restored, leaf in pairs:
        assert weight.shape == restored.shape == leaf.shape
        assert weight.dtype == restored.dtype == leaf.dtype
        wide = np.asarray(weight, np.float32)
        error = np.linalg.norm(np.asarray(restored, np.float32) - wide)
        assert error <= 0.8 * np.linalg.norm(wide)


@every
def test_the_input_is_untouched_and_the_rest_identical(method):
    params = jax.tree.map(np.copy, parameters())
    small = apply(method, params)
    for old, before in zip(*map(jax.tree.leaves, (params, parameters())), strict=True):
        np.testing.assert_array_equal(old, before)
    first = jc.compress(params, [("layer_0/up/kernel", method.split(" >")[0])])
    for name in ("embed", "layer_1"):
        assert all(
            new is old
            for new, old in zip(
                *map(jax.tree.leaves, (first[name], params[name])), strict=True
            )
        )
    assert isinstance(small["layer_0"]["up"]["kernel"], jc.Leaf)
    assert isinstance(first["layer_0"]["up"]["kernel"], jc.Leaf)


@traceable
def test_traced_once_for_equal_shapes(method):
    shapes = []
    partial = parse(method)

    def counted(x, moments=None, **options):
        shapes.append(x.shape)
        return partial.func(x, moments, **options)

    counted.traits = traits(partial)
    params = parameters()
    for _ in range(2):
        jc.compress(params, functools.partial(counted, **partial.keywords))
    assert shapes == [(FEATURES, HIDDEN)]  # of two kernels and the embedding, twice


@traceable
def test_a_stack_equals_its_slices_one_by_one(method):
    f = parse(method)
    stack = parameters(scanned=True)["layers"]["up"]["kernel"]
    single = [materialize(f(jnp.asarray(matrix))) for matrix in stack]
    vmapped = jax.jit(jax.vmap(f))(stack)
    whole = f(jnp.asarray(stack))
    assert jax.tree.structure(vmapped) == jax.tree.structure(whole)
    for a, b in zip(*map(jax.tree.leaves, (vmapped, whole)), strict=True):
        assert a.shape == b.shape and a.shape[0] == LAYERS
    one = jax.tree.map(lambda x: x[1], whole)
    assert one.shape == stack.shape[1:]
    check_same(materialize(one), single[1], stack[1])
    check_same(list(materialize(vmapped)), single, list(stack))
    check_same(list(materialize(whole)), single, list(stack))


@every
def test_the_same_bytes_twice(method):
    assert contents(apply(method, parameters())) == contents(compressed(method))


@every
@pytest.mark.parametrize("scanned", [False, True])
def test_saved_and_loaded_bit_for_bit(method, scanned, tmp_path):
    small = compressed(method, scanned)
    save(tmp_path / "small.safetensors", small)
    assert contents(load(tmp_path / "small.safetensors")) == contents(small)


@every
@pytest.mark.parametrize("scanned", [False, True])
def test_an_unmodified_model_runs_on_it(method, scanned):
    small = run[scanned]({"params": compressed(method, scanned)}, TOKENS)
    expected = run[scanned]({"params": dense(method, scanned)}, TOKENS)
    np.testing.assert_allclose(small, expected, rtol=1e-5, atol=1e-5)


@every
def test_a_parameter_sharded_over_two_devices_gives_the_same(method):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    params = parameters()
    sharded = jax.tree.map(jnp.asarray, params)
    for layer, axes in enumerate([(None, "d"), ("d", None)]):
        part = sharded[f"layer_{layer}"]["up"]
        where = NamedSharding(mesh, PartitionSpec(*axes))
        part["kernel"] = jax.device_put(part["kernel"], where)
        assert len(part["kernel"].sharding.device_set) == 2
    small = apply(method, sharded)
    plain = compressed(method)
    for a, b in zip(*map(jax.tree.leaves, (small, plain)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    check_same(materialize(small), dense(method), params)


def test_lossless_stages_change_no_bit():
    assert contents(dense("code_floats()")) == contents(parameters())
    coded = contents(dense("sign_split(bits=(3, 3)) > entropy_code()"))
    assert coded == contents(dense("sign_split(bits=(3, 3))"))

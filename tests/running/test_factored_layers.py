"""Layers of every kind multiply by the factors of their weights."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_for_tests import TOKENS
from running.factors import (
    applied,
    core,
    flops,
    materialize,
    random,
    shapes_in,
    terms,
    thin,
)

import jaxcompress as jc
from jaxcompress.tree.leaf import Arithmetic

# Single layers


def check_layer(model, x, recipe, *, layout=None, whole=False, atol=1e-5):
    """By parts as by the array, which is made only if `whole`."""
    x = jnp.asarray(x)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(random(*x.shape), x.dtype), params)
    layout = layout or jc.find_layouts(model, params, x)
    small = jc.compress(params, [("kernel", recipe)], layouts=layout)
    dense = materialize(small)
    want, got = applied(model)(dense, x), applied(model, jc.compressed_matmul)(small, x)
    assert want.shape == got.shape and want.dtype == got.dtype
    a, b = (np.asarray(y, np.float64) for y in (want, got))
    np.testing.assert_allclose(b, a, atol=atol * np.abs(a).max())
    made = shapes_in(applied(model, jc.compressed_matmul), small, x)
    assert (dense["kernel"].shape in made) == whole
    return small


@pytest.mark.parametrize(
    "equation, shape, x",
    [
        ("btd,df->btf", (8, 24), (2, 3, 8)),
        ("...d,df->...f", (8, 24), (2, 3, 8)),
        ("bd,fd->bf", (24, 8), (5, 8)),
        ("abc,cde->abde", (8, 4, 6), (2, 3, 8)),
        ("abc,cde->eabd", (8, 4, 6), (2, 3, 8)),
        ("cab,dce->abed", (4, 8, 6), (8, 2, 3)),
        ("xhd,dhf->fx", (4, 2, 24), (5, 2, 4)),
    ],
)
def test_einsums(equation, shape, x):
    right = equation.split(",")[1].split("->")[0]
    inputs = tuple(i for i, c in enumerate(right) if c in equation.split(",")[0])
    outputs = tuple(i for i in range(len(right)) if i not in inputs)
    layout = {"kernel": jc.Layout((), inputs, outputs)}
    check_layer(nn.Einsum(shape, equation), random(*x), thin(3), layout=layout)


@pytest.mark.parametrize(
    "equation, shape, x, stack",
    [
        ("bhd,hdf->bhf", (3, 8, 12), (5, 3, 8), (0,)),  # a batch axis
        ("bhd,df->bf", (8, 12), (5, 3, 8), ()),  # an axis of the inputs is summed
    ],
)
def test_other_einsums_use_the_array(equation, shape, x, stack):
    count = len(stack)
    layout = {"kernel": jc.Layout(stack, (count,), (count + 1,))}
    model = nn.Einsum(shape, equation, use_bias=False)
    check_layer(model, random(*x), thin(3), layout=layout, whole=True)


@pytest.mark.parametrize("axis", [-1, 1, (1, -1), (-1, 1), (-2, -1)])
def test_dense_general(axis):
    model = nn.DenseGeneral((4, 6), axis=axis)
    check_layer(model, random(2, 3, 5, 4), thin(2))


def test_dense_general_with_batch_axes_uses_the_array():
    model = nn.DenseGeneral(12, batch_dims=(0,))
    x = random(3, 5, 8)
    check_layer(
        model,
        x,
        thin(3),
        layout={"kernel": jc.Layout((0,), (1,), (2,))},
        whole=True,
    )


WINDOW = {"kernel": jc.Layout((), (0, 1, 2), (3,))}
CONVOLUTIONS = {
    "low_rank": thin(3),
    "tucker": core((None, None, 3, 4), (3, 3, 6, 8)),
    "tucker_all": core((2, 2, 3, 4), (3, 3, 6, 8)),
    "cp": terms(4, (3, 3, 6, 8)),
}


@pytest.mark.parametrize("method", CONVOLUTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": 2, "padding": "VALID"},
        {"padding": "CIRCULAR", "kernel_dilation": 2, "use_bias": False},
        {"input_dilation": 2, "padding": ((1, 0), (2, 1))},
    ],
    ids=["plain", "strides", "circular", "transposed"],
)
def test_convolutions(method, options):
    model, x = nn.Conv(8, (3, 3), **options), random(2, 7, 6, 6)
    check_layer(model, x, CONVOLUTIONS[method], layout=WINDOW)


def test_convolutions_of_one_example_and_of_other_axes():
    layout, model = WINDOW, nn.Conv(8, (3, 3))
    check_layer(model, random(2, 2, 7, 6, 6), CONVOLUTIONS["cp"], layout=layout)
    # the window is not what the tensor's axes are
    other = terms(4, (9, 6, 8))
    check_layer(model, random(2, 7, 6, 6), other, layout=layout, whole=True)
    other = core((3, 3, 4), (9, 6, 8))
    check_layer(model, random(2, 7, 6, 6), other, layout=layout, whole=True)


def test_grouped_and_masked_convolutions_use_the_array():
    layout = {"kernel": jc.Layout((), (0, 1), (2,))}
    for model in (
        nn.Conv(8, (3,), feature_group_count=2),
        nn.Conv(8, (3,), mask=jnp.tril(jnp.ones((6, 8)))[None] * jnp.ones((3, 1, 1))),
    ):
        check_layer(
            model,
            random(2, 7, 12 if model.mask is None else 6),
            thin(2),
            layout=layout,
            whole=True,
        )


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "layer",
    [
        lambda **k: nn.Dense(32, **k),
        lambda **k: nn.Conv(32, (3,), **k),
    ],
    ids=["dense", "conv"],
)
def test_dtypes_are_those_of_the_layer(layer, dtype, param_dtype):
    x = jnp.asarray(random(4, 5, 24), param_dtype)
    model = layer(dtype=dtype, param_dtype=param_dtype)
    low = dtype is not None or param_dtype == jnp.bfloat16
    check_layer(model, x, thin(4), atol=2e-2 if low else 1e-5)


def test_the_precision_of_the_layer_is_that_of_every_product():
    x = jnp.asarray(random(4, 24))
    for precision, times in ((None, 0), (jax.lax.Precision.HIGHEST, 2)):
        model = nn.Dense(32, precision=precision)
        params = model.init(jax.random.key(0), x)["params"]
        small = jc.compress(params, [("kernel", thin(4))])
        program = str(jax.make_jaxpr(applied(model, jc.compressed_matmul))(small, x))
        assert program.count("Precision.HIGHEST") // 2 == times


class Twice(nn.Dense):
    """A subclass that changes what its parent does."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_subclasses_and_own_products_run_as_they_are():
    def doubled(*args, **options):
        return 2 * jax.lax.dot_general(*args, **options)

    for model in (Twice(32), nn.Dense(32, dot_general=doubled)):
        check_layer(model, random(4, 24), thin(4), whole=True)


def test_wrong_shapes_get_flax_s_error():
    x = jnp.asarray(random(4, 24))
    for model in (nn.Dense(32), nn.Conv(32, (3,)), nn.DenseGeneral(32)):
        params = model.init(jax.random.key(0), x)["params"]
        small = jc.compress(
            params,
            [("kernel", thin(4))],
            layouts={}
            if x.ndim == params["kernel"].ndim
            else {"kernel": jc.Layout((), (0, 1), (2,))},
        )
        with jc.compressed_matmul(), pytest.raises(Exception, match=r"[Ss]hape"):
            model.apply({"params": small}, jnp.ones((4, 12)))


def test_a_tied_embedding_is_attended_to_by_its_factors():
    model, query = nn.Embed(48, 24), jnp.asarray(random(4, 24))
    params = model.init(jax.random.key(0), TOKENS)["params"]
    small = jc.compress(params, [("embedding", thin(4))])

    def attend(context):
        def run(params, query):
            with context():
                return model.apply({"params": params}, query, method="attend")

        return jax.jit(run)

    want = attend(contextlib.nullcontext)(materialize(small), query)
    np.testing.assert_allclose(
        attend(jc.compressed_matmul)(small, query), want, atol=1e-5
    )
    least = flops(attend(contextlib.nullcontext), materialize(small), query)
    assert flops(attend(jc.compressed_matmul), small, query) < 0.5 * least


# What is cheaper


def test_the_quarter_of_a_rank_takes_half_the_operations():
    model, x = (
        nn.Dense(2048, use_bias=False),
        jax.ShapeDtypeStruct((64, 2048), "float32"),
    )
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    small = jax.eval_shape(lambda p: jc.compress(p, "svd(rank=512)"), params)
    dense, quick = (
        flops(applied(model), params, x),
        flops(applied(model, jc.compressed_matmul), small, x),
    )
    assert 0.45 < quick / dense < 0.55


def test_the_cheaper_of_factors_and_array_is_taken():
    model = nn.Dense(40, use_bias=False)
    params = model.init(jax.random.key(0), random(1, 24))["params"]
    for rank, rows, whole in ((4, 500, False), (20, 500, True), (20, 2, False)):
        small = jc.compress(params, [("kernel", thin(rank))])
        x = random(rows, 24)
        made = shapes_in(applied(model, jc.compressed_matmul), small, x)
        assert ((24, 40) in made) == whole, (rank, rows)
        leaf = small["kernel"]
        apart, dense = rows * rank * (24 + 40), 24 * 40 * (rows + rank)
        assert leaf.product_cost(rows) == min(apart, dense)
        want = applied(model)(materialize(small), x)
        np.testing.assert_allclose(
            applied(model, jc.compressed_matmul)(small, x), want, atol=1e-5
        )


@pytest.mark.parametrize("rows, apart", [(3, True), (200, False)])
def test_sums_multiply_apart_what_is_thin(rows, apart):
    x = random(rows, 24)
    weight = random(24, 40, seed=1)
    coarse = jc.symmetric(weight, bits=3)
    rest = weight - coarse.materialize()
    leaf = jc.Sum((coarse, thin(3)(rest), 0.1 * rest))
    product = jax.jit(lambda x, leaf: leaf.contract(x, Arithmetic()))
    np.testing.assert_allclose(product(x, leaf), x @ leaf.materialize(), atol=1e-4)
    assert ((rows, 3) in shapes_in(product, x, leaf)) == apart
    built, multiplied = 24 * 3 * 40, rows * 24 * 40
    assert leaf.product_cost(rows) == multiplied + min(built, rows * 3 * (24 + 40))
    assert leaf.dense_cost() == built


def test_a_sum_of_thin_terms_only():
    weight, x = random(24, 40), random(3, 24)
    leaf = jc.Sum((thin(3)(weight), thin(2)(weight)))
    product = jax.jit(lambda x, leaf: leaf.contract(x, Arithmetic()))
    np.testing.assert_allclose(product(x, leaf), x @ leaf.materialize(), atol=1e-4)
    assert (24, 40) not in shapes_in(product, x, leaf)
    assert leaf.product_cost(3) == 3 * 5 * (24 + 40)

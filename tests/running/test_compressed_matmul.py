"""Layers of unmodified models multiply by what compressed weights store."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_for_tests import TOKENS, WIDTH, Ensemble, language, layouts

import jaxcompress as jc
from jaxcompress.quantization import integer_matmul
from jaxcompress.tree.leaf import Arithmetic


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small_random(*shape, seed):
    return jnp.asarray(random(*shape, seed=seed) / np.sqrt(shape[-1]))


# Methods that fit nothing: leaves of random factors, in the place of any weight.


def thin(rank):
    def method(x, moments=None):
        *stack, inputs, outputs = x.shape
        left = small_random(*stack, inputs, rank, seed=1)
        return jc.LowRank(left, small_random(*stack, rank, outputs, seed=2))

    return method


def split(sizes, inputs):
    """How many axes multiply to the inputs."""
    return next(i for i in range(len(sizes)) if np.prod(sizes[:i]) == inputs)


def terms(rank, sizes):
    def method(x, moments=None):
        factors = (small_random(n, rank, seed=i) for i, n in enumerate(sizes))
        return jc.CP(tuple(factors), split(sizes, x.shape[0]))

    return method


def core(ranks, sizes):
    def method(x, moments=None):
        factors = tuple(
            None if rank is None else small_random(size, rank, seed=i)
            for i, (rank, size) in enumerate(zip(ranks, sizes, strict=True))
        )
        kept = (r or n for r, n in zip(ranks, sizes, strict=True))
        return jc.Tucker(small_random(*kept, seed=9), factors, split(sizes, x.shape[0]))

    return method


FACTORS = [
    (".*(query|key|value)/kernel", core((6, None, 4), (16, 2, 8))),
    (".*out/kernel", terms(4, (2, 8, 16))),
    (".*split/kernel", terms(4, (16, 2, 8))),
    (".*join/kernel", core((1, 4, 6), (2, 8, 16))),
    (".*(kernel|embedding)", thin(4)),
]


def with_biases(params):
    """Biases as they are after training: not zero."""

    def change(path, x):
        is_bias = getattr(path[-1], "key", None) == "bias"
        return x + random(*x.shape, seed=len(path)) if is_bias else x

    return jax.tree_util.tree_map_with_path(change, params)


def applied(model, context=contextlib.nullcontext, **options):
    """`model.apply` of parameters, jitted anew."""

    @jax.jit
    def apply(params, x):
        with context(**options):
            return model.apply({"params": params}, x)

    return apply


def flops(function, *arguments):
    return function.lower(*arguments).compile().cost_analysis()["flops"]


def shapes_in(function, *arguments):
    """Shapes of all arrays that the program makes, inner programs included."""
    found = set()

    def read(jaxpr):
        for eqn in jaxpr.eqns:
            found.update(v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape"))
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    read(inner)

    read(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


# Whole models


@functools.cache
def factorized(kind):
    """The model, and factors of every kernel and embedding; the same for every kind."""
    model, params = language(kind)
    if kind != "loop":
        params = factorized("loop")[1]
    else:
        params = jc.compress(with_biases(params), FACTORS, layouts=layouts(params))
    if "scan" in kind:
        params = dict(params)
        blocks = [params.pop(f"block_{i}") for i in range(2)]
        params["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    return model, params


materialize = jax.jit(jc.materialize)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loop", "scan", "remat", "scan_remat"])
def test_a_model_multiplies_by_factors(kind):
    model, small = factorized(kind)
    dense = materialize(small)
    quick = applied(model, jc.compressed_matmul)
    plain = applied(model).lower(dense, TOKENS).compile()
    parts = quick.lower(small, TOKENS).compile()
    want = plain(dense, TOKENS)
    np.testing.assert_allclose(parts(small, TOKENS), want, atol=1e-5)
    operations = parts.cost_analysis()["flops"]
    assert operations < 0.75 * plain.cost_analysis()["flops"]
    made = shapes_in(quick, small, TOKENS)
    kernels = {
        x.shape[1:] if path[0].key == "blocks" else x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(dense)
        if path[-1].key == "kernel"
    }
    kernels -= {(WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)}  # the embedding's: Flax asks
    assert len(kernels) == 4 and not made & kernels
    assert made & {(3, WIDTH, 4)}  # the convolution's left factor


def test_vmapped_modules_and_examples():
    model, x = Ensemble(), random(4, WIDTH)
    params = with_biases(model.init(jax.random.key(0), x)["params"])
    small = jc.compress(params, [(".*kernel", thin(4))], layouts=layouts(params))
    want = applied(model)(materialize(small), x)
    np.testing.assert_allclose(
        applied(model, jc.compressed_matmul)(small, x), want, atol=1e-5
    )
    each = jax.jit(jax.vmap(applied(model, jc.compressed_matmul), in_axes=(None, 0)))
    np.testing.assert_allclose(each(small, x), want, atol=1e-5)
    assert (3, WIDTH, WIDTH) not in shapes_in(each, small, x)


class Few(nn.Module):
    """One layer of each kind."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Conv)(WIDTH, (3,), name="conv")(x)
        x = nn.gelu(nn.DenseGeneral((2, 8), name="split")(x))
        x = nn.DenseGeneral(WIDTH, axis=(-2, -1), name="join")(x)
        return nn.Einsum((WIDTH, 2 * WIDTH), "btd,df->btf", name="up")(x)


def test_gradients_are_those_of_the_array():
    model, x = Few(), random(2, 6, WIDTH)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: jnp.asarray(random(*p.shape)), params)
    recipe = [
        rule for rule in FACTORS if "query" not in rule[0] and "out" not in rule[0]
    ]
    recipe[-1] = (".*kernel", thin(4))
    small = jc.compress(params, recipe, layouts=layouts(params))

    def loss(params, context):
        with context():
            return jnp.square(model.apply({"params": params}, x)).mean()

    plain, quick = (
        jax.jit(jax.grad(loss), static_argnums=1)(small, context)
        for context in (contextlib.nullcontext, jc.compressed_matmul)
    )
    plain, quick = (jax.tree.leaves(tree) for tree in (plain, quick))
    largest = max(np.abs(a).max() for a in plain)
    assert largest > 1e-3
    for a, b in zip(plain, quick, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * largest)


@pytest.mark.slow
def test_factors_may_be_compressed_too():
    model, params = factorized("loop")
    inside = [(r".*/(left|right|factors/\d|core)", "symmetric(bits=8)")]
    small = jc.compress(params, inside)
    assert "block_0/up/kernel/left/codes" in jc.leaf_names(small)
    want = applied(model)(materialize(small), TOKENS)
    quick = applied(model, jc.compressed_matmul)
    np.testing.assert_allclose(quick(small, TOKENS), want, atol=1e-5)
    assert (2, WIDTH // 2, WIDTH) not in shapes_in(quick, small, TOKENS)


def test_eager_and_uncompressed_models_run_as_ever():
    model, x = nn.Sequential([nn.Dense(32), nn.Dense(24)]), random(4, 24)
    params = model.init(jax.random.key(0), x)["params"]
    small = jc.compress(params, [(".*kernel", thin(4))])
    with jc.compressed_matmul():
        got = model.apply({"params": params}, x)
        again = model.init(jax.random.key(0), x)["params"]
        quick = model.apply({"params": small}, x)
    np.testing.assert_array_equal(got, model.apply({"params": params}, x))
    for a, b in zip(*map(jax.tree.leaves, (again, params)), strict=True):
        np.testing.assert_array_equal(a, b)
    want = model.apply({"params": materialize(small)}, x)
    np.testing.assert_allclose(quick, want, atol=1e-5)


def test_it_ends_with_its_context():
    model, x = nn.Dense(32), random(4, 24)
    params = model.init(jax.random.key(0), x)["params"]
    small = jc.compress(params, [("kernel", thin(4))])
    with jc.compressed_matmul():
        assert (24, 32) not in shapes_in(applied(model), small, x)
    assert (24, 32) in shapes_in(applied(model), small, x)


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


# Integers


def oracle(x, leaf):
    """Inputs rounded per row, codes summed as whole numbers, one weight at a time."""
    half = 2 ** (leaf.bits - 1)
    codes = np.asarray(leaf.codes.materialize()).astype(object)
    scale = np.broadcast_to(np.asarray(leaf.scale, np.float64), (1, codes.shape[1]))
    zero = np.full((1, codes.shape[1]), half)
    if leaf.zero_point is not None:
        given = leaf.zero_point
        given = given.materialize() if isinstance(given, jc.Leaf) else given
        zero = np.broadcast_to(np.asarray(given, np.int64), zero.shape)
    result = np.zeros((len(x), codes.shape[1]))
    for i, row in enumerate(np.asarray(x, np.float32)):
        step = np.float32(max(abs(row)) / np.float32(127)) or np.float32(1)
        whole = [round(float(v / step)) for v in row]
        for j in range(codes.shape[1]):
            terms = (
                a * (int(c) - int(zero[0, j]))
                for a, c in zip(whole, codes[:, j], strict=True)
            )
            result[i, j] = sum(terms) * float(step) * scale[0, j]
    return result


@pytest.mark.parametrize(
    "method",
    [
        "symmetric(bits=8)",
        "symmetric(bits=5, full_range=True)",
        "symmetric(bits=2, block='tensor')",
        "asymmetric(bits=8)",
        "asymmetric(bits=4, block='tensor')",
        "symmetric(bits=4, block=24)",
    ],
)
def test_integer_products_are_what_the_definition_says(method):
    model, x = nn.Dense(12), random(5, 24)
    x[2] = 0
    x[3] *= 1000
    params = with_biases(model.init(jax.random.key(0), x)["params"])
    params["kernel"] = random(24, 12, seed=3) + 0.3
    small = jc.compress(params, [("kernel", method)])
    got = applied(model, jc.compressed_matmul, activations="int8")(small, x)
    bias = np.asarray(small["bias"], np.float64)
    np.testing.assert_allclose(
        got, oracle(x, small["kernel"]) + bias, rtol=2e-6, atol=1e-5
    )
    exact = np.asarray(applied(model, jc.compressed_matmul)(small, x))
    assert 0 < np.abs(got - exact).max() < 0.02 * np.abs(exact).max()
    program = str(
        jax.make_jaxpr(applied(model, jc.compressed_matmul, activations="int8"))(
            small, x
        )
    )
    assert "i32[5,12] = dot_general" in program
    assert "i8[24,12]" in program and "f32[24,12]" not in program


def test_accelerators_multiply_the_same_integers_in_bfloat16():
    """An H200 summed 8-bit integers wrongly."""
    x = jnp.asarray(random(5, 200))
    rounded, _ = integer_matmul.round_rows(x)
    for zero in (None, jnp.arange(12)[None] - 6):
        small = jc.symmetric(jnp.asarray(random(200, 12, seed=3)), bits=8)
        given = rounded, small.codes, zero, 128
        exact = integer_matmul._in_integers(*given)
        np.testing.assert_array_equal(integer_matmul._in_floats(*given), exact)

    run = jax.jit(integer_matmul.integer_product)
    for platform, inside in (("cpu", "i8"), ("cuda", "bf16"), ("tpu", "bf16")):
        program = run.trace(x, small).lower(lowering_platforms=(platform,)).as_text()
        (product,) = [line for line in program.splitlines() if "dot_general" in line]
        assert f"(tensor<5x200x{inside}>, tensor<200x12x{inside}>)" in product


@pytest.mark.parametrize(
    "method",
    [
        "symmetric(bits=4, block=8)",
        "asymmetric(bits=4, block=16)",
        "symmetric(bits=1)",
        "sign_split(bits=(3, 3))",
        "nf4(block=None)",
        "fp8()",
        "mixed_channels(bits=4, channels=2)",
    ],
)
def test_other_codes_are_dequantized(method):
    model, x = nn.Dense(12), random(5, 24)
    params = model.init(jax.random.key(0), x)["params"]
    small = jc.compress(params, [("kernel", method)])
    got = applied(model, jc.compressed_matmul, activations="int8")(small, x)
    want = applied(model)(materialize(small), x)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_grids_that_integers_do_not_know_are_dequantized(monkeypatch):
    from jaxcompress.quantization import grids

    wide = grids.GRIDS["symmetric"]._replace(decode=lambda c, s, b: c**2 * s.scale)
    monkeypatch.setitem(grids.GRIDS, "squares", wide)
    model, x = nn.Dense(12), random(5, 24)
    leaf = jc.symmetric(random(24, 12), bits=4)
    leaf = jc.Quantized(
        leaf.codes, leaf.scale, None, None, "squares", 4, None, leaf.dtype
    )
    small = {"kernel": leaf, "bias": jnp.zeros(12)}
    got = applied(model, jc.compressed_matmul, activations="int8")(small, x)
    np.testing.assert_allclose(got, x @ leaf.materialize(), rtol=1e-5)


def test_inputs_that_are_not_finite_show():
    model, x = nn.Dense(12), random(3, 24)
    x[0, 3], x[1, 4] = np.nan, np.inf
    params = model.init(jax.random.key(0), x)["params"]
    small = jc.compress(params, [("kernel", "symmetric(bits=8)")])
    got = np.asarray(applied(model, jc.compressed_matmul, activations="int8")(small, x))
    assert np.isnan(got[:2]).all() and np.isfinite(got[2]).all()


def test_integer_products_have_the_gradients_of_float_ones():
    x = jnp.asarray(random(5, 24))
    leaf = jc.asymmetric(random(24, 12), bits=8, scale_dtype="float32")
    trainable, frozen = jc.partition(leaf)

    def output(trainable, x, activations):
        how = Arithmetic(activations=activations)
        leaf = jc.combine(trainable, frozen)
        return (leaf.contract(x, how) * random(5, 12, seed=2)).sum()

    both = [
        jax.jit(jax.grad(output, argnums=(0, 1)), static_argnums=2)(trainable, x, kind)
        for kind in ("int8", "float")
    ]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        assert np.abs(b).min() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_models_run_in_integers():
    model, params = language("scan")
    recipe = [(".*(embedding|kernel)", "symmetric(bits=8)")]
    small = jc.compress(with_biases(params), recipe, layouts=layouts(params))
    exact = applied(model)(small, TOKENS)
    quick = applied(model, jc.compressed_matmul, activations="int8")
    got = quick(small, TOKENS)
    assert 1e-4 < np.abs(got - exact).max() < 0.05 * np.abs(exact).max()
    program = str(jax.make_jaxpr(quick)(small, TOKENS))
    # query, key, value, out, mix, up, down; split, join, and the tied head
    assert program.count("preferred_element_type=int32") == 10


def test_auto_takes_integers_only_where_they_are_faster(monkeypatch):
    model = nn.Dense(12)
    params = model.init(jax.random.key(0), random(1, 24))["params"]
    small = jc.compress(params, [("kernel", "symmetric(bits=8)")])

    def in_integers(rows, activations):
        run = applied(model, jc.compressed_matmul, activations=activations)
        program = str(jax.make_jaxpr(run)(small, random(rows, 24)))
        return "preferred_element_type=int32" in program

    for version, rows, expected in (
        ("0.10.2", 64, True),
        ("0.10.2", 1, False),
        ("0.7.2", 64, False),
    ):
        monkeypatch.setattr(integer_matmul.jax, "__version__", version)
        assert in_integers(rows, "auto") == expected
        assert in_integers(rows, "int8")
        assert not in_integers(rows, "float")
    monkeypatch.setattr(integer_matmul.jax, "__version__", "0.10.2")
    monkeypatch.setattr(integer_matmul.jax, "default_backend", lambda: "tpu")
    assert not integer_matmul.integers_pay(64)


def test_scaled_rows_scale_the_inputs_of_an_integer_product():
    model, x = nn.Dense(12), random(5, 24)
    params = model.init(jax.random.key(0), x)["params"]
    moments = {"kernel": jc.moments_from_covariance(jnp.diag(jnp.arange(1.0, 25)))}
    small = jc.compress(params, [("kernel", "awq(bits=8, candidates=4)")], moments)
    want = applied(model)(materialize(small), x)
    np.testing.assert_allclose(
        applied(model, jc.compressed_matmul)(small, x), want, atol=1e-5
    )
    run = applied(model, jc.compressed_matmul, activations="int8")
    error = np.abs(run(small, x) - want).max()
    assert 0 < error < 0.02 * np.abs(want).max()
    assert "preferred_element_type=int32" in str(jax.make_jaxpr(run)(small, x))


def test_sums_too_long_for_32_bits_are_dequantized():
    leaf = jc.symmetric(np.ones((4, 2), np.float32), bits=8)
    assert integer_matmul.has_integers(leaf)
    packed = jax.ShapeDtypeStruct((2**17, 2), jnp.uint8)
    codes = jc.Packed(packed, 8, 2**17)
    long = jc.Quantized(
        codes, leaf.scale, None, None, "symmetric", 8, None, jnp.dtype("float32")
    )
    assert not integer_matmul.has_integers(long)


def test_other_activations_are_refused():
    message = "'float', 'int8', 'auto', not 'int4'"
    with (
        pytest.raises(ValueError, match=message),
        jc.compressed_matmul(activations="int4"),
    ):
        pass

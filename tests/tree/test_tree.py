"""Names, layouts, recipes, reports and generic leaves."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from models_for_tests import Product, Rounded, product, rounded

import jaxcompress as jc
from jaxcompress.quantization.nearest import asymmetric, symmetric
from jaxcompress.training.qat_leaf import fake_quantize
from jaxcompress.tree.leaf import data_fields, leaf_type, static_fields
from jaxcompress.tree.methods import describe, parse, traits
from jaxcompress.tree.paths import entries, roots

ATTENTION = "block/attention/kernel"
LAYOUT = {ATTENTION: jc.Layout((), (0,), (1, 2))}


def make_params(seed=0, dtype=jnp.float32):
    """A tree with every kind of place a weight can have."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    return {
        "embed": {"embedding": normal(80, 64)},
        "block": {
            "up": {"kernel": normal(64, 96), "bias": normal(96)},
            "attention": {"kernel": normal(64, 4, 16)},
            "small": {"kernel": normal(8, 8)},
            "norm": {"scale": normal(64)},
        },
        "steps": jnp.arange(3),
    }


@pytest.fixture
def params():
    return make_params()


@jc.method(traceable=False)
def by_value(x: jax.Array, moments: Any = None, *, least: float = 0.0) -> Product:
    """A host method: how wide its result is depends on values."""
    del moments
    columns = np.flatnonzero(np.abs(np.asarray(x)).max(0) > least)
    pick = jnp.zeros((len(columns), x.shape[-1])).at[jnp.arange(len(columns)), columns]
    return Product(x[:, columns], pick.set(1.0))


@jc.method(selects="codes")
def codes_as_floats(x: jax.Array, moments: Any = None) -> jax.Array:
    """A method on codes that gives plain arrays."""
    del moments
    return x.astype(jnp.int16)


# Names


def test_names_follow_the_tree_and_the_fields(params):
    names = jc.leaf_names(params)
    assert names == [name for name, _ in roots(params)]
    assert names[:2] == [ATTENTION, "block/norm/scale"]
    small = jc.compress(params, [("embed/embedding|.*up/kernel", product())])
    inner = [name for name in jc.leaf_names(small) if name not in names]
    assert inner == [
        "block/up/kernel/left",
        "block/up/kernel/right",
        "embed/embedding/left",  # through Reshaped, which adds nothing
        "embed/embedding/right",
    ]
    assert isinstance(small["embed"]["embedding"], jc.Reshaped)
    both = {"kernel": jc.Sum((jnp.ones((4, 4)), rounded(jnp.ones((4, 4)))))}
    assert jc.leaf_names(both) == [
        "kernel/terms/0",
        "kernel/terms/1/codes",
        "kernel/terms/1/scale",
    ]


def test_names_stop_at_lossless_leaves(params):
    small = jc.compress(params, [("block/up/kernel", symmetric(bits=4))])
    names = [name for name in jc.leaf_names(small) if "up/kernel" in name]
    assert names == ["block/up/kernel/codes", "block/up/kernel/scale"]
    packed = small["block"]["up"]["kernel"].codes
    assert packed.lossless and packed.shape == (64, 96)


def test_entries_say_what_their_place_means(params):
    params["embedding"] = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones((2, 2))}
    found = {entry.name: entry for entry in entries(params)}
    facts = {name: (e.weight, e.embedding, e.depth) for name, e in found.items()}
    assert facts["embed/embedding"] == (True, True, 0)
    assert facts["block/up/kernel"] == (True, False, 0)
    assert facts["block/up/bias"] == (False, False, 0)
    assert facts["embedding/kernel"] == (True, False, 0)
    assert facts["embedding/scale"] == (False, False, 0)
    small = jc.compress(params, [("embed/embedding", product())])
    small = jc.compress(small, [("embed/embedding/left", rounded())])
    found = {entry.name: entry for entry in entries(small)}
    codes, right = found["embed/embedding/left/codes"], found["embed/embedding/right"]
    assert not codes.weight and right.weight
    assert codes.depth == 3 and right.depth == 2
    assert codes.root == right.root == "embed/embedding"


# Recipes


def test_first_match_decides(params):
    recipe = [
        ("block/small/.*", None),
        (r"block/(up|small)/kernel", rounded(levels=3)),
        ("embed/embedding", "rounded(levels=1)"),
    ]
    small = jc.compress(params, recipe)
    assert np.abs(small["block"]["up"]["kernel"].codes).max() == 3
    assert np.abs(small["embed"]["embedding"].inner.codes).max() == 1
    kept = [name for name, x in roots(small) if not isinstance(x, jc.Leaf)]
    assert kept == [
        ATTENTION,
        "block/norm/scale",
        "block/small/kernel",
        "block/up/bias",
        "steps",
    ]
    again = jc.compress(params, [("block/up/kernel", None), ("block/up/.*", None)])
    chex.assert_trees_all_equal(again, params)


def test_a_single_method_takes_kernels_and_embeddings_of_4096(params):
    small = jc.compress(params, "rounded(levels=7)", layouts=LAYOUT)
    taken = [name for name, x in roots(small) if isinstance(x, jc.Leaf)]
    assert taken == [ATTENTION, "block/up/kernel", "embed/embedding"]
    same = jc.compress(params, rounded(levels=7), layouts=LAYOUT)
    chex.assert_trees_all_equal(small, same)


def test_chain_recomputes_names_between_its_stages(params):
    recipe = jc.chain(
        [("block/up/kernel", product())],
        [("block/up/kernel/left", rounded(levels=3)), (".*/right", rounded())],
        "codes_as_floats()",
    )
    kernel = jc.compress(params, recipe)["block"]["up"]["kernel"]
    assert isinstance(kernel, Product) and isinstance(kernel.left, Rounded)
    assert kernel.left.codes.dtype == kernel.right.codes.dtype == jnp.int16
    assert jc.chain(recipe, recipe).stages == recipe.stages * 2
    # A following method takes the weights inside leaves by itself, not their scales.
    nested = jc.compress(
        params, jc.chain([(".*up/kernel", product())], rounded()), layouts=LAYOUT
    )
    kernel = nested["block"]["up"]["kernel"]
    assert isinstance(kernel.left, Rounded) and isinstance(kernel.right, Rounded)


def test_unselected_leaves_are_the_identical_objects(params):
    first = jc.compress(params, [("embed/embedding", rounded())])
    second = jc.compress(first, [("block/up/kernel", product())])
    for (name, old), (_, new) in zip(roots(first), roots(second), strict=True):
        assert (new is old) == (name != "block/up/kernel"), name
    assert second["steps"] is params["steps"]


def test_a_plain_function_is_a_method(params):
    def halve(x, moments=None):
        assert moments is None
        return x / 2

    small = jc.compress(params, [("block/up/kernel", halve)])
    np.testing.assert_array_equal(
        small["block"]["up"]["kernel"], params["block"]["up"]["kernel"] / 2
    )
    report = []
    jc.compress(params, halve, layouts=LAYOUT, record=report)
    assert "halve()" in {row.method for row in report}


@pytest.mark.parametrize(
    "text",
    [
        "rounded()",
        "rounded(levels=3)",
        "symmetric(bits=4, block=64)",
        "sign_split(bits=(3, 2), block=None)",
        "by_value(least=-0.5)",
    ],
)
def test_strings_round_trip(text):
    assert describe(parse(text)) == text
    assert describe(parse(f" {text} ")) == text


def test_partial_methods_describe_their_last_options():
    assert describe(rounded(levels=3)) == "rounded(levels=3)"
    assert traits(rounded(levels=3)).traceable and not traits(by_value()).traceable
    assert describe(parse("rounded")) == "rounded()"


# Errors


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            [("block/upp/kernel", None)],
            r"matches no leaf; the nearest.*block/up/kernel",
        ),
        ([("up/kernel", rounded())], r"matches no leaf"),  # the whole name must match
        ([("block/up", rounded())], r"matches no leaf"),
        ("roundd(levels=3)", r"unknown method 'roundd'; did you mean 'rounded'\?"),
        ("rounded(level=3)", r"no option 'level'; did you mean 'levels'\?"),
        ("rounded(3)", r"options are given by name"),
        ("rounded(levels=len('abc'))", r"levels is not a literal"),
        ("rounded(levels={[]: 1})", r"levels is not a literal"),
        ("rounded(**{'levels': 3})", r"options are given by name"),
        ("rounded(levels=3, levels=4)", r"levels is given twice"),
        ("__import__('os').getcwd()", r"is not a method; write name"),
        ("rounded(levels=3", r"is not a method; write name"),
        ("", r"is not a method; write name"),
        (["rounded()"], r"is not a rule; write \(pattern, method\)"),
        ([("block/.*", rounded(), 3)], r"is not a rule"),
        ([("block/(", rounded())], r"is not a pattern"),
        ([(".*", 4)], r"4 is not a method"),
        (3, r"3 is not a recipe"),
        (
            [(ATTENTION, rounded())],
            rf"{ATTENTION}: shape \(64, 4, 16\) has 3 axes.*layout",
        ),
        (
            [("block/norm/scale", rounded())],
            r"block/norm/scale.*needs a matrix.*\(64,\)",
        ),
        (
            [("steps", rounded())],
            r"steps: rounded\(\) takes floating-point weights.*int",
        ),
    ],
)
def test_wrong_recipes_are_explained(params, recipe, message):
    with pytest.raises(ValueError, match=message):
        jc.compress(params, recipe)


def test_missing_options_name_the_leaf(params):
    with pytest.raises(ValueError, match=r"block/up/kernel.* needs bits"):
        jc.compress(params, [("block/up/kernel", "symmetric()")])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_weights_name_the_leaf(params, value):
    kernel = params["block"]["up"]["kernel"]
    params["block"]["up"]["kernel"] = kernel.at[3, 4].set(value).at[5, 6].set(value)
    message = r"block/up/kernel: 2 of 6144 weights are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        jc.compress(params, rounded(), layouts=LAYOUT)
    jc.compress(params, [("block/up/kernel", None), ("embed/embedding", rounded())])


def test_layouts_must_fit_and_exist(params):
    recipe = [(ATTENTION, rounded())]
    cases = (
        ({"block/x/kernel": LAYOUT[ATTENTION]}, "layout names 'block/x/kernel'"),
        ({ATTENTION: jc.Layout((), (0,), (1,))}, f"{ATTENTION}.*does not cover"),
        ({ATTENTION: jc.Layout((), (0, 1, 2), ())}, f"{ATTENTION}.*does not cover"),
    )
    for layout, message in cases:
        with pytest.raises(ValueError, match=message):
            jc.compress(params, recipe, layouts=layout)


def test_host_methods_refuse_tracers(params):
    recipe = [("block/up/kernel", by_value(least=1.0))]
    with pytest.raises(TypeError, match=r"block/up/kernel: by_value is a host method"):
        jax.jit(lambda p: jc.compress(p, recipe))(params)
    small = jc.compress(params, recipe)
    jitted = jax.jit(jc.materialize)(small)
    want = np.asarray(params["block"]["up"]["kernel"])
    np.testing.assert_allclose(jitted["block"]["up"]["kernel"], want, rtol=1e-6)


def test_names_of_types_and_methods_are_unique():
    with pytest.raises(ValueError, match="leaf type named Rounded exists"):

        @jc.leaf
        class Rounded(jc.Leaf):
            codes: jax.Array

    with pytest.raises(KeyError, match=r"unknown leaf type 'Rownded'.*Rounded"):
        leaf_type("Rownded")


# Tracing


def test_float32_products_of_methods_are_in_float32():
    """Accelerators would round what they multiply."""
    x = jax.random.normal(jax.random.key(0), (32, 48))
    moments = jc.moments_from_covariance(jnp.eye(32) + 0.1)
    options = {
        "svd": {"rank": 8},
        "cp": {"rank": 8, "sizes": (32, 6, 8)},
        "tucker": {"ranks": (8, 4, 8), "sizes": (32, 6, 8)},
        "learned": {"bits": 3, "steps": 2},
        "gptq": {"bits": 3},
        "alps": {"sparsity": 0.5},
    }
    for name, each in options.items():
        run = functools.partial(getattr(jc, name), moments=moments, **each)
        found = list(products_of(jax.make_jaxpr(run)(x).jaxpr))
        assert found, name
        for equation in found:
            assert "HIGHEST" in str(equation.params["precision"]), (name, equation)


def products_of(program):
    """All float products of a traced program, those of its loops included."""
    for equation in program.eqns:
        if equation.primitive.name == "dot_general" and jnp.issubdtype(
            equation.invars[0].aval.dtype, jnp.floating
        ):
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products_of(inner)


def test_compress_traces(params):
    def shrink(params):
        return jc.compress(params, rounded(), layouts=LAYOUT)

    eager, jitted = shrink(params), jax.jit(shrink)(params)
    shapes = jax.eval_shape(shrink, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(eager, jitted, shapes)
    chex.assert_trees_all_close(jitted, eager, rtol=1e-6)
    assert jc.nbytes(shapes) == jc.nbytes(eager)
    abstract = shapes["block"]["attention"]["kernel"]
    assert abstract.shape == (64, 4, 16) and abstract.dtype == jnp.float32


def test_one_compilation_serves_equal_shapes():
    traced = []

    @jc.method()
    def counting(x: jax.Array, moments: Any = None, *, step: float) -> jax.Array:
        traced.append(x.shape)
        return jnp.round(x / step) * step

    many = {f"layer_{i}": {"kernel": jnp.ones((4, 3)) * i} for i in range(5)}
    many["last"] = {"kernel": jnp.ones((3, 4))}
    for _ in range(2):
        jc.compress(many, [(".*", counting(step=0.5))])
    assert traced == [(3, 4), (4, 3)] or traced == [(4, 3), (3, 4)]
    jc.compress(many, [(".*", counting(step=0.25))])
    assert len(traced) == 4


# Layouts and generic leaves


def rounded_in_numpy(x, inputs, levels):
    """Every output's column scaled by its own largest magnitude over `inputs`."""
    x = np.asarray(x, np.float64)
    step = np.abs(x).max(axis=inputs, keepdims=True) / levels
    return np.rint(x / step) * step


@pytest.mark.parametrize(
    ("shape", "layout", "inputs"),
    [
        ((6, 4), jc.Layout((), (0,), (1,)), (0,)),
        ((6, 4), jc.Layout((), (1,), (0,)), (1,)),
        ((6, 2, 5), jc.Layout((), (0,), (1, 2)), (0,)),  # query of attention
        ((2, 5, 6), jc.Layout((), (0, 1), (2,)), (0, 1)),  # its output
        ((2, 3, 4, 5), jc.Layout((), (0, 1, 2), (3,)), (0, 1, 2)),  # a convolution
        ((4, 6, 5), jc.Layout((), (1,), (2, 0)), (1,)),  # an einsum
        ((3, 6, 4), jc.Layout((0,), (1,), (2,)), (1,)),  # three scanned layers
        ((3, 2, 5, 6), jc.Layout((0,), (1, 2), (3,)), (1, 2)),
        ((3, 6, 5, 2), jc.Layout((0,), (2,), (3, 1)), (2,)),
    ],
)
def test_layouts_against_numpy(shape, layout, inputs):
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    tree = {"kernel": x}
    small = jc.compress(
        tree, [("kernel", rounded(levels=9))], layouts={"kernel": layout}
    )
    assert small["kernel"].shape == shape and small["kernel"].dtype == x.dtype
    want = rounded_in_numpy(x, inputs, 9)
    np.testing.assert_allclose(small["kernel"].materialize(), want, atol=1e-6)
    if layout.stack:  # a slice of the leaf is the leaf of the slice
        one = jax.tree.map(lambda a: a[1], small["kernel"])
        assert one.shape == shape[1:]
        np.testing.assert_allclose(one.materialize(), want[1], atol=1e-6)


def test_an_embedding_is_compressed_row_by_row(params):
    small = jc.compress(params, [("embed/embedding", rounded(levels=5))])
    table = small["embed"]["embedding"]
    want = rounded_in_numpy(params["embed"]["embedding"], (1,), 5)
    np.testing.assert_allclose(table.materialize(), want, atol=1e-6)
    rows = jnp.array([[3, 79], [0, 3]])
    np.testing.assert_allclose(table.take_rows(rows), want[np.asarray(rows)], atol=1e-6)
    coarse = jc.compress(params, [("embed/embedding", symmetric(bits=4, block=10))])
    table = coarse["embed"]["embedding"]
    want = np.asarray(table.materialize())[np.asarray(rows)]
    np.testing.assert_array_equal(table.take_rows(rows), want)


def test_mixed_against_numpy():
    random = np.random.default_rng(2)
    x = random.normal(size=(3, 5, 7)).astype(np.float32)
    order = np.stack([random.permutation(7) for _ in range(3)])
    kept, rest = (
        jnp.stack([jnp.asarray(x[i][:, order[i][part]]) for i in range(3)])
        for part in (slice(2), slice(2, None))
    )
    mixed = jc.Mixed(kept, rest, jnp.asarray(order, jnp.int32))
    assert mixed.shape == x.shape and mixed.dtype == x.dtype
    np.testing.assert_array_equal(mixed.materialize(), x)
    one = jax.tree.map(lambda a: a[2], mixed)
    assert one.shape == (5, 7)
    np.testing.assert_array_equal(one.materialize(), x[2])


def test_sum_accumulates_in_float32():
    terms = [np.full((2, 3), v) for v in (256.0, 0.75, 0.75)]
    total = jc.Sum(tuple(jnp.asarray(term, jnp.bfloat16) for term in terms))
    assert total.shape == (2, 3) and total.dtype == jnp.bfloat16
    # Added in bfloat16, each 0.75 would round away.
    assert float(total.materialize()[0, 0]) == 258.0


def test_bytes_count_what_is_held(params):
    small = jc.compress(params, [("block/up/kernel", rounded())])
    kernel = small["block"]["up"]["kernel"]
    assert jc.nbytes(kernel) == 64 * 96 + 4 * 96
    assert jc.nbytes(params) - jc.nbytes(small) == 3 * 64 * 96 - 4 * 96


# Moments


def test_moments_reach_the_methods_that_ask(params):
    seen = {}

    def spy(label):
        def method(x, moments=None):
            seen[label] = moments
            return product(x)

        return method

    moments = {"block/up/kernel": "inputs of up", "embed/embedding": "inputs of embed"}
    recipe = jc.chain(
        [("block/up/kernel", spy("up")), ("embed/embedding", spy("embed"))],
        [(".*up/kernel/left", spy("left")), (".*up/kernel/right", spy("right"))],
        [("embed/embedding/left", spy("embed left"))],
        [(r".*up/kernel/left/left", spy("left left"))],
    )
    jc.compress(params, recipe, moments)
    assert seen == {
        "up": "inputs of up",
        "embed": "inputs of embed",
        "left": "inputs of up",
        "right": None,
        "embed left": "inputs of embed",
        "left left": "inputs of up",
    }
    seen.clear()
    kernel = params["block"]["up"]["kernel"]
    tree = {"kernel": jc.Sum((kernel, Rounded(kernel, jnp.ones((1, 96)))))}
    recipe = [("kernel/terms/0", spy("term")), ("kernel/terms/1/codes", spy("codes"))]
    jc.compress(tree, recipe, {"kernel": "inputs"})
    assert seen == {"term": "inputs", "codes": None}


# Reports


def test_report_says_what_happened_to_every_leaf(params):
    recipe = jc.chain([(".*(up|small)/kernel", product())], symmetric(bits=4))
    report = []
    small = jc.compress(params, recipe, layouts=LAYOUT, record=report)
    rows = {row.name: row for row in report}
    assert list(rows) == jc.leaf_names(params)
    up = rows["block/up/kernel"]
    assert (up.shape, up.bytes_before) == ((64, 96), 4 * 64 * 96)
    assert up.method == "product() > symmetric(bits=4)" and up.reason == ""
    kernel = small["block"]["up"]["kernel"]
    assert up.bytes_after == jc.nbytes(kernel)
    assert up.bits_per_weight == 8 * jc.nbytes(kernel) / (64 * 96)
    dense = np.asarray(params["block"]["up"]["kernel"], np.float64)
    error = np.linalg.norm(dense - kernel.materialize()) / np.linalg.norm(dense)
    assert up.relative_error == pytest.approx(error, rel=1e-5) and error > 0.01
    assert rows["block/small/kernel"].method == "product()"
    assert rows["block/small/kernel"].relative_error == 0
    reasons = {name: row.reason for name, row in rows.items() if row.reason}
    assert reasons == {
        "block/norm/scale": "no rule matches it",
        "block/up/bias": "no rule matches it",
        "steps": "no rule matches it",
    }
    for name in reasons:
        assert rows[name].relative_error is None
        assert rows[name].bytes_after == rows[name].bytes_before
    assert sum(row.bytes_after for row in report) == jc.nbytes(small)


def test_report_reasons_of_a_single_method(params):
    report = []
    jc.compress(params, rounded(), layouts=LAYOUT, record=report)
    assert {row.name: row.reason for row in report if row.reason} == {
        "block/norm/scale": "not a kernel or an embedding",
        "block/small/kernel": "fewer than 4096 weights",
        "block/up/bias": "not a kernel or an embedding",
        "steps": "not floating point",
    }
    report = []
    jc.compress(params, [("steps", None), ("block/.*bias", None)], record=report)
    rows = {row.name: row.reason for row in report}
    assert rows["steps"] == "kept by the rule 'steps'"


# Shapes and dtypes of every leaf type

X = jnp.asarray(np.random.default_rng(3).normal(size=(2, 12, 10)), jnp.bfloat16)
EXAMPLES = {
    "Rounded": lambda: rounded(X),
    "Product": lambda: product(X),
    "Reshaped": lambda: jc.Reshaped(rounded(X), sizes=(3, 4, 10), order=(-1, -3, -2)),
    "Mixed": lambda: jc.Mixed(
        X[..., :3], rounded(X[..., 3:]), jnp.broadcast_to(jnp.arange(10), (2, 10))
    ),
    "Sum": lambda: jc.Sum((X, rounded(X))),
    "LowRank": lambda: jc.svd(X, rank=2),
    "CP": lambda: jc.cp(X, rank=2, sizes=(12, 2, 5), sweeps=2),
    "Tucker": lambda: jc.tucker(X, ranks=(4, 2, 3), sizes=(12, 2, 5)),
    "Sparse": lambda: jc.magnitude(X, sparsity=0.5),
    "Quantized": lambda: asymmetric(X, bits=3, block=5),
    "Scaled": lambda: jc.Scaled(
        symmetric(X.astype(jnp.float32), bits=4),
        jnp.full((2, 12), 0.5),
        jnp.dtype("bfloat16"),
    ),
    "RateCoded": lambda: jc.rate_distortion(jnp.tile(X, (1, 4, 8)), rate=3, states=8),
    "CodedLevels": lambda: (
        jc.rate_distortion(jnp.tile(X, (1, 4, 8)), rate=3, states=0).levels
    ),
    "Packed": lambda: symmetric(X, bits=3).codes,
    "Coded": lambda: jc.entropy_code(jnp.arange(20000).reshape(2, 100, 100) % 99 // 98),
    "CodedFloats": lambda: jc.code_floats(jnp.round(8 * jnp.tile(X, (1, 8, 8)))),
    "CodedWords": lambda: (
        jc.code_floats(jax.random.normal(jax.random.key(0), (2, 64, 64))).bits
    ),
    "FakeQuantized": lambda: fake_quantize(asymmetric(X, bits=3, block=5), X),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_shape_and_dtype_are_those_of_the_array(name):
    leaf = EXAMPLES[name]()
    assert type(leaf) is leaf_type(name)
    array = leaf.materialize()
    assert leaf.shape == array.shape and leaf.dtype == array.dtype
    assert leaf.ndim == array.ndim and leaf.size == array.size
    again = jax.tree.map(lambda a: a, leaf)
    assert {f: getattr(again, f) for f in static_fields(leaf)} == {
        f: getattr(leaf, f) for f in static_fields(leaf)
    }
    assert set(data_fields(leaf)).isdisjoint(static_fields(leaf))
    one = jax.tree.map(lambda a: a[1], leaf)
    assert one.shape == array.shape[1:] and one.dtype == array.dtype
    np.testing.assert_array_equal(
        *(np.asarray(a, np.float32) for a in (one.materialize(), array[1]))
    )


def test_every_leaf_type_of_the_package_has_an_example():
    def below(cls):
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    package = [c for c in below(jc.Leaf) if re.match("jaxcompress", c.__module__)]
    # Others are in a program while it runs or is traced, and in no tree.
    ours = {c.__name__ for c in package if c.__name__ in jc.__all__}
    assert len(ours) > 10
    assert ours <= set(EXAMPLES)


def test_progress_passes_over_the_leaves_a_stage_takes():
    seen = []

    def note(names):
        for name in names:
            seen.append(name)
            yield name

    params = {"a": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
    jc.compress(params, jc.chain("symmetric(bits=4)", "entropy_code()"), progress=note)
    assert seen == ["a/kernel", "a/kernel/codes"]


def test_a_method_that_takes_nothing_says_so():
    with pytest.raises(ValueError, match=r"takes no leaf.*a/bias \(not a kernel"):
        jc.compress({"a": {"bias": jnp.ones(9)}}, "symmetric(bits=4)")


def test_flax_serializes_leaves():
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)}}
    small = jc.compress(params, "svd(rank=8)")
    small = jc.compress(small, [("a/kernel/left", "symmetric(bits=4)")])
    data = serialization.to_bytes(small)
    assert len(data) < jc.nbytes(small) + 1000
    zeros = jax.tree.map(jnp.zeros_like, small)
    again = serialization.from_bytes(zeros, data)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    jax.tree.map(np.testing.assert_array_equal, again, small)
    with pytest.raises(ValueError, match=r"a Quantized has .*'codes'"):
        serialization.from_bytes(jc.compress(params, "symmetric(bits=4)"), data)


SQUARE = {"layer": {"kernel": jnp.ones((64, 64))}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, r"the tree has no arrays; .*model\.init.*params_of"),
        (lambda: jc.compress(SQUARE, "nf4"), r"compressed already.*layer/kernel/codes"),
    ],
)
def test_a_tree_that_cannot_be_compressed_by_default_says_why(tree, message):
    tree = tree() if callable(tree) else tree
    with pytest.raises(ValueError, match=message):
        jc.compress(tree, "symmetric(bits=8)")


def test_shapes_without_values_are_sent_to_eval_shape():
    shapes = jax.eval_shape(lambda: SQUARE)
    with pytest.raises(TypeError, match=r"layer/kernel: .*jax\.eval_shape\("):
        jc.compress(shapes, "symmetric(bits=8)")
    small = jax.eval_shape(lambda x: jc.compress(x, "symmetric(bits=8)"), shapes)
    assert small["layer"]["kernel"].shape == (64, 64)


def test_constants_of_a_traced_function_are_compressed():
    kernel = jax.random.normal(jax.random.key(0), (64, 64))
    small = jax.jit(lambda: jc.compress({"a": {"kernel": kernel}}, "symmetric(bits=4)"))
    want = jc.compress({"a": {"kernel": kernel}}, "symmetric(bits=4)")
    chex.assert_trees_all_close(small(), want, rtol=1e-6)


def test_an_error_of_jax_in_a_method_names_the_leaf():
    def branching(x, moments=None):
        return x if x.sum() > 0 else -x

    with pytest.raises(TypeError, match=r"^layer/kernel: .*[Bb]ool"):
        jax.jit(lambda p: jc.compress(p, [("layer/kernel", branching)]))(SQUARE)

"""Products of whole numbers: inputs in int8, codes as they are stored."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_for_tests import TOKENS, language, layouts
from running.factors import applied, materialize, random, with_biases

import jaxcompress as jc
from jaxcompress.quantization import integer_matmul
from jaxcompress.tree.leaf import Arithmetic


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

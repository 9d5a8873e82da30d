"""Round to nearest: grids, steps, packing, and what bad input gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxcompress.coding.integers.leaf import Packed
from jaxcompress.quantization import GRIDS, asymmetric, sign_split, symmetric
from jaxcompress.quantization.nearest import STEP_FACTORS
from jaxcompress.tree.leaf import dense, nbytes

BLOCKS = [None, 7, 64, "tensor"]  # one per output, dividing, too long, all; 5: ragged
CASES = [(bits, 5) for bits in range(1, 9)] + [(3, block) for block in BLOCKS]
SIDES = [(3, 3), (1, 1), (7, 7), (1, 4), (4, 2)]


def weights(*shape, seed=0, dtype=jnp.float32):
    """Heavy-tailed and shifted, so that no two blocks or sides look alike."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, shape) * 0.05 + rng.uniform(-0.03, 0.03, shape[-1:])
    return jnp.asarray(x, dtype)


def parts(leaf):
    """Scale, zero point and negative scale as stored, float64 NumPy."""
    return [
        None if step is None else np.asarray(step, np.float64) for step in leaf.steps
    ]


def per_weight(steps, leaf):
    """The steps `[blocks, outputs]` of a matrix, one per weight."""
    full = np.empty(leaf.shape)
    for where, at in oracles.groups(leaf.shape, leaf.block):
        full[where] = steps[at]
    return full


def check_nearest(x, leaf):
    """No other code is nearer, to a float32 rounding error of the largest value."""
    scale, zero, negative = parts(leaf)
    best = oracles.nearest(
        np.asarray(x, np.float64),
        leaf.grid,
        leaf.bits,
        leaf.block,
        scale,
        zero,
        negative,
    )
    x = np.asarray(x, np.float64)
    error = np.abs(np.asarray(leaf.materialize(), np.float64) - x)
    slack = 1e-6 * np.abs(x).max()
    np.testing.assert_array_less(error, np.abs(best - x) + slack)


@pytest.mark.parametrize(("bits", "block"), CASES)
def test_symmetric_is_nearest_with_the_step_of_the_definition(bits, block):
    x = weights(14, 3, seed=bits)
    leaf = symmetric(x, bits=bits, block=block, scale_dtype="float32")
    expected = oracles.symmetric_steps(np.asarray(x), bits, block)
    np.testing.assert_allclose(leaf.scale, expected, rtol=1e-6)
    check_nearest(x, leaf)
    check_nearest(x, symmetric(x, bits=bits, block=block))
    if bits > 1:
        full = symmetric(x, bits=bits, block=block, full_range=True)
        expected = oracles.symmetric_steps(np.asarray(x), bits, block, full_range=True)
        np.testing.assert_allclose(full.scale, expected, rtol=2.0**-8)
        check_nearest(x, full)


@pytest.mark.parametrize(("bits", "block"), CASES)
def test_asymmetric_is_nearest_with_the_step_of_the_definition(bits, block):
    x = weights(14, 3, seed=bits)
    leaf = asymmetric(x, bits=bits, block=block, scale_dtype="float32")
    scale, zero = oracles.asymmetric_steps(np.asarray(x), bits, block)
    np.testing.assert_allclose(leaf.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(dense(leaf.zero_point), zero)
    check_nearest(x, leaf)
    check_nearest(x, asymmetric(x, bits=bits, block=block))


@pytest.mark.parametrize(
    ("bits", "block"), [*((bits, 5) for bits in SIDES), ((3, 3), None)]
)
def test_sign_split_is_nearest_with_the_steps_of_the_definition(bits, block):
    x = weights(14, 3, seed=sum(bits))
    leaf = sign_split(x, bits=bits, block=block, scale_dtype="float32")
    positive, negative = oracles.sign_split_steps(np.asarray(x), bits, block)
    np.testing.assert_allclose(leaf.scale, positive, rtol=1e-6)
    np.testing.assert_allclose(leaf.negative_scale, negative, rtol=1e-6)
    check_nearest(x, leaf)
    check_nearest(x, sign_split(x, bits=bits, block=block))


def test_random_shapes_blocks_and_dtypes_are_nearest():
    rng = np.random.default_rng(7)
    for seed in range(5):
        inputs, outputs = map(int, rng.integers(1, 20, 2))
        dtype = rng.choice(["float32", "bfloat16", "float16"])
        scale_dtype = str(rng.choice(["float32", "bfloat16", "float16"]))
        block = int(rng.integers(1, 20))
        x = weights(inputs, outputs, seed=seed)
        x = x if dtype == "float32" else x.astype(dtype).astype(jnp.float32)
        bits = int(rng.integers(1, 9))
        method = rng.choice([symmetric, asymmetric])
        leaf = method(x, bits=bits, block=block, scale_dtype=scale_dtype)
        assert leaf.shape == x.shape and leaf.scale.dtype == scale_dtype
        check_nearest(x, leaf)


@pytest.mark.parametrize(
    ("bits", "scale_dtype"),
    [(2, "bfloat16"), (3, "float16"), (4, "bfloat16"), (8, "bfloat16"), (8, "float32")],
)
def test_error_is_half_a_stored_step_except_where_clipped(bits, scale_dtype):
    x = weights(33, 5, seed=3)
    wide = np.asarray(x, np.float64)
    for full_range in (False, True):
        leaf = symmetric(
            x, bits=bits, block=8, full_range=full_range, scale_dtype=scale_dtype
        )
        step = per_weight(parts(leaf)[0], leaf)
        error = np.abs(np.asarray(leaf.materialize(), np.float64) - wide)
        clipped = wide / step > 2 ** (bits - 1) - 0.5
        assert np.any(clipped) or full_range
        slack = 1 + 1e-5 * 2**bits
        assert np.all(error[~clipped] <= 0.5 * slack * np.abs(step)[~clipped])
        # The stored step may be smaller by 2^-8 of it, which adds up to the last code.
        most = 1 + 2.0**-8 * 2 ** (bits - 1)
        assert np.all(error[clipped] <= most * slack * np.abs(step)[clipped])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_error_is_half_a_step_everywhere(bits):
    x = weights(32, 5, seed=4)
    leaf = asymmetric(x, bits=bits, block=8, scale_dtype="float32")
    step = per_weight(parts(leaf)[0], leaf)
    error = np.abs(np.asarray(leaf.materialize()) - np.asarray(x))
    assert np.all(error <= 0.5 * (1 + 1e-5 * 2**bits) * step)


@pytest.mark.parametrize("bits", SIDES)
def test_sign_split_error_is_half_a_step_of_the_side(bits):
    x = weights(32, 5, seed=4)
    leaf = sign_split(x, bits=bits, block=8, scale_dtype="float32")
    scale, _, negative = (s if s is None else per_weight(s, leaf) for s in parts(leaf))
    wide = np.asarray(x, np.float64)
    step = np.where(wide > 0, scale, negative)
    top = 2.0 ** np.where(wide > 0, *bits) - 0.5
    error = np.abs(np.asarray(leaf.materialize()) - wide)
    clipped = np.abs(wide) / step > top
    assert 0 < clipped.sum() < clipped.size
    assert np.all(error[~clipped] <= 0.5001 * step[~clipped])
    assert np.all(error[clipped] <= 1.0001 * step[clipped])


@pytest.mark.parametrize("search", [False, True])
def test_zero_is_exact_and_zero_blocks_stay_zero(search):
    x = np.array(weights(12, 4))
    x[:4] = 0  # a whole block
    x[5] = 0  # one input of a block
    x[:, 3] = 0  # a whole output
    zero = x == 0
    with jax.debug_nans(True):
        leaves = [
            symmetric(jnp.asarray(x), bits=3, block=4, search=search),
            symmetric(jnp.asarray(x), bits=2, block=4, full_range=True, search=search),
            asymmetric(jnp.asarray(x), bits=3, block=4, search=search),
            sign_split(jnp.asarray(x), bits=(2, 3), block=4, search=search),
        ]
        for leaf in leaves:
            values = np.asarray(leaf.materialize())
            assert np.all(values[zero] == 0)
            assert np.all(leaf.steps.scale != 0)
        one = symmetric(jnp.asarray(x), bits=1, block=4)  # has no zero of its own
        assert np.all(np.asarray(one.materialize())[:4] == 0)


def test_one_sided_blocks_use_the_whole_range():
    x = jnp.abs(weights(12, 4)) + 0.1
    for sign in (1, -1):
        leaf = asymmetric(sign * x, bits=4, block=6, scale_dtype="float32")
        step = per_weight(parts(leaf)[0], leaf)
        np.testing.assert_allclose(leaf.scale.max(), x.max() / 15, rtol=1e-6)
        error = np.abs(np.asarray(leaf.materialize()) - sign * np.asarray(x))
        assert np.all(error <= 0.5001 * step)


@pytest.mark.parametrize("value", [0.75, -0.75])
def test_constant_blocks_are_exact_where_the_grid_reaches_them(value):
    x = jnp.full((6, 2), value)
    exact = [
        symmetric(x, bits=1, block=4, scale_dtype="float32"),
        symmetric(x, bits=2, block=4, full_range=True, scale_dtype="float32"),
        asymmetric(x, bits=2, block=4, scale_dtype="float32"),
    ]
    for leaf in exact:
        np.testing.assert_allclose(leaf.materialize(), x, rtol=1e-6)
    clipped = symmetric(x, bits=2, block=4).materialize()  # levels -2 .. 1 of 0.375
    np.testing.assert_array_equal(clipped, jnp.full_like(x, min(value, 0.375)))


def test_one_bit_is_the_mean_magnitude_of_a_ragged_block_too():
    x = jnp.asarray([[1.0], [-3.0], [2.0], [-8.0]])
    leaf = symmetric(x, bits=1, block=3)
    np.testing.assert_array_equal(leaf.scale, [[2.0], [8.0]])
    np.testing.assert_array_equal(leaf.materialize(), [[2.0], [-2], [2], [-8]])


def test_full_range_reaches_the_largest_weight_and_helps_at_two_bits():
    x = weights(512, 8, seed=1)
    leaf = symmetric(x, bits=2, block=32, full_range=True, scale_dtype="float32")
    largest = np.abs(np.asarray(x)).reshape(16, 32, 8).max(1)
    reached = np.abs(np.asarray(leaf.materialize())).reshape(16, 32, 8).max(1)
    np.testing.assert_allclose(reached, largest, rtol=1e-6)
    plain = symmetric(x, bits=2, block=32, scale_dtype="float32").materialize()
    assert jnp.sum((leaf.materialize() - x) ** 2) < 0.95 * jnp.sum((plain - x) ** 2)


def block_errors(x, leaf):
    """Squared error of each block, float64."""
    error = (np.asarray(leaf.materialize(), np.float64) - np.asarray(x)) ** 2
    places = oracles.groups(x.shape, leaf.block)
    return np.array([error[where].sum() for where, _ in places])


@pytest.mark.parametrize(
    ("method", "block"),
    [
        *((symmetric(bits=bits), 7) for bits in (2, 4, 8)),
        (symmetric(bits=2, full_range=True), 7),
        (symmetric(bits=4), "tensor"),
        *((asymmetric(bits=bits), 7) for bits in (2, 4)),
        (asymmetric(bits=3), None),
        *((sign_split(bits=bits), 7) for bits in ((1, 2), (3, 3))),
    ],
)
def test_search_is_never_worse_in_any_block_and_mostly_better(method, block):
    x = weights(40, 6, seed=9)
    plain = block_errors(x, method(x, block=block))
    searched = block_errors(x, method(x, block=block, search=True))
    assert np.all(searched <= plain * (1 + 1e-5))
    few = method.keywords["bits"] in (2, (1, 2))
    assert searched.sum() < (0.9 if few else 1) * plain.sum()


@pytest.mark.parametrize("bits", [2, 4])
def test_search_finds_the_best_of_its_factors(bits):
    """The factor of every block, against all tried one by one in float64."""
    normal = np.random.default_rng(2).normal(size=(64, 40))
    x = np.float32(normal * np.abs(normal) ** np.linspace(0, 4, 40))  # heavier tails
    x[:, 0], x[0, 0] = -0.5, -4.0  # clipped by the smallest factor at 2 bits
    x[:, 1] = np.abs(x[:, 1]).max()  # the positive end: saved by the largest
    factors = np.sort(STEP_FACTORS.astype(np.float64))
    plain = np.abs(x.astype(np.float64)).max(axis=0, keepdims=True) / 2 ** (bits - 1)
    errors = [
        ((oracles.nearest(x, "symmetric", bits, None, plain * factor) - x) ** 2).sum(0)
        for factor in factors
    ]
    leaf = symmetric(jnp.asarray(x), bits=bits, search=True, scale_dtype="float32")
    np.testing.assert_allclose(block_errors(x, leaf), np.min(errors, axis=0), rtol=1e-4)
    chosen = np.asarray(leaf.scale[0] / plain[0])
    best = np.sort(errors, axis=0)
    clear = best[1] > 1.001 * best[0]  # elsewhere two factors are as good
    wanted = factors[np.argmin(errors, axis=0)]
    np.testing.assert_allclose(chosen[clear], wanted[clear], rtol=1e-5)
    assert clear.mean() > 0.5
    if bits == 2:
        np.testing.assert_array_equal(wanted[:2], factors[[0, -1]])


def test_codes_are_counted_and_really_packed():
    for bits, width in {(3, 3): 4, (2, 3): 4, (1, 1): 2, (7, 7): 8, (2, 1): 3}.items():
        assert GRIDS["sign_split"].width(bits) == width
    x = weights(256, 16)

    def held(method):
        return nbytes(jax.eval_shape(method, x))

    for bits in range(1, 9):
        codes = 256 * 16 * bits // 8
        assert held(symmetric(bits=bits, block=128)) == codes + 2 * 16 * 2
        zeros = 16 * 16 * bits // 8
        assert held(asymmetric(bits=bits, block=16)) == codes + 16 * 16 * 2 + zeros
        assert held(asymmetric(bits=bits)) <= codes + 16 * 2 + 16
    assert held(sign_split(bits=(3, 3), block=128)) == 256 * 16 // 2 + 2 * (2 * 16 * 2)
    assert held(symmetric(bits=4, block="tensor", scale_dtype="float32")) == 2048 + 4
    leaf = symmetric(x, bits=3, block=128)
    assert isinstance(leaf.codes, Packed) and leaf.codes.packed.nbytes == 1536
    assert nbytes(leaf) == held(symmetric(bits=3, block=128))
    assert int(dense(leaf.codes).max()) == 7 and int(dense(leaf.codes).min()) == 0


def test_steps_of_another_block_size_are_refused():
    leaf = symmetric(weights(48, 6), bits=4, block=16)
    for block in (24, None):
        with pytest.raises(ValueError, match="3 rows of steps for 48 inputs"):
            dataclasses.replace(leaf, block=block).materialize()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_comes_back_and_jit_rounds_alike(dtype):
    """XLA may drop a cast to bfloat16 and back under jit; values must not show it."""
    x = weights(40, 6).astype(dtype)
    for method in (symmetric(bits=5), sign_split(bits=(3, 4))):
        leaf = method(x, block=16)
        assert leaf.dtype == leaf.materialize().dtype == dtype
        inside = jax.jit(
            lambda x, method=method: (
                method(x, block=16).materialize().astype(jnp.float32)
            )
        )(x)
        outside = leaf.materialize().astype(jnp.float32)
        np.testing.assert_array_equal(inside, outside)


def test_rounding_to_bfloat16_is_explicit():
    """Not left to a pair of casts, which XLA keeps or drops by platform and version."""
    x = weights(8, 2).astype(jnp.bfloat16)
    leaf = symmetric(x, bits=4)
    store = str(jax.make_jaxpr(symmetric(bits=4))(x))
    read = str(jax.make_jaxpr(lambda leaf: leaf.materialize())(leaf))
    assert store.count("reduce_precision") == read.count("reduce_precision") == 1


def test_columns_are_those_of_the_dense_array():
    x = weights(12, 10)
    where = jnp.array([[3, 0, -9], [3, 9, 1]])
    take = jax.jit(lambda leaf, i: leaf.take_columns(i))
    for method in (
        symmetric(bits=4, block="tensor"),
        asymmetric(bits=3, block=5),
        asymmetric(bits=3),
        sign_split(bits=(2, 2), block=3),
    ):
        leaf = method(x)
        np.testing.assert_array_equal(take(leaf, where), leaf.materialize()[:, where])
    np.testing.assert_array_equal(leaf.take_columns(-2), leaf.materialize()[:, -2])


def test_columns_read_only_those_columns():
    leaf = asymmetric(weights(64, 512), bits=4, block=16)
    where = jnp.arange(3)
    text = str(jax.make_jaxpr(lambda leaf: leaf.take_columns(where))(leaf))
    assert "f32[64,3]" in text and "f32[64,512]" not in text


def test_extremes_stay_finite_and_in_bounds():
    x = np.array([[1, -1], [0.5, 1]])
    for method in (symmetric(bits=4), asymmetric(bits=4), sign_split(bits=(3, 3))):
        for size, bound in ((1e-42, 1e-35), (1e-30, 0.14e-30), (3e36, 0.14 * 3e36)):
            with jax.debug_nans(True):
                leaf = method(jnp.asarray(size * x, jnp.float32), search=True)
                values = np.asarray(leaf.materialize(), np.float64)
            np.testing.assert_allclose(values, size * x, rtol=0, atol=bound)


@pytest.mark.parametrize("power", [-100, 100])
def test_search_does_not_depend_on_the_unit(power):
    """Squares of such weights vanish or overflow in float32."""
    x = weights(24, 3)
    scaled = asymmetric(x * 2.0**power, bits=2, search=True)
    plain = asymmetric(x, bits=2, search=True)
    np.testing.assert_array_equal(dense(scaled.codes), dense(plain.codes))
    np.testing.assert_array_equal(
        np.asarray(scaled.scale, np.float32),
        np.asarray(plain.scale, np.float32) * 2.0**power,
    )


def test_steps_below_the_range_of_their_dtype_are_raised_to_it():
    x = weights(8, 2) * 1e-4
    leaf = symmetric(x, bits=8, scale_dtype="float16")
    assert jnp.all(leaf.scale == 2.0**-14)
    assert jnp.all(jnp.abs(leaf.materialize() - x) <= 2.0**-15)
    tiny = symmetric(x * 2.0**-100, bits=8)
    assert jnp.all(tiny.scale.astype(jnp.float32) == 2.0**-120)


def test_nan_and_inf_show_in_their_block_only():
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        x = weights(8, 3).at[1, 1].set(bad)
        for method in (
            symmetric(bits=4),
            symmetric(bits=1),
            symmetric(bits=2, full_range=True, search=True),
            asymmetric(bits=4, search=True),
        ):
            values = np.asarray(method(x, block=4).materialize())
            assert np.all(np.isnan(values[:4, 1]))
            assert np.isfinite(values).sum() == 20


def test_float16_scales_that_overflow_do_not_pass_for_weights():
    x = jnp.full((4, 2), 1e6)
    assert jnp.all(jnp.isnan(symmetric(x, bits=2, scale_dtype="float16").materialize()))
    assert jnp.all(jnp.isfinite(symmetric(x, bits=2).materialize()))


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (symmetric(bits=0), ValueError, "from 1 to 8, not 0"),
        (symmetric(bits=9), ValueError, "from 1 to 8, not 9"),
        (symmetric(bits=4.0), ValueError, "bits from 1 to 8"),
        (symmetric(bits=True), ValueError, "not True"),
        (
            asymmetric(bits=16),
            ValueError,
            "asymmetric takes an integer number of bits from 1 to 8",
        ),
        (sign_split(bits=4), ValueError, r"bits=\(positive, negative\), not 4"),
        (sign_split(bits=(0, 3)), ValueError, "from 1 to 7, not 0"),
        (sign_split(bits=(3, 8)), ValueError, "from 1 to 7, not 8"),
        (symmetric(bits=4, block=0), ValueError, "block of one or more inputs"),
        (symmetric(bits=4, block="row"), ValueError, "'tensor', not 'row'"),
        (asymmetric(bits=4, block=True), ValueError, "not True"),
        (symmetric(bits=4, scale_dtype="int8"), ValueError, "bfloat16' or 'float16"),
    ],
)
def test_options_out_of_range_say_what_is_allowed(method, error, message):
    with pytest.raises(error, match=message):
        method(weights(4, 4))


def test_arrays_that_are_no_weights_are_refused():
    with pytest.raises(TypeError, match="floating-point weights, not int32"):
        symmetric(jnp.ones((4, 4), jnp.int32), bits=4)
    with pytest.raises(ValueError, match=r"not shape \(4,\)"):
        asymmetric(jnp.ones(4), bits=4)
    with pytest.raises(ValueError, match="one input or more"):
        symmetric(jnp.ones((0, 4)), bits=4)
    empty = symmetric(jnp.ones((4, 0)), bits=4, block=2)
    assert empty.materialize().shape == (4, 0)


def test_scales_train_and_codes_do_not():
    leaf = symmetric(weights(8, 3), bits=4, block=4, scale_dtype="float32")
    gradient = jax.grad(lambda leaf: jnp.sum(leaf.materialize()), allow_int=True)(leaf)
    signed = np.asarray(dense(leaf.codes), int) - 8
    np.testing.assert_allclose(gradient.scale, signed.reshape(2, 4, 3).sum(1))


def test_a_leaf_of_an_unknown_grid_says_so():
    """A file whose digests were forged can name any."""
    leaf = dataclasses.replace(symmetric(weights(8, 3), bits=4), grid="")
    with pytest.raises(ValueError, match=r"grid '' is unknown; .*symmetric"):
        leaf.materialize()

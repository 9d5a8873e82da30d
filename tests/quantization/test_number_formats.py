"""Number formats, half-quadratic and activation-aware rounding, by definition."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quantization.test_gptq import correlated, loss

import jaxcompress as jc
from jaxcompress.quantization.codebooks import LEVELS, NF4
from jaxcompress.quantization.number_formats import FORMATS

INPUTS, OUTPUTS = 48, 24
FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
NEAREST = {
    "nf4": jc.nf4(block=16),
    "e4m3": jc.fp8(kind="e4m3", block=16),
    "e5m2": jc.fp8(kind="e5m2", block=16),
    "mxfp4": jc.mxfp4(),
    "nvfp4": jc.nvfp4(),
}
every = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(scope="module")
def case():
    """Weights over several magnitudes, and moments of uneven inputs."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((INPUTS, OUTPUTS))
    x = x * np.exp(rng.standard_normal((INPUTS, 1)))
    second = correlated(2, INPUTS).astype(np.float32)
    return jnp.asarray(x, jnp.float32), jc.moments_from_covariance(jnp.asarray(second))


def table(name):
    """All finite values of a format, by NumPy's extension types or by the paper."""
    if name == "nf4":
        return NF4.astype(np.float64)
    codes = np.arange(16 if name == "e2m1" else 256, dtype=np.uint8)
    values = codes.view(FLOATS[name]).astype(np.float64)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("name", list(LEVELS))
def test_codes_are_the_patterns_of_the_format(name):
    levels = LEVELS[name]
    codes = np.arange(2**levels.bits, dtype=np.uint8)
    values = np.asarray(levels.decode(jnp.asarray(codes)), np.float64)
    if name != "nf4":
        wanted = codes.view(FLOATS[name]).astype(np.float64)
        wanted = np.where(codes == 0, wanted if name != "e8m0" else 0, wanted)
        np.testing.assert_array_equal(values, wanted)
    finite = np.isfinite(values) & ((codes > 0) | (name != "e8m0"))
    back = levels.decode(levels.encode(jnp.asarray(values[finite], jnp.float32)))
    np.testing.assert_array_equal(back, values[finite])
    assert levels.largest == np.abs(values[finite]).max()


@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_small_floats_are_rounded_before_they_are_cast(grid):
    """XLA drops a cast there and back on a GPU; it must not be what rounds."""
    ratios = jnp.asarray(np.random.default_rng(0).standard_normal(4096), jnp.float32)
    program = jax.make_jaxpr(LEVELS[grid].encode)(ratios).jaxpr
    known = dict(zip(program.invars, [ratios], strict=True))
    for equation in program.eqns:
        given = [x.val if hasattr(x, "val") else known[x] for x in equation.invars]
        if equation.params.get("new_dtype") == FLOATS[grid]:
            break
        found = equation.primitive.bind(*given, **equation.params)
        several = equation.primitive.multiple_results
        known |= zip(equation.outvars, found if several else [found], strict=True)
    (rounded,) = given
    wanted = np.asarray(ratios).astype(FLOATS[grid]).astype(np.float32)
    np.testing.assert_array_equal(rounded, wanted)


def test_nf4_levels_are_quantiles():
    """QLoRA, appendix E: even quantiles of each side, scaled to 1; zero is exact."""
    from statistics import NormalDist

    offset = 0.5 * (1 / 32 + 1 / 30)  # the mean of the two sides' outermost gaps
    quantile = np.vectorize(NormalDist().inv_cdf)
    above = quantile(np.linspace(1 - offset, 0.5, 9)[:-1])
    below = -quantile(np.linspace(1 - offset, 0.5, 8)[:-1])
    wanted = np.sort([*above, 0, *below]) / above.max()
    np.testing.assert_allclose(NF4, wanted, atol=1e-6)


@every
@pytest.mark.parametrize("search", [False, True])
def test_every_weight_gets_the_nearest_level(case, name, search):
    x, _ = case
    leaf = NEAREST[name](x, search=search)
    block = leaf.block
    values = table(leaf.grid)
    scale = np.repeat(np.asarray(leaf.steps.scale, np.float64), block, axis=0)[:INPUTS]
    levels = values[None, None] * scale[:, :, None]
    wide = np.asarray(x, np.float64)
    least = np.abs(levels - wide[:, :, None]).min(-1)
    found = np.abs(np.asarray(leaf.materialize(), np.float64) - wide)
    np.testing.assert_allclose(found, least, atol=1e-6 * np.abs(wide).max())


@every
def test_scales_follow_the_definition(case, name):
    x, _ = case
    leaf = NEAREST[name](x)
    wide = np.asarray(x, np.float64)
    starts = range(0, INPUTS, leaf.block)
    largest = np.stack([np.abs(wide[i : i + leaf.block]).max(0) for i in starts])
    scale = np.asarray(leaf.steps.scale, np.float64)
    if name == "mxfp4":
        np.testing.assert_array_equal(scale, 2.0 ** (np.floor(np.log2(largest)) - 2))
    elif name == "nvfp4":
        whole = np.float64(np.float32(largest.max() / 6 / 448))
        near = (largest / 6 / whole).astype(np.float32).astype(FLOATS["e4m3"])
        np.testing.assert_allclose(scale, near.astype(np.float64) * whole, rtol=1e-6)
    else:
        np.testing.assert_allclose(scale, largest / LEVELS[name].largest, rtol=2**-8)


def test_a_search_of_powers_tries_half_and_twice():
    """Blocks of mxfp4 that gain by half the scale of their range, by none, by twice."""
    x = np.full((96, 1), 1.5, np.float32)
    x[:32], x[0] = 0.25, 4.0  # finer, though the largest is clipped
    x[32] = 6.0  # the largest level, at a step of 1
    x[64:], x[64] = 1.0, 7.9  # above it
    leaves = jc.mxfp4(jnp.asarray(x)), jc.mxfp4(jnp.asarray(x), search=True)
    plain, searched = (leaf.scale.materialize()[:, 0] for leaf in leaves)
    np.testing.assert_array_equal(searched / plain, [0.5, 1, 2])


@every
def test_a_search_never_makes_a_block_worse(case, name):
    x, _ = case

    def errors(search):
        leaf = NEAREST[name](x, search=search)
        change = np.asarray(leaf.materialize() - x, np.float64) ** 2
        return np.stack([change[i : i + 16].sum(0) for i in range(0, INPUTS, 16)])

    searched, plain = errors(True), errors(False)
    if name == "mxfp4":  # blocks of 32
        searched, plain = searched.sum(0), plain.sum(0)
    assert searched.sum() < plain.sum()
    if name != "mxfp4":
        assert np.all(searched <= plain * (1 + 1e-5))


@every
def test_bits_in_memory_and_in_a_file(name, tmp_path):
    x = jax.random.normal(jax.random.key(0), (256, 256))
    leaf = NEAREST[name](x)
    nominal = {"nf4": 5, "e4m3": 9, "e5m2": 9, "mxfp4": 4.25, "nvfp4": 4.5}[name]
    assert 8 * jc.nbytes(leaf) / x.size == pytest.approx(nominal, abs=1e-3)
    jc.save(tmp_path / "x.safetensors", {"kernel": leaf})
    size = (tmp_path / "x.safetensors").stat().st_size
    assert 8 * (size - 4096) / x.size < nominal  # the header apart
    back = jc.load(tmp_path / "x.safetensors")["kernel"]
    np.testing.assert_array_equal(back.materialize(), leaf.materialize())


@every
def test_zero_constant_and_broken_blocks(name):
    zeros = NEAREST[name](jnp.zeros((64, 3)))
    np.testing.assert_array_equal(zeros.materialize(), 0)
    assert bool(jnp.all(zeros.steps.scale > 0))
    some = NEAREST[name](jnp.zeros((64, 3)).at[:32, 0].set(6.0))
    np.testing.assert_allclose(some.materialize()[:32, 0], 6.0, rtol=0.01)
    np.testing.assert_array_equal(some.materialize()[32:], 0)
    for bad in (jnp.nan, jnp.inf):
        broken = NEAREST[name](jnp.ones((64, 3)).at[0, 0].set(bad)).materialize()
        assert bool(jnp.isnan(broken[:16, 0]).all())
    assert bool(jnp.isfinite(broken[:, 1]).all()) == (name != "nvfp4")  # one scale


@every
def test_error_feedback_on_a_format(case, name):
    x, moments = case
    nearest = NEAREST[name](x, search=True)
    fed = jc.gptq(x, moments, grid=name, block=nearest.block)
    assert jax.tree.structure(fed) == jax.tree.structure(nearest)
    np.testing.assert_array_equal(fed.steps.scale, nearest.steps.scale)
    assert loss(x, fed, moments) < 0.75 * loss(x, nearest, moments)


def test_an_embedding_reads_its_rows_from_a_format():
    table = jax.random.normal(jax.random.key(1), (90, 64))
    leaf = jc.compress({"embedding": table}, "nvfp4()")["embedding"]
    rows = leaf.take_rows(jnp.array([[3, 5], [80, 3]]))
    np.testing.assert_array_equal(
        rows, leaf.materialize()[jnp.array([[3, 5], [80, 3]])]
    )


def test_hqq_lowers_its_norm_and_shrugs_off_outliers():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((128, 20)) * 0.01
    x[::64] *= 6
    x = jnp.asarray(x, jnp.float32)

    def norms(leaf):
        steps = np.repeat(np.asarray(leaf.steps.scale, np.float64), 64, axis=0)
        error = np.abs(np.asarray(leaf.materialize(), np.float64) - np.asarray(x))
        return (error / steps) ** 0.7

    start = jc.hqq(x, bits=3, steps=1, penalty=1e9)  # shrinks all: zero stays its mean
    found = jc.hqq(x, bits=3, steps=40)
    sums = [norms(leaf).reshape(2, 64, 20).sum(1) for leaf in (start, found)]
    assert (
        np.all(sums[1] <= sums[0] * (1 + 1e-4)) and sums[1].sum() < 0.99 * sums[0].sum()
    )
    # The units of the weights change nothing.
    scaled = jc.hqq(x * 1024, bits=3, steps=40).materialize() / 1024
    np.testing.assert_array_equal(scaled, found.materialize())


def test_hqq_by_definition():
    """The half-quadratic iteration, in float64, block by block and value by value."""
    blocks = np.random.default_rng(4).standard_normal((32, 24)).astype(np.float32)
    leaf = jc.hqq(jnp.asarray(blocks), bits=2, block=32, scale_dtype="float32")
    found = []
    for w in blocks.T.astype(np.float64):
        step = (w.max() - w.min()) / 3
        zero, best, least, beta = -w.min() / step, None, np.inf, 10.0
        for _ in range(21):
            codes = np.clip(np.round(w / step + zero), 0, 3)
            error = w / step - (codes - zero)
            if (norm := (np.abs(error) ** 0.7).sum()) < least:
                best, least = zero, norm
            sparse = [
                np.sign(e) * max(abs(e) - abs(e) ** -0.3 / beta, 0) if e else 0.0
                for e in error
            ]
            zero, beta = np.mean(codes - (w / step - sparse)), beta * 1.01
        found.append(best)
    same = np.abs(np.asarray(leaf.zero_point[0]) - found) < 1e-4
    assert same.mean() > 0.9  # a tie may fall either way


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric"])
def test_awq_is_never_worse_than_nearest(case, grid):
    x, moments = case
    options = {"bits": 3, "block": 16}
    nearest = [getattr(jc, grid)(x, search=s, **options) for s in (False, True)]
    scaled = jc.awq(x, moments, grid=grid, **options)
    least = min(loss(x, leaf, moments) for leaf in nearest)
    assert loss(x, scaled, moments) < 0.9 * least
    alone = jc.awq(x, moments, grid=grid, candidates=1, **options)
    assert loss(x, alone, moments) == pytest.approx(least, rel=1e-5)
    np.testing.assert_array_equal(alone.factors, 1)


def test_awq_tries_the_exponents_it_says(case):
    """The factors are rms^-a over their geometric mean, a the best candidate."""
    x, moments = case
    found = jc.awq(
        x, moments, bits=4, candidates=5, search=False, scale_dtype="float32"
    )
    norms = np.sqrt(np.diag(np.asarray(moments.second, np.float64)))
    norms = norms / np.exp(np.mean(np.log(norms)))
    losses = []
    for exponent in np.arange(5) / 5:
        scaled = jnp.asarray(np.asarray(x) * norms[:, None] ** exponent, jnp.float32)
        value = jc.asymmetric(scaled, bits=4, scale_dtype="float32").materialize()
        change = np.asarray(value) / norms[:, None] ** exponent - np.asarray(x)
        second = np.asarray(moments.second, np.float64)
        losses.append(np.trace(change.T @ second @ change))
    best = np.argmin(losses) / 5
    assert best > 0
    np.testing.assert_allclose(found.factors, norms**-best, rtol=1e-5)
    assert loss(x, found, moments) == pytest.approx(min(losses), rel=1e-3)


def test_awq_survives_dead_and_silent_inputs(case):
    x, moments = case
    second = np.asarray(moments.second).copy()
    second[:, 5] = second[5] = 0
    silent = jc.moments_from_covariance(np.zeros_like(second))
    leaves = [jc.awq(x, jc.moments_from_covariance(second), bits=4, block=16)]
    with pytest.warns(UserWarning, match="awq: no calibration token reached it"):
        leaves.append(jc.awq(x, silent, bits=4, block=16))
    for leaf in leaves:
        assert np.isfinite(np.asarray(leaf.materialize())).all()
        assert bool(jnp.all(leaf.factors > 0))


def test_moments_follow_into_a_scaled_weight(case):
    x, moments = case
    leaf = jc.awq(x, moments, bits=8)
    inner = leaf.inner_moments("weight", moments)
    rows = np.diag(np.asarray(leaf.factors, np.float64))
    wanted = rows @ np.asarray(moments.second, np.float64) @ rows
    np.testing.assert_allclose(inner.second, wanted, rtol=1e-5, atol=1e-7)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), (x, moments))
    both = jc.awq(*stack, bits=8)
    for i in range(2):
        np.testing.assert_array_equal(both.materialize()[i], leaf.materialize())


def test_an_unscaled_bfloat16_weight_comes_back_in_bfloat16(case):
    x, moments = case
    leaf = jc.awq(x.astype(jnp.bfloat16), moments, bits=8)
    assert leaf.dtype == leaf.materialize().dtype == jnp.bfloat16
    assert leaf.shape == x.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: jc.fp8(x, kind="e3m4"), "kind='e4m3' or 'e5m2'"),
        (lambda x, m: jc.nf4(x, block=0), "nf4"),
        (lambda x, m: jc.gptq(x, m, grid="nf4", bits=3), "codes of 4 bits"),
        (lambda x, m: jc.gptq(x, m, grid="mxfp4", block=16), "blocks of 32"),
        (lambda x, m: jc.gptq(x, m, grid="fp4"), "nvfp4"),
        (lambda x, m: jc.gptq(x, m), "from 1 to 8, not None"),
        (lambda x, m: jc.hqq(x, bits=9), "from 1 to 8"),
        (lambda x, m: jc.hqq(x, bits=4, norm=0), "norm above 0"),
        (lambda x, m: jc.hqq(x, bits=4, penalty=-1), "penalty above 0"),
        (lambda x, m: jc.hqq(x, bits=4, steps=0), "steps of 1 or more"),
        (lambda x, m: jc.awq(x, bits=4), "awq needs moments"),
        (lambda x, m: jc.awq(x, m, bits=4, grid="nf4"), "grid='symmetric' or 'asym"),
        (lambda x, m: jc.awq(x, m, bits=4, candidates=0), "candidates of 1 or more"),
        (lambda x, m: jc.awq(x, m, bits=4, candidates=2.5), "number of candidates"),
    ],
)
def test_errors_say_what_to_do(case, call, message):
    with pytest.raises(ValueError, match=message):
        call(*case)

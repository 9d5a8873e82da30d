"""Integer arithmetic against Python's integers of any length and NumPy's float64."""

import jax
import numpy as np
import pytest

from jaxcompress.textcoding import fixed_point as fp

LIMIT = fp.LIMIT
EXTREMES = [0, 1, -1, 2, -2, LIMIT, -LIMIT, LIMIT - 1, 1 - LIMIT, 32768, -32769]


@pytest.fixture(scope="module")
def numbers():
    """Values of every size, the extremes first, int32 `[200]`."""
    random = np.random.default_rng(0)
    sizes = 2.0 ** random.uniform(0, 30, 200 - len(EXTREMES))
    drawn = (random.uniform(-1, 1, sizes.size) * sizes).astype(np.int64)
    return np.array([*EXTREMES, *drawn], np.int32)


def rows(values, exponent):
    return fp.Rows(np.asarray(values, np.int32), np.asarray(exponent, np.int32))


def real(x):
    return np.asarray(x.values, np.float64) * 2.0 ** np.asarray(x.exponent)


def test_shift_rounds_half_up(numbers):
    for bits in (0, 1, 2, 15, 29, 30):
        found = np.asarray(fp.shift_right(numbers, bits))
        wanted = [(int(x) + (1 << bits) // 2) >> bits for x in numbers]
        assert found.tolist() == wanted


def test_product_with_a_fraction_is_rounded_once(numbers):
    for q in (0, 1, -1, 12345, -12345, 32767, 32768, -32768):
        found = np.asarray(fp.multiply(numbers, q))
        wanted = [(int(x) * q + (1 << 14)) >> 15 for x in numbers]
        assert found.tolist() == wanted


def test_sums_and_normalization_keep_27_bits(numbers):
    x = rows(numbers.reshape(-1, 4), np.arange(50)[:, None] - 25)
    y = rows(numbers[::-1].reshape(-1, 4), np.arange(50)[::-1, None] - 20)
    total = fp.add(x, y)
    largest = np.abs(np.asarray(total.values)).max(axis=1)
    assert largest.max() <= LIMIT and largest.min() >= LIMIT // 2
    scale = np.maximum(np.abs(real(x)), np.abs(real(y))).max(axis=1, keepdims=True)
    assert (np.abs(real(total) - real(x) - real(y)) < scale / 2**27).all()


@pytest.mark.parametrize("bound", [64, 127, 455, 511, 512, 1098, 16384])
def test_rounding_to_a_bound(numbers, bound):
    x = rows(numbers.reshape(-1, 4), np.zeros((50, 1)))
    found = fp.round_to(x, bound)
    largest = np.abs(np.asarray(found.values)).max(axis=1)
    assert largest.max() <= bound
    assert largest.min() >= bound // 2
    step = 2.0 ** np.asarray(found.exponent)
    assert (np.abs(real(found) - real(x)) <= step / 2 + 1e-9).all()


def test_a_row_of_zeros_stays_zero():
    x = rows(np.zeros((1, 4)), np.zeros((1, 1)))
    epsilon = rows([[1 << 14]], [[-31]])
    for y in (fp.normalize(x), fp.round_to(x, 127), fp.divide_by_rms(x, epsilon)):
        assert not np.asarray(y.values).any()
    assert real(fp.add(x, rows([[1, 2, 3, 4]], [[5]]))).tolist() == [[32, 64, 96, 128]]


def test_fixed_point_clamps(numbers):
    x = rows(numbers[:, None], np.resize([-40, -12, 0, 3, 30, 60], (200, 1)))
    found = np.asarray(fp.to_fixed(x, 12, 1 << 20))
    wanted = np.clip(real(x) * 2.0**12, -(1 << 20), 1 << 20)
    assert np.abs(found - wanted).max() <= 0.5
    assert np.abs(found).max() == 1 << 20


def test_powers_of_a_half():
    u = np.arange(0, 40 << 12, 7, dtype=np.int32)
    found = np.asarray(fp.power_of_half(u))
    wanted = 2.0 ** (15 - u / 4096)
    assert (np.abs(found - wanted) <= 1.2e-4 * wanted + 1).all()
    assert found[0] == fp.ONE and found[-1] == 0
    assert (np.diff(found) <= 0).all()
    assert int(fp.power_of_half(np.int32(2**31 - 1))) == 0


def test_sigmoid():
    x = rows((np.linspace(-40, 40, 999) * 2**20)[:, None], np.full((999, 1), -20))
    found = np.asarray(fp.sigmoid(x))[:, 0] / fp.ONE
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-real(x)[:, 0])), atol=1e-4)


def test_inverse_root(numbers):
    x = rows(
        np.maximum(np.abs(numbers), 1)[:, None], np.resize([-9, -4, 0, 7], (200, 1))
    )
    found = fp.inverse_root(x)
    np.testing.assert_allclose(real(found), real(x) ** -0.5, rtol=2**-13)
    values = np.asarray(found.values)
    assert values.min() >= 1 << 14 and values.max() <= fp.ONE


@pytest.mark.parametrize("width", [1, 3, 64, 100, 1025])
def test_division_by_the_root_mean_square(width):
    random = np.random.default_rng(width)
    values = random.normal(size=(20, width)) * 2.0 ** random.uniform(8, 26, (20, 1))
    values[0] = LIMIT
    x = rows(values, np.resize([-30, -12, 0, 5], (20, 1)))
    epsilon = rows([[21475]], [[-31]])
    found = real(fp.divide_by_rms(x, epsilon))
    wanted = real(x) / np.sqrt((real(x) ** 2).mean(-1, keepdims=True) + real(epsilon))
    np.testing.assert_allclose(found, wanted, rtol=3e-4, atol=1e-6)


def test_element_wise_product(numbers):
    x = rows(numbers.reshape(-1, 4), np.arange(50)[:, None] - 25)
    y = rows(np.roll(numbers, 9).reshape(-1, 4), np.arange(50)[:, None] - 3)
    found = fp.product(x, y)
    assert np.abs(np.asarray(found.values)).max() <= LIMIT
    wanted = real(x) * real(y)
    scale = np.abs(real(x)).max(-1, keepdims=True) * np.abs(real(y)).max(
        -1, keepdims=True
    )
    assert (np.abs(real(found) - wanted) <= scale / 2**13).all()


def test_results_do_not_depend_on_the_compiler(numbers):
    """Compiled as one program, and operation by operation."""

    def everything(x, y):
        total = fp.add(fp.product(x, y), fp.divide_by_rms(x, one))
        values = fp.multiply(total.values, fp.sigmoid(x))
        return fp.round_to(fp.Rows(values, x.exponent), 99)

    one = rows([[1]], [[-9]])
    x = rows(numbers.reshape(-1, 4), np.arange(50)[:, None] - 25)
    y = rows(numbers[::-1].reshape(-1, 4), np.arange(50)[:, None] - 30)
    for left, right in zip(jax.jit(everything)(x, y), everything(x, y), strict=True):
        assert np.array_equal(left, right)

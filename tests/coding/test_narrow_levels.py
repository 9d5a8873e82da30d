"""Levels packed in groups of inputs: the same integers, in few bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.coding.levels import narrow
from jaxcompress.coding.levels.narrow import narrow_levels
from jaxcompress.coding.levels.rate_coded import RateCoded
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tree import products
from jaxcompress.tree.leaf import Arithmetic, contract

INPUTS, OUTPUTS = 40, 67


def levels(kind, *lead, dtype=np.int8):
    random = np.random.default_rng(3)
    shape = (*lead, INPUTS, OUTPUTS)
    x = np.rint(3 * random.normal(size=shape)).astype(dtype)
    if kind == "one wide input":
        x[..., 5, 0], x[..., 5, 1] = np.iinfo(dtype).max - 1, np.iinfo(dtype).min
    elif kind == "constant":
        x[:] = -7
    elif kind == "far from zero":
        x[..., 9, :] = np.clip(x[..., 9, :], -3, 3) + 100
    return x


KINDS = ("bell", "one wide input", "constant", "far from zero")


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_restored_and_multiplied(kind, dtype):
    """Integers exactly; products against NumPy in float64."""
    x = levels(kind, dtype=dtype)
    small = narrow_levels(x)
    back = small.materialize()
    assert back.dtype == dtype and small.shape == x.shape
    np.testing.assert_array_equal(back, x)
    inputs = np.random.default_rng(1).normal(size=(3, INPUTS)).astype(np.float32)
    y = jax.jit(lambda x, w: contract(x, w, Arithmetic()))(inputs, small)
    want = inputs.astype(np.float64) @ x
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6 * np.abs(x).max() * INPUTS)


def test_slices_of_a_stack_are_those_of_the_whole():
    x = levels("one wide input", 3)
    small = narrow_levels(x)
    np.testing.assert_array_equal(small.materialize(), x)
    np.testing.assert_array_equal(
        jax.tree.map(lambda a: a[1], small).materialize(), x[1]
    )
    _, sliced = jax.lax.scan(lambda c, w: (c, w.materialize()), 0, small)
    np.testing.assert_array_equal(sliced, x)


def test_levels_take_about_the_bits_that_their_inputs_need():
    """One wide input does not make the others wide, nor one wide level its input."""
    random = np.random.default_rng(0)
    x = random.integers(-8, 8, (256, 256)).astype(np.int16)
    x[3] *= 9
    x[7, 100], x[9, 100] = 1000, -900
    small = narrow_levels(x)
    side = small.order.nbytes + small.shift.nbytes
    assert small.widths == (8, 4) and small.sizes == (8, 248) and small.most == 2
    assert jc.nbytes(small.rare) == 2 * (1 + 1 + 2)
    assert jc.nbytes(small) == (8 * 8 + 248 * 4) * 32 + 8 + side
    np.testing.assert_array_equal(small.materialize(), x)


def test_groups_cost_least(monkeypatch):
    """Against every way to cut a small order."""
    monkeypatch.setattr(narrow, "WIDTHS", (8, 5, 4, 2))
    cost = np.random.default_rng(0).integers(0, 9, (4, 20)).astype(np.float64)
    cost = np.sort(cost, axis=1)[:, ::-1]
    ends, least = (0, 8, 16, 20), np.inf
    for chosen in itertools.combinations(range(4), 3):
        for cuts in itertools.combinations_with_replacement(ends, 2):
            bounds = itertools.pairwise((0, *cuts, 20))
            sums = [
                cost[w, a:b].sum() for w, (a, b) in zip(chosen, bounds, strict=True)
            ]
            least = min(least, sum(sums))
    widths, sizes = narrow._groups(cost)
    bounds = itertools.pairwise(np.cumsum([0, *sizes]))
    rows = [narrow.WIDTHS.index(width) for width in widths]
    found = sum(cost[w, a:b].sum() for w, (a, b) in zip(rows, bounds, strict=True))
    assert sum(sizes) == 20 and found == least


@pytest.mark.parametrize("kind", KINDS)
def test_some_outputs_are_those_of_the_whole(kind):
    x = levels(kind, dtype=np.int16)
    small, at = narrow_levels(x), jnp.array([[5, 0], [66, 5]])
    np.testing.assert_array_equal(small.take_columns(at), x[:, at])


def test_levels_of_too_many_bits_are_refused():
    x = np.array([[-(2**30), 1], [0, 0]], np.int32)
    with pytest.raises(ValueError, match=r"levels of 2\^30"):
        narrow_levels(x)


@pytest.mark.parametrize("tile", [INPUTS, 10**6])
def test_rare_levels_are_multiplied_some_at_a_time(tile, monkeypatch):
    """And their gradient is that of the whole."""
    monkeypatch.setattr(products, "TILE", tile)
    x = levels("bell", dtype=np.int16)
    rows, columns = np.random.default_rng(2).integers(0, INPUTS, (2, 30))
    x[rows, columns] = 999
    small = narrow_levels(x)
    assert 20 < (small.rare[2] != 0).sum() < 100
    inputs = np.random.default_rng(1).normal(size=(3, INPUTS)).astype(np.float32)
    weigh = np.random.default_rng(4).normal(size=(3, OUTPUTS)).astype(np.float32)
    y = lambda x: (contract(x, small, Arithmetic()) * weigh).sum()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(y))(inputs)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(value, (inputs @ wide * weigh).sum(), rtol=1e-4)
    np.testing.assert_allclose(gradient, weigh @ wide.T, rtol=1e-4, atol=1e-2)


def test_a_rate_coded_weight_multiplies_by_narrow_levels():
    random = np.random.default_rng(6)
    steps = jnp.asarray(random.uniform(0.5, 1.5, INPUTS), jnp.bfloat16)
    scales = jc.pack_bits(jnp.asarray(random.integers(0, 9, (1, OUTPUTS))), bits=4)
    weight = RateCoded(levels("bell"), steps, scales, np.dtype("float32"))
    packed = decode_once({"kernel": weight}, packed=True)["kernel"]
    np.testing.assert_array_equal(packed.materialize(), weight.materialize())
    x = random.normal(size=(2, 3, INPUTS)).astype(np.float32)
    want = x.astype(np.float64) @ np.asarray(weight.materialize(), np.float64)
    for leaf in (weight, packed):
        y = jax.jit(lambda x, w: contract(x, w, Arithmetic()))(x, leaf)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
        at = jnp.array([[3, 60], [0, 3]])
        np.testing.assert_array_equal(leaf.take_columns(at), leaf.materialize()[:, at])
        made = jax.jit(lambda w, i: w.tiles()(i, 9))(leaf, 30)
        np.testing.assert_array_equal(made, leaf.materialize()[:, 30:39])
    assert jc.nbytes(packed) < 0.8 * jc.nbytes(weight)


def test_a_large_narrow_weight_is_multiplied_by_in_tiles(monkeypatch):
    x = levels("one wide input", dtype=np.int16)
    small, seen = narrow_levels(x), []
    monkeypatch.setattr(narrow, "tiles_pay", lambda shape: seen.append(shape) or True)
    monkeypatch.setattr(products, "TILE", 16 * INPUTS)
    inputs = np.random.default_rng(1).normal(size=(3, INPUTS)).astype(np.float32)
    y = jax.jit(lambda x, w: contract(x, w, Arithmetic()))(inputs, small)
    want = inputs.astype(np.float64) @ x
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6 * np.abs(x).max() * INPUTS)
    assert len(seen) == sum(width > 0 for width in small.widths)


def test_codes_are_packed_and_packed_codes_stay():
    x = jax.random.normal(jax.random.key(0), (64, 64))
    small = jc.compress({"a": x, "b": x**3}, [("[ab]", "symmetric(bits=4, block=16)")])
    coded = jc.compress(small, [("b/codes", "entropy_code()")])
    assert coded["b"].codes.entropy_coded
    packed = decode_once(coded, packed=True)
    assert packed["a"].codes.packed is coded["a"].codes.packed
    np.testing.assert_array_equal(packed["b"].codes.packed, small["b"].codes.packed)
    assert jc.nbytes(packed) == jc.nbytes(small)
    assert jc.nbytes(decode_once(coded)) > 1.5 * jc.nbytes(packed)


def test_what_is_made_for_running_is_not_written(tmp_path):
    narrow = narrow_levels(jnp.ones((4, 8), jnp.int8))
    with pytest.raises(TypeError, match=r"w is of type NarrowLevels.*made for running"):
        jc.save(tmp_path / "a.safetensors", {"w": narrow})
    assert not list(tmp_path.iterdir())

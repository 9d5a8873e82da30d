"""Levels packed in groups of inputs: the same integers, in few bits."""

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
    """One wide input does not make the others wide; a byte is not spent on 4 bits."""
    random = np.random.default_rng(0)
    x = random.integers(-8, 8, (256, 256)).astype(np.int8)
    x[3, 0] = 100
    small = narrow_levels(x)
    side = small.order.nbytes + small.shift.nbytes
    wide = 256 * 4 * (1 + 1 + 1)  # a word of each is begun
    assert {*small.widths} == {7, 4}
    assert jc.nbytes(small) == 248 * 256 // 2 + wide + side


@pytest.mark.parametrize("kind", KINDS)
def test_some_outputs_are_those_of_the_whole(kind):
    x = levels(kind, dtype=np.int16)
    small, at = narrow_levels(x), jnp.array([[5, 0], [66, 5]])
    np.testing.assert_array_equal(small.take_columns(at), x[:, at])
    cut = jax.jit(lambda w, i: w.cut_columns(i, 7).materialize())(small, 20)
    np.testing.assert_array_equal(cut, x[:, 20:27])


def test_levels_of_too_many_bits_are_refused():
    x = np.array([[-40000, 40000], [0, 0]], np.int32)
    with pytest.raises(ValueError, match="span 80000"):
        narrow_levels(x)


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
    assert len(seen) == len(small.widths)


def test_codes_are_packed_and_packed_codes_stay():
    x = jax.random.normal(jax.random.key(0), (64, 64))
    small = jc.compress({"a": x, "b": x**3}, [("[ab]", "symmetric(bits=4, block=16)")])
    coded = jc.compress(small, [("b/codes", "entropy_code()")])
    assert coded["b"].codes.entropy_coded
    packed = decode_once(coded, packed=True)
    assert packed["a"].codes is coded["a"].codes
    np.testing.assert_array_equal(packed["b"].codes.packed, small["b"].codes.packed)
    assert jc.nbytes(packed) == jc.nbytes(small)
    assert jc.nbytes(decode_once(coded)) > 1.5 * jc.nbytes(packed)


def test_what_is_made_for_running_is_not_written(tmp_path):
    narrow = narrow_levels(jnp.ones((4, 8), jnp.int8))
    with pytest.raises(TypeError, match=r"w is of type NarrowLevels.*made for running"):
        jc.save(tmp_path / "a.safetensors", {"w": narrow})
    assert not list(tmp_path.iterdir())

"""Packed bits by the definition, and the tables of the coder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lossless_checks import check

from jaxcompress.coding import pack_bits, record, tables
from jaxcompress.coding.packing import packed_rows
from jaxcompress.tree.leaf import dense

RANDOM = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test draws the same, whichever ran before it."""
    global RANDOM
    RANDOM = np.random.default_rng(7)


def packed_by_definition(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of a matrix of codes, written out as strings of bits."""
    rows, start = [], 0
    for width in [8] * (bits // 8) + [w for w in (4, 2, 1) if bits & w]:
        for first in range(0, len(codes), 8 // width):
            row = []
            for column in codes.T:
                byte = ""
                for code in column[first : first + 8 // width]:
                    text = format(int(code), "032b")[::-1][start : start + width]
                    byte = text[::-1] + byte
                row.append(int(byte, 2))
            rows.append(row)
        start += width
    return np.array(rows, np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 11, 24, 32])
def test_packed_bytes_are_those_of_the_definition(bits):
    dtype = np.uint8 if bits <= 8 else np.uint32
    for length in (8, 13):
        codes = RANDOM.integers(0, 2**bits, (length, 3), dtype=np.uint64).astype(dtype)
        wanted = packed_by_definition(codes, bits)
        for one in (codes, jnp.asarray(codes)):
            packed = pack_bits(one, bits)
            np.testing.assert_array_equal(packed.packed, wanted)
            check(packed, codes)
        ragged = length * bits % 8 + 7 * 3  # at most seven bits lost in each field
        assert wanted.size <= 3 * (length * bits + ragged) / 8
    vector = pack_bits(codes[:, 0], bits)
    np.testing.assert_array_equal(vector.packed, wanted[:, 0])
    check(vector, codes[:, 0])
    few = pack_bits(codes.T, bits)  # three inputs, thirteen outputs
    rows = packed_by_definition(codes.T, bits)
    np.testing.assert_array_equal(few.packed, wanted.T if few.axis == -1 else rows)
    assert few.packed.size == min(wanted.size, rows.size)
    check(few, codes.T)
    assert pack_bits(codes[:1, 0], bits).packed.size == packed_rows(bits, 1)


def test_packed_is_cut_along_the_stack_by_scan_vmap_and_index():
    codes = RANDOM.integers(0, 8, (4, 9, 5)).astype(np.int8)
    packed = jax.jit(lambda x: pack_bits(x, 3))(codes)
    assert packed.packed.shape == (4, packed_rows(3, 9), 5)
    check(packed, codes)
    scan = jax.jit(lambda p: jax.lax.scan(lambda c, x: (c, dense(x)), 0, p)[1])
    np.testing.assert_array_equal(scan(packed), codes)
    np.testing.assert_array_equal(jax.vmap(dense)(packed), codes)
    np.testing.assert_array_equal(dense(jax.tree.map(lambda x: x[2], packed)), codes[2])
    stacked = jax.vmap(lambda x: pack_bits(x, 3))(codes)
    np.testing.assert_array_equal(stacked.packed, packed.packed)


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\[0, 9\].*\[0, 7\]"):
        pack_bits(np.arange(10), 3)
    with pytest.raises(ValueError, match=r"\[-1, 6\]"):
        pack_bits(jnp.arange(8) - 1, 3)
    with pytest.raises(ValueError, match="1 to 32"):
        pack_bits(np.arange(10), 0)
    with pytest.raises(ValueError, match="scalar"):
        pack_bits(np.uint8(1), 3)
    with pytest.raises(TypeError, match="float32"):
        pack_bits(np.ones(4, np.float32), 3)


# Tables


@pytest.mark.parametrize("seed", range(6))
def test_normalized_tables_cost_hardly_more_than_the_best(seed):
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(12, [0.02, 0.1, 1.0][seed % 3]))
    counts = random.multinomial(20000, shares)
    sizes = tables.normalize(counts).astype(int)
    assert sizes.sum() == 4096 and ((sizes > 0) == (counts > 0)).all()
    best = (counts > 0).astype(int)  # units dealt one by one to where they gain most
    for _ in range(4096 - best.sum()):
        gain = np.where(best > 0, counts * np.log2(1 + 1 / np.maximum(best, 1)), -1)
        best[gain.argmax()] += 1
    seen = counts > 0
    excess = (counts * np.log2(np.where(seen, best / np.maximum(sizes, 1), 1))).sum()
    assert -1e-6 <= excess <= 1e-3 * counts.sum() * 12 / 8


def test_number_lists_come_back_and_damaged_ones_raise():
    numbers = [0, 0, 5, 300, 0, 2**31, 0, 0, 0]
    data = record.write_numbers(numbers)
    read = record.Record(data, "x")
    assert read.numbers(len(numbers)) == numbers and not len(read)
    with pytest.raises(ValueError, match="cut off"):
        record.Record(data[:-2], "x").numbers(len(numbers))
    with pytest.raises(ValueError, match="longer than its list"):
        record.Record(data, "x").numbers(len(numbers) - 1)
    assert [record.unfold_sign(record.fold_sign(n)) for n in (0, -1, 7, -300)] == [
        0,
        -1,
        7,
        -300,
    ]

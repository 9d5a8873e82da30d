"""Frequencies and coder against the written rule, in Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.textcoding import frequencies, lanes


def logits_of(vocabulary, rows=6):
    """Flat, peaked, tied and extreme logits, in units of 2**-12."""
    random = np.random.default_rng(vocabulary)
    found = random.normal(0, 3, (rows, vocabulary)) * 4096
    found[0] = 0
    found[1] *= 20
    found[2] = -(1 << 28)
    found[2, vocabulary // 2] = 1 << 28
    found[3, ::7] = found[3].max()
    return found.astype(np.int32)


def whole(logits):
    """Probabilities of all tokens, from the intervals of every one: `[rows, V]`."""
    vocabulary = logits.shape[1]
    find = jax.jit(frequencies.find_intervals)
    tokens = np.arange(vocabulary, dtype=np.int32)
    found = [
        find(np.broadcast_to(row, (vocabulary, vocabulary)), tokens) for row in logits
    ]
    return np.stack(found)


@pytest.mark.parametrize("vocabulary", [2, 64, 65, 300])
def test_intervals_divide_the_whole_and_are_near_the_softmax(vocabulary):
    logits = logits_of(vocabulary)
    intervals = whole(logits)
    starts, sizes = intervals[..., 0], intervals[..., 1]
    assert sizes.min() >= 1
    root = {tuple(x) for x in intervals[3, :, 0]}
    assert sum(size for _, size in root) == frequencies.TOTAL
    ends = np.cumsum([size for _, size in sorted(root)])
    assert [start for start, _ in sorted(root)] == [0, *ends[:-1]]
    assert (starts + sizes <= frequencies.TOTAL).all()
    found = np.prod(sizes / frequencies.TOTAL, axis=-1)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-12)
    exact = np.exp2((logits - logits.max(-1, keepdims=True)) / 4096)
    exact /= exact.sum(-1, keepdims=True)
    divergence = (exact * np.log2(np.maximum(exact, 1e-300) / found)).sum(-1)
    assert divergence.max() < 126 / 65536 / np.log(2)


def test_three_levels_and_the_largest_vocabulary():
    assert [frequencies.depth_of(n) for n in (1, 64, 65, 4096, 4097, 262144)] == [
        *(1, 1, 2, 2, 3, 3)
    ]
    with pytest.raises(ValueError, match="262145 tokens"):
        frequencies.depth_of(262145)
    logits = logits_of(5000, 4)
    tokens = np.array([0, 4999, 2500, 77], np.int32)
    sizes = np.asarray(jax.jit(frequencies.find_intervals)(logits, tokens))[..., 1]
    found = np.log2(sizes / 65536).sum(-1)
    exact = logits[np.arange(4), tokens] / 4096
    exact -= np.log2(np.exp2((logits - logits.max(-1)[:, None]) / 4096).sum(-1))
    exact -= logits.max(-1) / 4096
    assert np.abs(found - exact)[[0, 2]].max() < 0.01
    assert (found >= -48).all()


def test_the_rule_of_a_node():
    """As the module says it, one child at a time."""
    random = np.random.default_rng(0)
    weights = (2.0 ** random.uniform(0, 27, (40, 64))).astype(np.int32)
    weights[0, 1:] = 0
    weights[1] = 5
    valid = np.ones((40, 64), np.int32)
    valid[2, 50:], weights[2, 50:] = 0, 0
    found = np.asarray(jax.jit(frequencies.frequencies)(weights, valid))
    for row, ok, own in zip(weights.tolist(), valid.tolist(), found, strict=True):
        bits = max(0, max(row).bit_length() - 15)
        row = [(x + (1 << bits) // 2) >> bits for x in row]
        shares = [max((x << 16) // sum(row), v) for x, v in zip(row, ok, strict=True)]
        shares[row.index(max(row))] -= sum(shares) - 65536
        assert own.tolist() == shares and min(shares) >= min(ok)


def test_lanes_of_all_lengths_come_back():
    random = np.random.default_rng(1)
    sizes = random.integers(1, 200, 64) ** 2
    sizes = np.maximum(sizes * 65536 // sizes.sum(), 1)
    sizes[0] += 65536 - sizes.sum()
    starts = np.cumsum(sizes) - sizes
    symbols = [random.integers(0, 64, n) for n in (0, 1, 700, 255)]
    coded = lanes.encode_lanes(
        [
            np.stack([starts[x], sizes[x]], -1) if len(x) else np.zeros((0, 2))
            for x in symbols
        ]
    )
    assert coded[0] == (65536).to_bytes(4, "little")
    bits = sum(-np.log2(sizes[x] / 65536).sum() for x in symbols)
    assert 8 * sum(map(len, coded)) < bits + 4 * 33
    reader = lanes.open_lanes(coded)
    table = jnp.asarray(np.stack([starts, sizes]).astype(np.int32))
    advance = jax.jit(lanes.advance)
    for step in range(700):
        slot = np.asarray(reader.state) & 0xFFFF
        found = np.searchsorted(starts, slot, side="right") - 1
        active = np.array([step < len(x) for x in symbols])
        for lane in np.flatnonzero(active):
            assert found[lane] == symbols[lane][step]
        after = advance(reader, *table[:, found])
        state = jnp.where(active, after.state, reader.state)
        position = jnp.where(active, after.position, reader.position)
        reader = lanes.Reader(state, position, reader.words)
    assert lanes.is_finished(reader, coded).all()
    assert not lanes.is_finished(reader._replace(state=reader.state + 1), coded).any()


def test_bytes_that_are_no_lane():
    for bad in (b"", b"abc", b"abcde"):
        with pytest.raises(ValueError, match="lane 1 has"):
            lanes.open_lanes([b"abcd", bad])

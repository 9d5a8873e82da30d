"""Blocks of symbols sorted into classes that have tables of their own.

Symbols are logarithms, so blocks of other scales are shifted copies of each other, as
good as. A table for several costs each of its symbols half their Fisher information
times the variance of the shifts, in nats (S. Kullback, "Information Theory and
Statistics", 1959, 2.6). Blocks in order of their mean symbol are cut where that, and
the tables, cost least: at bounds of 32 equal shares, by dynamic programming (R.
Bellman, "On the approximation of curves by line segments using dynamic programming",
1961).
"""

import math

import numpy as np

MOST = 8
SHARES = 4  # for each class there may be
BLOCKS = 64  # in a class, at least
TABLE = 1000.0  # bits that one more table takes, and must gain beyond chance
SAMPLE = 1 << 13  # symbols that are counted


def classes_of(symbols: np.ndarray) -> np.ndarray:
    """The class of each block, uint8 `[blocks]`.

    All classes but the last have multiples of four blocks, so that no block lies across
    two of the four streams that a table's literals are split into.

    Args:
      symbols: uint8 `[blocks, symbols]`.
    """
    blocks, width = symbols.shape
    most = min(MOST, blocks // BLOCKS)
    if most < 2:
        return np.zeros(blocks, np.uint8)
    sums = _sums(symbols)
    order = np.argsort(sums, kind="stable")
    starts = np.arange(0, blocks, -(-blocks // (4 * SHARES * most)) * 4)
    means = sums[order] / width
    weight = width * _information(symbols) / 2 / math.log(2)
    powers = [np.ones(blocks), means, means**2]
    counts, first, second = (np.add.reduceat(x, starts) for x in powers)
    classes = np.empty(blocks, np.uint8)
    cut = _cut(counts, first, second, weight, most)
    classes[order] = np.repeat(cut, counts.astype(int))
    return classes


def _information(symbols: np.ndarray) -> float:
    """Fisher information that a symbol has of a shift, from a sample; without zeros."""
    sample = symbols.reshape(-1)[:: max(1, symbols.size // SAMPLE)]
    counts = np.bincount(sample, minlength=258).astype(np.float64)
    counts[0] = 0
    below, here, above = counts[:-2], counts[1:-1], counts[2:]
    smooth = (below + 2 * here + above) / 4
    slopes = (above - below)[smooth > 0] / 2
    return float((slopes**2 / smooth[smooth > 0]).sum() / max(1, smooth.sum()))


def _sums(symbols: np.ndarray) -> np.ndarray:
    """Sums of rows of at most 1024 bytes, a multiple of 8; four 16-bit sums a word."""
    eight = symbols.view(np.uint64)
    mask = np.uint64(0x00FF00FF00FF00FF)
    four = (eight & mask) + ((eight >> np.uint64(8)) & mask)
    return four.sum(axis=1).view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.uint32)


def _cut(
    counts: np.ndarray, first: np.ndarray, second: np.ndarray, weight: float, most: int
) -> np.ndarray:
    """The class of each share: runs of shares that cost least, tables included.

    Args:
      counts: `[shares]` of blocks; first, second: sums of their means and of squares.
      weight: bits that a block costs for the square of its distance from the others.
      most: classes.
    """
    shares = len(counts)
    runs = np.tri(shares + 1, k=-1, dtype=bool)  # from a column to before a row
    within = np.zeros((3, shares + 1))
    within[:, 1:] = np.cumsum([counts, first, second], axis=1)
    total, one, two = within[:, :, None] - within[:, None]
    bits = weight * (two - one**2 / np.where(runs, total, 1)) + TABLE
    bits[~runs] = np.inf
    best = np.full(shares + 1, np.inf)
    best[0] = 0
    rows, came = [], []
    for _ in range(most):
        paths = best + bits
        came.append(paths.argmin(axis=1))
        best = paths.min(axis=1)
        rows.append(best[shares])
    classes = np.zeros(shares, np.uint8)
    at = shares
    for number in range(int(np.argmin(rows)), -1, -1):
        at = came[number][at]
        if at:
            classes[at:] += 1
    return classes

"""Blocks of symbols sorted into classes that have tables of their own.

Symbols are logarithms, so blocks of other scales are shifted copies of each other, as
good as. A table for several costs each of its symbols half their Fisher information
times the variance of the shifts, in nats (S. Kullback, "Information Theory and
Statistics", 1959, 2.6). So the means of blocks are quantized, to as many levels as
tables are worth, in cells as wide as the density of the means to the power -1/3 (P. F.
Panter, W. Dite, "Quantization distortion in pulse-count modulation with nonuniform
spacing of levels", 1951).
"""

import math

import numpy as np

from jaxcompress.entropy.splits import room

MOST = 8
SHARES = 64  # of blocks in order, that stay together
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
    starts = np.arange(0, blocks, -(-blocks // (4 * SHARES)) * 4)
    bounds = sums[order[np.append(starts, blocks - 1)]] / width
    # The integral of the density to the power 1/3, share by share.
    parts = np.diff(bounds) ** (2 / 3) / len(starts) ** (1 / 3)
    ends = np.cumsum(parts)
    # Bits with one table; with n of them, in all, this by their square, and the tables.
    loss = blocks * width * _information(symbols) / math.log(4) * ends[-1] ** 3 / 12
    count = int(np.clip(np.rint((2 * loss / TABLE) ** (1 / 3)), 1, most))
    cells = (ends - parts / 2) * (count / max(ends[-1], 1e-9))
    _, cells = np.unique(cells.astype(np.uint8), return_inverse=True)
    classes = np.empty(blocks, np.uint8)
    classes[order] = np.repeat(cells, np.diff(np.append(starts, blocks)))
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
    four = np.bitwise_and(eight, mask, out=room("four", eight.shape, np.uint64))
    more = np.right_shift(eight, np.uint64(8), out=room("more", eight.shape, np.uint64))
    np.add(four, np.bitwise_and(more, mask, out=more), out=four)
    return four.sum(axis=1).view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.uint32)

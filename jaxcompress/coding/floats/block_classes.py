"""Blocks of symbols sorted into classes that have tables of their own.

Symbols are logarithms, so blocks of other scales are approximately shifted copies of
each other. A table for several costs each of its symbols half their Fisher information
times the variance of the shifts, in nats (S. Kullback, "Information Theory and
Statistics", 1959, 2.6). So the means of blocks are quantized, to as many levels as
pay for their tables, in cells as wide as the density of the means to the power -1/3
(P. F. Panter, W. Dite, "Quantization distortion in pulse-count modulation with
nonuniform spacing of levels", 1951).
"""

import math

import numpy as np

from jaxcompress.coding.floats.bit_fields import room

MOST = 8
SHARES = 64  # of blocks in order, that stay together
BLOCKS = 64  # for each class there may be, on average
TABLE = 1000.0  # bits that one more table takes, and must gain beyond chance


def classes_of(sums: np.ndarray, symbols: np.ndarray, width: int) -> np.ndarray:
    """Return the class of each block, uint8 `[blocks]`.

    All classes but the last have multiples of four blocks, so that no block is across
    two of the four streams that a table's literals are split into.

    Args:
      sums: of the symbols of each block, integers `[blocks]`.
      symbols: uint8 of any shape, a sample.
      width: symbols of a block.
    """
    blocks = sums.size
    most = min(MOST, blocks // BLOCKS)
    if most < 2:
        return np.zeros(blocks, np.uint8)
    order = np.argsort(sums, kind="stable")
    starts = np.arange(0, blocks, -(-blocks // (4 * SHARES)) * 4)
    bounds = sums[order[np.append(starts, blocks - 1)]] / width
    # The integral of the density to the power 1/3, share by share.
    parts = np.diff(bounds) ** (2 / 3) / len(starts) ** (1 / 3)
    ends = np.cumsum(parts)
    # Bits with one table; with n of them, in all, this by their square, and the tables.
    loss = blocks * width * _information(symbols) * float(ends[-1]) ** 3
    loss /= 12 * math.log(4)
    count = min(max(round((2 * loss / TABLE) ** (1 / 3)), 1), most)
    # Rounded, as what is between two cells would depend on the last bit.
    cells = np.round((ends - parts / 2) * (count / max(ends[-1], 1e-9)), 6)
    cells = np.minimum(cells.astype(np.int8), count - 1)
    steps = np.zeros(blocks, bool)
    steps[starts[1:]] = cells[1:] != cells[:-1]  # none is left out
    classes = np.empty(blocks, np.uint8)
    classes[order] = np.cumsum(steps, dtype=np.uint8)
    return classes


def _information(symbols: np.ndarray) -> float:
    """Return fisher information that a symbol has of a shift; without zeros."""
    counts = np.bincount(symbols.reshape(-1), minlength=258).astype(np.float64)
    counts[0] = 0
    below, middle, above = counts[:-2], counts[1:-1], counts[2:]
    smooth = (below + 2 * middle + above) / 4
    slopes = (above - below)[smooth > 0] / 2
    return float((slopes**2 / smooth[smooth > 0]).sum() / max(1, smooth.sum()))


def sums_of(symbols: np.ndarray, paired: bool) -> np.ndarray:
    """Return sums of the symbols in rows of bytes, of which each holds one or two."""
    sums = np.add.reduce(symbols, axis=1, dtype=np.uint32)
    if not paired:
        return sums
    some = np.bitwise_and(
        symbols, np.uint8(15), out=room("some", symbols.shape, np.uint8)
    )
    some = np.add.reduce(some, axis=1, dtype=np.uint32)
    return some + (sums - some) // 16

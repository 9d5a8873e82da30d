"""Blocks of symbols sorted into classes that have tables of their own.

Blocks are put in order of their mean symbol, which is that of their scale, and the
order is cut where that gains most: at bounds of sixteen equal shares, by dynamic
programming over the entropies of a sample's counts (R. Bellman, "On the approximation
of curves by line segments using dynamic programming", 1961).
"""

import numpy as np

MOST = 8
BLOCKS = 64  # in a class, at least
TABLE = 500.0  # bits that one more table takes, about
SAMPLE = 1 << 16  # symbols that are counted, as many of each block, 32 or more


def classes_of(symbols: np.ndarray) -> np.ndarray:
    """The class of each block, uint8 `[blocks]`.

    All classes but the last have multiples of four blocks, so that no block lies across
    two of the four streams that a table's literals are split into.

    Args:
      symbols: uint8 `[blocks, symbols]`.
    """
    blocks = symbols.shape[0]
    most = min(MOST, blocks // BLOCKS)
    if most < 2:
        return np.zeros(blocks, np.uint8)
    order = np.argsort(_sums(symbols), kind="stable")
    share = -(-blocks // (8 * most)) * 4
    shares = np.empty(blocks, np.int64)
    shares[order] = np.arange(blocks) // share
    count = int(shares.max()) + 1
    sample = symbols[:, : max(32, SAMPLE // blocks)]
    counts = np.bincount(
        (shares[:, None] * 256 + sample).ravel(), minlength=256 * count
    )
    counts = counts.reshape(count, 256)
    counts = counts[:, counts.any(axis=0)].astype(np.float64)
    scale = symbols.shape[1] / sample.shape[1]
    return _cut(counts, scale, most)[shares]


def _sums(symbols: np.ndarray) -> np.ndarray:
    """Sums of rows of at most 1024 bytes, a multiple of 8; four 16-bit sums a word."""
    eight = symbols.view(np.uint64)
    mask = np.uint64(0x00FF00FF00FF00FF)
    four = (eight & mask) + ((eight >> np.uint64(8)) & mask)
    return four.sum(axis=1).view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.uint32)


def _cut(counts: np.ndarray, scale: float, most: int) -> np.ndarray:
    """The class of each share: runs of shares that cost least, tables included.

    Args:
      counts: `[shares, symbols]`, of a sample.
      scale: symbols for each of the sample.
      most: classes.
    """
    shares = len(counts)
    below = np.concatenate([np.zeros((1, counts.shape[1])), counts.cumsum(axis=0)])
    first, last = np.triu_indices(shares + 1, 1)
    within = below[last] - below[first]
    total = within.sum(axis=1)
    inside = (within * np.log2(np.maximum(within, 1))).sum(axis=1)
    bits = np.full((shares + 1, shares + 1), np.inf)
    bits[first, last] = scale * (total * np.log2(total) - inside) + TABLE
    best = np.full(shares + 1, np.inf)
    best[0] = 0
    rows, came = [], []
    for _ in range(most):
        paths = best[:, None] + bits
        came.append(paths.argmin(axis=0))
        best = paths.min(axis=0)
        rows.append(best[shares])
    classes = np.zeros(shares, np.uint8)
    at = shares
    for number in range(int(np.argmin(rows)), -1, -1):
        at = came[number][at]
        if at:
            classes[at:] += 1
    return classes

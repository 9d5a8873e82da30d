"""Contexts for integer codes from the scale of their row or column."""

import numpy as np

KINDS = 8
GAIN = 0.995  # of the order-0 entropy, at most, to pay for a table for each kind
TABLE = 800.0  # bits that one more table takes, about
FEWEST = 1 << 14  # codes of a slice


def contexts_by_scale(codes: np.ndarray) -> np.ndarray | None:
    """Return which of up to eight tables each row, or each column, of codes should use.

    Rows and columns are sorted by the mean size of their codes, taken from the middle
    of each slice, into kinds of equal shares. A geometric model of each row would be
    "parametric"; a table for each kind needs no model, and costs a byte a row.

    Args:
      codes: integers `[slices, rows, columns]`.

    Returns: uint8 `[slices, rows, 1]` or `[slices, 1, columns]`; None where neither
      makes codes that span at most 256 values smaller by half a percent.
    """
    slices, rows, columns = codes.shape
    low = codes.reshape(slices, -1).min(axis=1)
    span = int((codes.reshape(slices, -1).max(axis=1).astype(np.int64) - low).max())
    if rows * columns < FEWEST or not 0 < span < 256:
        return None
    numbers = codes.astype(np.int64) - low[:, None, None]
    plain = sum(_entropy(part.reshape(1, -1), span) for part in numbers)
    middle = np.median(numbers, axis=(1, 2), keepdims=True)
    best, contexts = GAIN * plain, None
    for axis in (2, 1):
        sizes = np.abs(numbers - middle).mean(axis=axis)
        order = np.argsort(np.argsort(sizes, axis=1, kind="stable"), axis=1)
        kinds = (order * KINDS // sizes.shape[1]).astype(np.uint8)
        bits = 0.0
        for part, kind in zip(numbers, kinds, strict=True):
            lines = part if axis == 2 else part.T
            sorted_lines = [lines[kind == k].reshape(-1) for k in range(KINDS)]
            bits += sum(_entropy(x[None], span) + TABLE for x in sorted_lines if x.size)
        bits += 8.0 * kinds.size
        if bits < best:
            best, contexts = bits, np.expand_dims(kinds, axis)
    return contexts


def _entropy(numbers: np.ndarray, span: int) -> float:
    counts = np.bincount(numbers.reshape(-1), minlength=span + 1).astype(np.float64)
    seen = counts[counts > 0]
    return float(seen @ np.log2(seen.sum() / seen))

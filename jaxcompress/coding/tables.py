"""Fits frequency tables to counts."""

import heapq

import numpy as np

from jaxcompress.coding.rans import PRECISION, TOTAL


def normalize(counts: np.ndarray) -> np.ndarray:
    """Return frequencies uint16 `[columns]`, summing to 4096, that code the counts
    cheapest.

    Every counted column gets at least one. Rounded first; what is missing or over is
    then taken where it costs the fewest bits. Without counts column 0 gets all.

    Raises:
      ValueError: more than 4096 counted columns.
    """
    counts = np.asarray(counts, np.float64)
    if not counts.any():
        return np.where(np.arange(counts.size) == 0, TOTAL, 0).astype(np.uint16)
    if np.count_nonzero(counts) > TOTAL:
        raise ValueError(
            f"{np.count_nonzero(counts)} symbols do not fit a table of {TOTAL}; "
            "let the rare ones escape"
        )
    ideal = counts * (TOTAL / counts.sum())
    sizes = np.where(counts > 0, np.maximum(1, np.rint(ideal)), 0).astype(np.int64)
    missing = TOTAL - int(sizes.sum())
    step = 1 if missing > 0 else -1

    def change(column: int) -> float:
        """Return bits that one step more at this column costs."""
        size = int(sizes[column])
        if size + step <= 0:
            return np.inf
        return counts[column] * float(np.log2(size / (size + step)))

    if missing:
        queue = [(change(column), column) for column in np.flatnonzero(counts)]
        heapq.heapify(queue)
        for _ in range(abs(missing)):
            _, column = queue[0]
            sizes[column] += step
            heapq.heapreplace(queue, (change(column), column))
    return sizes.astype(np.uint16)


def cost(counts: np.ndarray, frequencies: np.ndarray) -> float:
    """Return bits that so many symbols take with these frequencies."""
    seen = counts > 0
    return float(counts[seen] @ (PRECISION - np.log2(frequencies[seen])))


def entropy(counts: np.ndarray) -> float:
    """Return bits of so many symbols at their order-0 entropy."""
    seen = counts[counts > 0].astype(np.float64)
    return float(seen @ np.log2(seen.sum() / seen)) if seen.size else 0.0


def keep(
    values: np.ndarray, counts: np.ndarray, escape_bits: int
) -> tuple[np.ndarray, float]:
    """Return which of the sorted values deserve a place in the table, the others
    escaping.

    Returns: a boolean mask, and the bits of all symbols, escapes and table included.
    """
    total = counts.sum()
    best = np.ones(counts.shape, bool), 0.0 if not total else np.inf
    for threshold in (0.0, 0.25, 0.5, 1.0, 2.0):
        kept = counts > total * threshold / TOTAL
        if np.count_nonzero(kept) >= TOTAL:
            continue
        escaped = counts[~kept].sum()
        reduced = np.append(counts[kept], escaped)
        bits = cost(reduced, normalize(reduced)) + float(escaped) * escape_bits
        gaps = np.diff(values[kept].astype(np.float64))  # bytes of seven bits
        bits += 8 * (np.count_nonzero(kept) + np.ceil(np.log2(gaps) / 7).sum())
        if bits < best[1]:
            best = kept, bits
    return best

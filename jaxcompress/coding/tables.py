"""Frequency tables: fitted to counts, and written small."""

import heapq
from collections.abc import Iterable

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


def write_numbers(numbers: Iterable[int]) -> bytes:
    """Return numbers >= 0, seven bits to a byte, lowest first; zeros as 0, their run -
    1.
    """
    out = bytearray()

    def put(number: int) -> None:
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)

    run = 0
    for number in numbers:
        if number and run:
            out.append(0)
            put(run - 1)
        run = 0 if number else run + 1
        if number:
            put(int(number))
    if run:
        out.append(0)
        put(run - 1)
    return bytes(out)


def read_numbers(data: memoryview, at: int, count: int) -> tuple[list[int], int]:
    """Read `count` numbers that `write_numbers` wrote at `at`, and where they end.

    Raises:
      ValueError: the data end early or hold something else.
    """

    def get() -> int:
        nonlocal at
        number, shift = 0, 0
        while True:
            if at >= len(data) or shift > 56:
                raise ValueError("a list of numbers is cut off or damaged")
            number |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return number

    out: list[int] = []
    while len(out) < count:
        number = get()
        if number:
            out.append(number)
            continue
        run = get() + 1
        if run > count - len(out):
            raise ValueError("a run of zeros is longer than its list")
        out.extend([0] * run)
    return out, at


def fold_sign(number: int) -> int:
    """Fold signs: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return 2 * number if number >= 0 else -2 * number - 1


def unfold_sign(number: int) -> int:
    """Undo `fold_sign`."""
    return -(number + 1) // 2 if number & 1 else number // 2

"""Symbol models of integer arrays: bytes, contexts, escapes and low bits."""

import dataclasses

import numpy as np

from jaxcompress.coding import tables
from jaxcompress.coding.packing import field_widths, pack_fields, packing_axis
from jaxcompress.coding.rans import count_lanes
from jaxcompress.coding.record import write_numbers

LANE_BITS = 34  # state and length, less what the state holds of the symbols
Histogram = tuple[np.ndarray, np.ndarray]  # sorted values, their counts


@dataclasses.dataclass(frozen=True)
class View:
    """Codes `[slices, *trailing]` as the numbers `[slices, symbols]` that are coded.

    Args:
      numbers: int32, or uint8 where `width` is not 0.
      base: int32 `[slices]`, taken off first where `width` is not 0; else None.
      contexts: uint8, like `numbers`; or None.
      kinds: number of contexts.
      width: bits of a code, several of which share a byte; 0 for whole codes.
      low_bits: lowest bits of each code, left out of the numbers.
    """

    numbers: np.ndarray
    base: np.ndarray | None
    contexts: np.ndarray | None
    kinds: int
    width: int
    low_bits: int

    def histograms(self) -> list[Histogram]:
        """Return values and counts of each slice and, within it, each context."""
        pairs = []
        for s, row in enumerate(self.numbers):
            for kind in range(self.kinds):
                numbers = (
                    row if self.contexts is None else row[self.contexts[s] == kind]
                )
                if self.width:
                    counts = np.bincount(numbers, minlength=1)
                    values = np.flatnonzero(counts)
                    pairs.append((values, counts[values]))
                else:
                    pairs.append(np.unique(numbers, return_counts=True))
        return pairs


@dataclasses.dataclass(frozen=True)
class Plan:
    """A view and its tables; `symbols` None where columns are the bytes themselves.

    Args:
      frequencies: uint16 `[slices, contexts, columns]`.
      symbols: int32 like `frequencies`, the values listed; or None.
      columns: `[slices, symbols]`.
      escape: 16-bit words that follow a symbol of the last column.
      lanes: 0 where every code of a slice is its base.
    """

    view: View
    frequencies: np.ndarray
    symbols: np.ndarray | None
    columns: np.ndarray
    escape: int
    lanes: int


def plan(codes: np.ndarray, contexts: np.ndarray | None) -> Plan:
    """Return plan for int32 codes `[slices, *trailing]` that makes the smallest file.

    Where slices span 256 values or fewer, bytes (of several narrow codes side by side
    along the inputs, too); else whole codes without their lowest bits. Tables have a
    column for each byte, or list values, of which the rare ones escape. What decodes
    slower must be smaller by a thousandth or more.
    """
    low = codes.reshape(codes.shape[0], -1).min(axis=1)
    high = codes.reshape(codes.shape[0], -1).max(axis=1)
    span = int((high.astype(np.int64) - low).max())
    views = []
    if span < 256:
        narrow = [width for width in (1, 2, 4) if 0 < span < 1 << width]
        views = [_bytes(codes, low, None, width) for width in (*narrow, 8)]
        if contexts is not None:
            views.append(_bytes(codes, low, contexts, 8))
    else:
        views = [_whole(codes, None)]
        if contexts is not None:
            views.append(_whole(codes, contexts))
    least, best = np.inf, None
    for view in views:
        histograms = view.histograms()
        lanes = view.numbers.shape[0] * count_lanes(view.numbers.shape[1])
        slower = 1 + 0.001 * min(view.width, 8)
        for listed in (False, True) if view.width and span else (not view.width,):
            bits = (_listed_bits if listed else _bits)(view, histograms)
            lane_bits = min(lanes * LANE_BITS, bits / 500)
            score = (bits + lane_bits) * (slower + 0.001 * listed)
            if score < least:
                least, best = score, (view, histograms, listed, bits)
    view, histograms, listed, bits = best
    per_slice = bits / codes.shape[0]
    lanes = count_lanes(view.numbers.shape[1], int(per_slice / 8))
    if not span:
        lanes = 0
    return (_list if listed else _dense)(view, histograms, lanes)


def _bytes(
    codes: np.ndarray, base: np.ndarray, contexts: np.ndarray | None, width: int
) -> View:
    slices = codes.shape[0]
    numbers = (codes - base.reshape((slices,) + (1,) * (codes.ndim - 1))).astype(
        np.uint8
    )
    if width < 8:
        axis = packing_axis(codes.shape[1:], width)
        numbers = pack_fields(numbers, width, axis=axis)
    return View(numbers.reshape(slices, -1), base, *_kinds(contexts, slices), width, 0)


def _whole(codes: np.ndarray, contexts: np.ndarray | None) -> View:
    flat = codes.reshape(codes.shape[0], -1)
    low_bits = _raw_bits(flat)
    return View(flat >> low_bits, None, *_kinds(contexts, codes.shape[0]), 0, low_bits)


def _kinds(contexts: np.ndarray | None, slices: int) -> tuple[np.ndarray | None, int]:
    if contexts is None:
        return None, 1
    return contexts.reshape(slices, -1), int(contexts.max()) + 1


def _bits(view: View, histograms: list[Histogram]) -> float:
    """Return bits in the file with a column for each byte."""
    bits = 0.0
    for values, counts in histograms:
        sizes = tables.normalize(counts)
        full = np.zeros(int(values.max(initial=0)) + 1, np.int64)
        full[values] = sizes
        bits += tables.cost(counts, sizes) + 8 * len(write_numbers(full))
    return bits + view.low_bits * view.numbers.size


def _listed_bits(view: View, histograms: list[Histogram]) -> float:
    """Return bits in the file with values listed."""
    escape = 16 * _words(view)
    bits = sum(tables.keep(*histogram, escape)[1] for histogram in histograms)
    return bits + sum(field_widths(view.low_bits)) * float(view.numbers.size)


def _words(view: View) -> int:
    """Return 16-bit words that hold any number of a view."""
    low, high = view.numbers.min(), view.numbers.max()
    return 1 if low >= -(2**15) and high < 2**15 else 2


def _dense(view: View, histograms: list[Histogram], lanes: int) -> Plan:
    most = int(view.numbers.max()) + 1
    frequencies = np.zeros((len(histograms), most), np.uint16)
    for row, (values, counts) in zip(frequencies, histograms, strict=True):
        full = np.zeros(most, np.int64)
        full[values] = counts
        row[:] = tables.normalize(full)
    shape = (view.numbers.shape[0], view.kinds, most)
    return Plan(view, frequencies.reshape(shape), None, view.numbers, 0, lanes)


def _list(view: View, histograms: list[Histogram], lanes: int) -> Plan:
    words = _words(view)
    kept = [tables.keep(*histogram, 16 * words)[0] for histogram in histograms]
    escapes = not all(mask.all() for mask in kept)
    most = max(1, max(int(mask.sum()) for mask in kept) + escapes)
    frequencies = np.zeros((len(histograms), most), np.uint16)
    symbols = np.zeros((len(histograms), most), np.int32)
    columns = np.full(view.numbers.shape, most - 1, np.uint16)
    for i, ((values, counts), mask) in enumerate(zip(histograms, kept, strict=True)):
        values, padded = values[mask], np.zeros(most, np.int64)
        padded[: values.size] = counts[mask]
        if escapes:
            padded[-1] = counts[~mask].sum()
        frequencies[i] = tables.normalize(padded)
        symbols[i, : values.size] = values
        if not values.size:
            continue
        s, kind = divmod(i, view.kinds)
        positions = slice(None) if view.contexts is None else view.contexts[s] == kind
        mine = view.numbers[s, positions]
        nearest = np.minimum(np.searchsorted(values, mine), values.size - 1)
        columns[s, positions] = np.where(values[nearest] == mine, nearest, most - 1)
    shape = (view.numbers.shape[0], view.kinds, most)
    return Plan(
        view,
        frequencies.reshape(shape),
        symbols.reshape(shape),
        columns,
        words if escapes else 0,
        lanes,
    )


def _raw_bits(flat: np.ndarray) -> int:
    """Return how many of the lowest bits are best left out of the tables."""
    values, counts = np.unique(flat, return_counts=True)
    best, bits = 0, np.inf
    for low_bits in range(32):
        high = values >> low_bits
        first = np.flatnonzero(np.append(True, high[1:] != high[:-1]))
        merged = np.add.reduceat(counts, first)
        words = 16 if high[0] >= -(2**15) and high[-1] < 2**15 else 32
        total = tables.keep(high[first], merged, words)[1] + low_bits * flat.size
        if total < bits:
            best, bits = low_bits, total
        if first.size <= 16:
            break
    return best

"""The bytes of a coded array in a file: no padding, tables as short lists."""

import math
from typing import Any

import numpy as np

from jaxcompress.coding import rans
from jaxcompress.coding.packing import packed_rows, packing_axis
from jaxcompress.coding.tables import (
    fold_sign,
    read_numbers,
    unfold_sign,
    write_numbers,
)


def write(coded: Any) -> bytes:
    """Return header and tables of a `Coded`, then each lane's words and state, then
    words.

    Numbers of the header: one more than the stack axes, their sizes, one more than the
    lanes, contexts, columns, 2 if values are listed else 1; then per slice the base,
    and per table its frequencies, or the number of listed values, the values as
    differences less one, and their frequencies with that of the escape. Little endian.
    """
    lead, lanes = coded.states.shape[:-1], coded.states.shape[-1]
    slices = math.prod(lead)
    contexts, width = coded.frequencies.shape[-2:]
    listed = coded.symbols is not None
    head = [len(lead) + 1, *lead, lanes + 1, contexts, width, 1 + listed]
    out = [write_numbers(head)]
    if coded.base is not None:
        base = np.asarray(coded.base).ravel().tolist()
        out.append(write_numbers([fold_sign(number) for number in base]))
    tables = np.asarray(coded.frequencies).reshape(-1, width)
    if not listed:
        out += [write_numbers(row) for row in tables.tolist()]
    else:
        symbols = np.asarray(coded.symbols, np.int64).reshape(-1, width)
        own = width - bool(coded.escape)
        for row, values in zip(tables, symbols, strict=True):
            values = values[:own][row[:own] > 0]
            steps = (np.diff(values) - 1).tolist()
            first = [fold_sign(int(number)) for number in values[:1]]
            sizes = np.append(row[:own][row[:own] > 0], row[own:])
            out.append(write_numbers([values.size, *first, *steps, *sizes.tolist()]))
    offsets = np.asarray(coded.offsets).reshape(slices, lanes + 1)
    lengths = np.diff(offsets)
    wide = lengths.size and lengths.max() >= 1 << 16
    out.append(bytes([4 if wide else 2]))
    out.append(lengths.astype("<u4" if wide else "<u2").tobytes())
    out.append(np.asarray(coded.states).astype("<u4").tobytes())
    words = np.asarray(coded.words).reshape(slices, coded.words.shape[-1])
    for row, last in zip(words, offsets[:, -1], strict=True):
        out.append(row[:last].astype("<u2").tobytes())
    return b"".join(out)


def read(arrays: dict[str, np.ndarray], static: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Coded`, from what it stored and its static fields.

    NumPy arrays that share no memory with what was stored, so that the stream may be
    freed before they go to a device.

    Raises:
      ValueError: arrays and static fields do not fit each other. (What fits and is
        wrong all the same, a checksum must find.)
    """
    data = memoryview(np.ascontiguousarray(arrays["stream"], np.uint8))
    trailing = tuple(static["trailing"])
    width, escape, low_bits = static["width"], static["escape"], static["low_bits"]
    fits = 0 <= width <= 8 and 0 <= low_bits <= 32 and 0 <= escape <= 2
    _require(fits, f"{width} and {low_bits} bits, {escape} words")
    (axes,), at = read_numbers(data, 0, 1)
    _require(0 < axes < 16, f"{axes - 1} stack axes")
    lead, at = read_numbers(data, at, axes - 1)
    (lanes, contexts, columns, listed), at = read_numbers(data, at, 4)
    lanes -= 1
    slices = math.prod(lead)
    _require(slices * contexts <= len(data), f"{slices} slices of {contexts} contexts")
    _require(0 < contexts <= 256, f"{contexts} contexts")
    _require(0 < columns <= rans.TOTAL, f"{columns} columns")
    rows = list(trailing)
    if width:
        axis = packing_axis(trailing, width)
        rows[axis] = packed_rows(width, rows[axis])
    most = rans.count_lanes(math.prod(rows))
    _require(0 <= lanes <= most, f"{lanes} lanes for {math.prod(rows)} symbols")
    base, symbols = None, None
    if width:
        base, at = read_numbers(data, at, slices)
        base = [unfold_sign(number) for number in base]
        _require(all(-(2**31) <= n < 2**31 for n in base), "a base past 32 bits")
        base = np.array(base, np.int32)
    tables, values = [], []  # one by one: damage ends it before they are many
    for _ in range(slices * contexts):
        row, named = np.zeros((2, columns), np.int64)
        if listed == 2:
            at = _read_listed(data, at, named, row, bool(escape))
            values.append(named.astype(np.int32))
        else:
            row[:], at = read_numbers(data, at, columns)
        _require(row.sum() == rans.TOTAL, "tables off their sum")
        tables.append(row.astype(np.uint16))
    shape = slices, contexts, columns
    frequencies = np.reshape(np.array(tables, np.uint16), shape)
    if listed == 2:
        symbols = np.reshape(np.array(values, np.int32), shape)
    _require(at < len(data) and data[at] in (2, 4), "no lane lengths")
    size, at = data[at], at + 1
    count = slices * lanes
    _require(
        at + count * (size + 4) <= len(data), f"{lanes} lanes in {len(data)} bytes"
    )
    lengths = np.frombuffer(data, f"<u{size}", count, at).reshape(slices, lanes)
    states = np.frombuffer(data, "<u4", count, at + count * size)
    at += count * (size + 4)
    offsets = np.zeros((slices, lanes + 1), np.int64)
    np.cumsum(lengths, axis=1, out=offsets[:, 1:])
    total = int(offsets[:, -1].sum())
    _require(at + 2 * total == len(data), f"{len(data) - at} bytes of {total} words")
    padded = np.zeros((slices, int(offsets[:, -1].max(initial=0))), np.uint16)
    for row, last in zip(padded, offsets[:, -1], strict=True):
        row[:last] = np.frombuffer(data, "<u2", int(last), at)
        at += 2 * int(last)
    return {
        "words": _stacked(padded, lead),
        "offsets": _stacked(offsets.astype(np.int32), lead),
        "states": _stacked(states.astype(np.uint32).reshape(slices, lanes), lead),
        "frequencies": _stacked(frequencies, lead),
        "base": None if base is None else _stacked(base, lead),
        "symbols": None if symbols is None else _stacked(symbols, lead),
        **_beside(arrays, tuple(lead), trailing, low_bits, contexts),
        **{**static, "trailing": trailing},
    }


def _read_listed(
    data: bytes, at: int, symbols: np.ndarray, sizes: np.ndarray, escape: bool
) -> int:
    (count,), at = read_numbers(data, at, 1)
    _require(count + escape <= sizes.size, f"{count} listed values")
    numbers, at = read_numbers(data, at, 2 * count + escape)
    if count:
        steps = np.array([unfold_sign(numbers[0]), *numbers[1:count]], np.float64)
        values = np.cumsum(steps) + np.arange(count)
        _require(np.abs(values).max() <= 2**31, "listed values past 32 bits")
        symbols[:count] = values.astype(np.int64).astype(np.int32)
    listed = np.array(numbers[count : 2 * count], np.float64)
    _require((listed <= rans.TOTAL).all(), "a frequency past its table")
    sizes[:count] = listed
    if escape:
        sizes[-1] = min(numbers[-1], rans.TOTAL + 1)
    return at


def _beside(
    arrays: dict[str, np.ndarray],
    lead: tuple[int, ...],
    trailing: tuple[int, ...],
    low_bits: int,
    tables: int,
) -> dict[str, np.ndarray | None]:
    """Return raw low bits and contexts, stored as they are."""
    low, contexts = arrays.get("low"), arrays.get("contexts")
    _require((low is None) == (low_bits == 0), f"low bits for {low_bits} bits")
    if low is not None:
        shape = list(lead + trailing)
        axis = packing_axis(trailing, low_bits)
        shape[axis] = packed_rows(low_bits, shape[axis])
        _require(low.shape == tuple(shape), f"low bits of shape {low.shape}")
        _require(low.dtype == np.uint8, f"low bits of dtype {low.dtype}")
    if contexts is not None:
        fits = contexts.ndim == len(lead) + len(trailing) and all(
            have in (1, want)
            for have, want in zip(contexts.shape, lead + trailing, strict=True)
        )
        _require(fits, f"contexts of shape {contexts.shape}")
        _require(contexts.max(initial=0) < tables, "a context without a table")
    return {
        "low": low,
        "contexts": contexts,
    }


def _stacked(x: np.ndarray, lead: list[int]) -> np.ndarray:
    return x.reshape((*lead, *x.shape[1:]))


def _require(fits: bool, found: str) -> None:
    if not fits:
        raise ValueError(f"not a coded array: {found}; the file is damaged")

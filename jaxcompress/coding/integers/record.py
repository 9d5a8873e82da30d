"""The bytes of a coded array in a file: no padding, tables as short lists."""

import math
from typing import Any

import numpy as np

from jaxcompress.coding import rans
from jaxcompress.coding.packing import packed_rows, packing_axis
from jaxcompress.coding.record import (
    Record,
    fold_sign,
    lane_lengths,
    unfold_sign,
    write_numbers,
    write_stack,
    write_words,
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
    contexts, width = coded.frequencies.shape[-2:]
    listed = coded.symbols is not None
    head = [*write_stack(lead), lanes + 1, contexts, width, 1 + listed]
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
    lengths, wide = lane_lengths(coded.offsets)
    out.append(bytes([wide]))
    out.append(lengths.astype(f"<u{wide}").tobytes())
    out.append(np.asarray(coded.states).astype("<u4").tobytes())
    out.append(write_words(coded.words, coded.offsets))
    return b"".join(out)


def read(arrays: dict[str, np.ndarray], static: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Coded`, from what it stored and its static fields.

    NumPy arrays that share no memory with what was stored, so that the stream may be
    freed before they move to a device.

    Raises:
      ValueError: arrays and static fields do not fit each other. (What fits and is
        wrong all the same, a checksum must find.)
    """
    data = Record(
        np.ascontiguousarray(arrays["stream"], np.uint8).data, "a coded array"
    )
    trailing = tuple(static["trailing"])
    width, escape, low_bits = static["width"], static["escape"], static["low_bits"]
    fits = 0 <= width <= 8 and 0 <= low_bits <= 32 and 0 <= escape <= 2
    data.require(fits, f"{width} and {low_bits} bits, {escape} words")
    lead, most = data.stack(), len(data)
    lanes, contexts, columns, listed = data.numbers(4)
    lanes -= 1
    slices = math.prod(lead)
    data.require(slices * contexts <= most, f"{slices} slices of {contexts} contexts")
    data.require(0 < contexts <= 256, f"{contexts} contexts")
    data.require(0 < columns <= rans.TOTAL, f"{columns} columns")
    rows = list(trailing)
    if width:
        axis = packing_axis(trailing, width)
        rows[axis] = packed_rows(width, rows[axis])
    fits = 0 <= lanes <= rans.count_lanes(math.prod(rows))
    data.require(fits, f"{lanes} lanes for {math.prod(rows)} symbols")
    base = None
    if width:
        numbers = [unfold_sign(number) for number in data.numbers(slices)]
        data.require(all(-(2**31) <= n < 2**31 for n in numbers), "a base past 32 bits")
        base = np.array(numbers, np.int32)
    shape = slices, contexts, columns
    escapes = bool(escape) if listed == 2 else None
    frequencies, symbols = _read_tables(data, shape, escapes)
    (size,) = data.take(1, "no lane lengths")
    data.require(size in (2, 4), f"lane lengths of {size} bytes")
    lengths = data.array(f"<u{size}", (slices, lanes), f"{lanes} lanes")
    states = data.array("<u4", (slices, lanes), f"{lanes} lanes").astype(np.uint32)
    fields = {
        **data.words(lengths),
        "states": states,
        "frequencies": frequencies,
        "base": base,
        "symbols": symbols,
    }
    stacked = {
        name: None if x is None else x.reshape((*lead, *x.shape[1:]))
        for name, x in fields.items()
    }
    kept = _read_kept(data, arrays, lead, trailing, low_bits, contexts)
    return {**stacked, **kept, **static, "trailing": trailing}


def _read_tables(
    data: Record, shape: tuple[int, int, int], escape: bool | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return frequencies `[slices, contexts, columns]`, and values of columns where
    listed.

    `escape` says whether listed values have one; None where columns are the values.
    """
    slices, contexts, columns = shape
    tables, values = [], []  # one by one: damage ends it before they are many
    for _ in range(slices * contexts):
        sizes, named = np.zeros((2, columns), np.int64)
        if escape is None:
            sizes[:] = data.numbers(columns)
        else:
            _read_listed(data, named, sizes, escape)
            values.append(named.astype(np.int32))
        data.require(sizes.sum() == rans.TOTAL, "tables off their sum")
        tables.append(sizes.astype(np.uint16))
    symbols = None if escape is None else np.reshape(np.array(values, np.int32), shape)
    return np.reshape(np.array(tables, np.uint16), shape), symbols


def _read_listed(
    data: Record, symbols: np.ndarray, sizes: np.ndarray, escape: bool
) -> None:
    (count,) = data.numbers(1)
    data.require(count + escape <= sizes.size, f"{count} listed values")
    numbers = data.numbers(2 * count + escape)
    if count:
        steps = np.array([unfold_sign(numbers[0]), *numbers[1:count]], np.float64)
        values = np.cumsum(steps) + np.arange(count)
        data.require(np.abs(values).max() <= 2**31, "listed values past 32 bits")
        symbols[:count] = values.astype(np.int64).astype(np.int32)
    listed = np.array(numbers[count : 2 * count], np.float64)
    data.require((listed <= rans.TOTAL).all(), "a frequency past its table")
    sizes[:count] = listed
    if escape:
        sizes[-1] = min(numbers[-1], rans.TOTAL + 1)


def _read_kept(
    data: Record,
    arrays: dict[str, np.ndarray],
    lead: tuple[int, ...],
    trailing: tuple[int, ...],
    low_bits: int,
    tables: int,
) -> dict[str, np.ndarray | None]:
    """Return raw low bits and contexts, stored as they are."""
    low, contexts = arrays.get("low"), arrays.get("contexts")
    data.require((low is None) == (low_bits == 0), f"low bits for {low_bits} bits")
    if low is not None:
        shape = list(lead + trailing)
        axis = packing_axis(trailing, low_bits)
        shape[axis] = packed_rows(low_bits, shape[axis])
        data.require(low.shape == tuple(shape), f"low bits of shape {low.shape}")
        data.require(low.dtype == np.uint8, f"low bits of dtype {low.dtype}")
    if contexts is not None:
        fits = contexts.ndim == len(lead) + len(trailing) and all(
            have in (1, want)
            for have, want in zip(contexts.shape, lead + trailing, strict=True)
        )
        data.require(fits, f"contexts of shape {contexts.shape}")
        data.require(contexts.max(initial=0) < tables, "a context without a table")
    return {"low": low, "contexts": contexts}

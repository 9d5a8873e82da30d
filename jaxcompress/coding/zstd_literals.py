"""Parser of Zstandard frames that hold literals only (RFC 8878).

A byte plane without repetitions compresses, in Zstandard, to blocks of Huffman-coded
literals and nothing else: four streams of bits per block and a table. `parse` finds
them, so that a decoder in XLA can read the very bytes that the library wrote, and
`lengths_of` undoes the coding of the tables.

Y. Collet, M. Kucherawy, "Zstandard compression and the application/zstd media type",
RFC 8878 (2021): frames 3.1.1, literals 3.1.1.3.1, Huffman 4.2, FSE 4.1.
"""

from typing import NamedTuple

import numpy as np

TABLE_BITS = 11  # longest Huffman code that the library writes
MAGIC = b"\x28\xb5\x2f\xfd"


class Streams(NamedTuple):
    """Huffman-coded literals of one block; streams of bits are read from their ends.

    Args:
      count: literals in all.
      ends: bytes after the last one of each of the streams, 1 or 4, which hold
        `ceil(count / 4)` literals each, the last one the rest.
      lengths: uint8 `[256]`, bits of each symbol's code, 0 where it has none.
    """

    count: int
    ends: tuple[int, ...]
    lengths: np.ndarray


def parse(frame: bytes) -> list[Streams] | None:
    """Return blocks of a frame; None where one holds more than Huffman-coded literals.

    Positions are relative to the frame. What the library accepts is understood; a
    damaged frame gives None or an error of ours, as any ValueError.

    Raises:
      ValueError: not a frame, or one that ends early.
    """
    if len(frame) < 6 or frame[:4] != MAGIC:
        raise ValueError("not a Zstandard frame")
    flags = frame[4]
    at = 5 + (not flags & 32) + (0, 1, 2, 4)[flags & 3]
    at += (1 if flags & 32 else 0, 2, 4, 8)[flags >> 6]
    blocks: list[Streams] = []
    lengths = None
    last = False
    while not last:
        if at + 3 > len(frame):
            raise ValueError("a Zstandard frame ends early")
        head = int.from_bytes(frame[at : at + 3], "little")
        last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
        if kind != 2:
            return None
        block = _literals(frame, at + 3, at + 3 + size, lengths)
        if block is None:
            return None
        blocks.append(block)
        lengths, at = block.lengths, at + 3 + size
    return blocks


def _literals(
    frame: bytes, at: int, end: int, lengths: np.ndarray | None
) -> Streams | None:
    """Return the literals of a compressed block, if there is nothing else in it."""
    if end > len(frame) or end - at < 6:
        return None
    kind, form = frame[at] & 3, frame[at] >> 2 & 3
    if kind < 2:
        return None
    wide = (3, 3, 4, 5)[form]
    bits = (10, 10, 14, 18)[form]
    head = int.from_bytes(frame[at : at + wide], "little") >> 4
    count, size = head & (1 << bits) - 1, head >> bits
    at += wide
    stop = at + size
    if stop + 1 != end or frame[stop]:
        return None  # there are sequences
    if kind == 2:
        lengths, at = lengths_of(frame, at)
    if lengths is None:
        return None
    if form == 0:
        return Streams(count, (stop,), lengths)
    jumps = [int.from_bytes(frame[at + i : at + i + 2], "little") for i in (0, 2, 4)]
    at += 6
    ends = np.cumsum([at, *jumps])[1:].tolist()
    if ends[-1] >= stop:
        raise ValueError("streams of literals overlap")
    return Streams(count, (*ends, stop), lengths)


def lengths_of(data: bytes, at: int) -> tuple[np.ndarray, int]:
    """Return lengths of the codes that a tree description at `at` gives, and where it
    ends.
    """
    size = data[at]
    at += 1
    if size < 128:
        end = at + size
        weights = _fse_weights(data[at:end])
    else:
        count = size - 127
        end = at + (count + 1) // 2
        pairs = data[at:end]
        weights = [half for byte in pairs for half in (byte >> 4, byte & 15)][:count]
    total = sum(1 << weight - 1 for weight in weights if weight)
    if not total or len(weights) > 255:
        raise ValueError("a Huffman table is empty")
    bits = total.bit_length()
    rest = (1 << bits) - total
    if rest & (rest - 1) or bits > TABLE_BITS:
        raise ValueError("a Huffman table is not complete")
    weights = np.array([*weights, rest.bit_length()])
    lengths = np.zeros(256, np.uint8)
    lengths[: weights.size] = np.where(weights > 0, bits + 1 - weights, 0)
    return lengths, end


def _fse_weights(data: bytes) -> list[int]:
    """Return weights coded with a finite state entropy table of their own."""
    bits = int.from_bytes(data, "little")
    accuracy, at = (bits & 15) + 5, 4
    if accuracy > 7:
        raise ValueError("an FSE table of a Huffman table is too large")
    left, counts = 1 << accuracy, []
    while left > 0:
        most = left + 1  # a value is one more than the count, -1 included
        width = most.bit_length()
        low = (1 << width) - 1 - most  # values that one bit less tells
        value = bits >> at & (1 << width) - 1
        if value & (1 << width - 1) - 1 < low:
            value &= (1 << width - 1) - 1
            at += width - 1
        else:
            if value >= 1 << width - 1:
                value -= low
            at += width
        counts.append(value - 1)
        left -= abs(value - 1)
        if value == 1:
            while True:
                more = bits >> at & 3
                at += 2
                counts += [0] * more
                if more < 3:
                    break
        if len(counts) > 256 or at > 8 * len(data):
            raise ValueError("an FSE table is damaged")
    if left:
        raise ValueError("an FSE table is damaged")
    symbols, widths, bases = _fse_table(counts, accuracy)
    stream = data[-(-at // 8) :]
    if not stream or not stream[-1]:
        raise ValueError("weights of a Huffman table end early")
    value = int.from_bytes(stream, "little")
    left = value.bit_length() - 1
    value &= (1 << left) - 1

    def take(width: int) -> int:
        """Return the next bits, from the end; zeros after the last."""
        nonlocal left
        left -= width
        field = value >> left if left >= 0 else value << -left
        return field & (1 << width) - 1

    states, out = [take(accuracy), take(accuracy)], []
    while True:
        for i in (0, 1):
            if len(out) > 255:
                raise ValueError("weights of a Huffman table do not end")
            state = states[i]
            out.append(symbols[state])
            states[i] = bases[state] + take(widths[state])
            if left < 0:
                return [*out, symbols[states[1 - i]]]


def _fse_table(
    counts: list[int], accuracy: int
) -> tuple[list[int], list[int], list[int]]:
    size = 1 << accuracy
    symbols = [0] * size
    high = size - 1
    for symbol, count in enumerate(counts):
        if count == -1:
            symbols[high] = symbol
            high -= 1
    step, at = (size >> 1) + (size >> 3) + 3, 0
    for symbol, count in enumerate(counts):
        for _ in range(count):
            symbols[at] = symbol
            at = (at + step) % size
            while at > high:
                at = (at + step) % size
    following = [abs(count) for count in counts]
    widths, bases = [0] * size, [0] * size
    for state, symbol in enumerate(symbols):
        number = following[symbol]
        following[symbol] += 1
        widths[state] = accuracy - (number.bit_length() - 1)
        bases[state] = (number << widths[state]) - size
    return symbols, widths, bases

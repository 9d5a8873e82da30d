"""Bit fields of floating-point words: Huffman-coded symbols and raw rests.

A word of one or two bytes is a sign, a high part and `low` more bits. The high part
(an exponent with the top bits of its mantissa) becomes the symbol; where it has more
than eight bits, or two symbols share a byte, it is counted from a `base` and what falls
outside its window is kept apart, except zero, which is symbol 0. Sign and low bits are
the rest, laid side by side: fields of 4, 2 or 1 bits of the words `j`, `j + w/2`, ...
of a block of `w`, so that all steps work on rows of neighbours.

On the host all work is on arrays that stay in the cache and are used again, as fresh
memory costs more than the work.
"""

import dataclasses
import math
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Split:
    """One way to deal out words.

    Args:
      bits: of a word: 8 or 16.
      low: bits below the high part, kept as they are.
      signed: the topmost bit is a sign and belongs to the rest.
      window: symbols there are, 0 for as many as the high part has; 15 puts two
        symbols into one byte.
    """

    bits: int
    low: int
    signed: bool
    window: int = 0

    @property
    def rest_bits(self) -> int:
        return self.low + self.signed

    @property
    def paired(self) -> bool:
        return self.window == 15

    @property
    def step(self) -> int:
        """What a base is a multiple of: the two bytes of a word do not mix then."""
        return 1 << 8 - self.low if self.bits == 16 else 1

    def rest_bytes(self, width: int) -> int:
        """Return bytes that the rests of a block of this many words take."""
        return width * self.rest_bits // 8

    def symbol_bytes(self, width: int) -> int:
        """Return symbols of a block, as bytes."""
        return width // 2 if self.paired else width

    @property
    def high_parts(self) -> int:
        """Values that a high part may have."""
        return 1 << self.bits - self.signed - self.low

    def high_part(self, words: np.ndarray) -> np.ndarray:
        """Return the bits of each word between its sign and its low bits."""
        kind = words.dtype.type
        return (words >> kind(self.low)) & kind(self.high_parts - 1)


SPLITS = {
    "bfloat16": Split(16, 5, True, 255),  # exponent and two bits of mantissa
    "bfloat16 pairs": Split(16, 7, True, 15),  # two exponents in a byte
    "float16": Split(16, 7, True),  # exponent and three bits of mantissa
    "float8": Split(8, 0, True),
    "bytes": Split(8, 0, False),
}


AHEAD = 1 << 24  # bytes asked for at once; NumPy asks for large pages then


class _Rooms(threading.local):
    """Arrays to work in, for each thread, kept from one call to the next."""

    def __init__(self) -> None:
        self.kept: dict[str, np.ndarray] = {}
        self.views: dict[tuple[Any, ...], np.ndarray] = {}
        self.left = np.empty(0, np.uint8)

    def room(self, name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
        """Return an array of unknown contents."""
        view = self.views.get((name, shape, kind))
        if view is not None:
            return view
        size = math.prod(shape) * np.dtype(kind).itemsize
        arena = self.kept.get(name)
        if arena is None or arena.size < size or len(self.views) > 99:
            arena = self.kept[name] = np.empty(size, np.uint8)
            self.views.clear()
        view = self.views[name, shape, kind] = arena[:size].view(kind).reshape(shape)
        return view

    def fresh(self, size: int) -> np.ndarray:
        """Return bytes of their own, a part of an array so large that its pages are
        large.
        """
        if self.left.size < size:
            self.left = np.empty(max(size, AHEAD), np.uint8)
        part, self.left = self.left[:size], self.left[size:]
        return part


_rooms = _Rooms()
room, fresh = _rooms.room, _rooms.fresh


def take_apart(
    words: np.ndarray, split: Split, base: int, symbols: np.ndarray, rests: np.ndarray
) -> np.ndarray:
    """Split words `[blocks, width]` into symbols and rests; return the exceptions.

    Exceptions are flat positions of words whose high part the window misses.

    Args:
      symbols: uint8 `[blocks, symbol bytes]`, written.
      rests: uint8 `[blocks, rest bytes]`, written.
    """
    missed = np.zeros(0, np.int64)
    if split.bits == 8:
        np.bitwise_and(words, 127 if split.signed else 255, out=symbols)
        if split.signed:
            _fold(words // 128, 1, rests)
        return missed
    low = split.low
    high = room("high", words.shape, np.uint16)
    np.right_shift(words, np.uint16(low), out=high)
    np.bitwise_and(high, np.uint16((1 << 15 - low) - 1), out=high)
    if split.window:
        # What is below the base becomes large.
        np.subtract(high, np.uint16(base), out=high)
        if int(high.max()) > split.window:
            high[high > split.window] = 0
    number = room("number", words.shape, np.uint8) if split.paired else symbols
    np.copyto(number, high, casting="unsafe")
    if split.window and not number.min():
        missed = np.flatnonzero((number == 0) & (split.high_part(words) != 0))
    if split.paired:
        _fold(number, 4, symbols)
    # The sign on top of the low bits, all in one byte.
    rest = room("rest", words.shape, np.uint8)
    np.copyto(rest, words, casting="unsafe")
    np.bitwise_and(rest, np.uint8((1 << low) - 1), out=rest)
    sign = room("field", words.shape, np.uint8)
    np.less(words.view(np.int16), 0, out=sign.view(bool))
    np.multiply(sign, np.uint8(1 << low), out=sign)
    np.bitwise_or(rest, sign, out=rest)
    field = sign  # to be overwritten
    at = shift = 0
    for bits in _fields(split.rest_bits):
        size = words.shape[1] * bits // 8
        part = rest
        if shift:
            part = np.right_shift(part, np.uint8(shift), out=field)
        if shift + bits < split.rest_bits:
            mask = np.uint8((1 << bits) - 1)
            part = np.bitwise_and(part, mask, out=field)
        _fold(part, bits, rests[:, at : at + size])
        at, shift = at + size, shift + bits
    return missed


def put_together(
    symbols: np.ndarray, rests: np.ndarray, base: int, split: Split, out: np.ndarray
) -> None:
    """Undo `take_apart`, exceptions aside: words `[blocks, width]` into `out`."""
    if split.bits == 8:
        if not split.signed:
            out[:] = symbols
            return
        _unfold(rests, 1, 7, out)
        np.bitwise_or(out, symbols, out=out)
        return
    low, width = split.low, out.shape[1]
    rest = rests
    at = shift = 0
    for bits in _fields(split.rest_bits):
        size = width * bits // 8
        packed = rests[:, at : at + size]
        if bits < 8:
            part = room("field" if shift else "rest", out.shape, np.uint8)
            _unfold(packed, bits, shift, part)
            rest = np.bitwise_or(rest, part, out=rest) if shift else part
        at, shift = at + size, shift + bits
    if split.paired:
        number = room("number", out.shape, np.uint8)
        np.bitwise_and(symbols, np.uint8(15), out=number[:, : width // 2])
        np.right_shift(symbols, np.uint8(4), out=number[:, width // 2 :])
        symbols = number
    high = room("high", out.shape, np.uint16)
    np.copyto(high, symbols)
    np.multiply(high, np.uint16(1 << low), out=high)
    if split.window:
        np.add(high, np.uint16(base << low), out=high)
        if not symbols.min():
            high[symbols == 0] = 0
    # The rest holds low bits and, above them, the sign, which moves to the top.
    spread = room("spread", out.shape, np.uint16)
    np.copyto(spread, rest)
    np.multiply(spread, np.uint16(1 + (1 << 15 - low)), out=spread)
    np.bitwise_and(spread, np.uint16(0x8000 | (1 << low) - 1), out=spread)
    np.bitwise_or(high, spread, out=out)


def words_of(
    symbols: jax.Array, rests: jax.Array, bases: jax.Array, split: Split, width: int
) -> jax.Array:
    """Compute `put_together` in JAX: the words of blocks, in rows of equal parts of a
    block.

    All is done by rows: XLA would fuse a change of shape, or rows that are put next to
    each other, into the work, and slow it ten times. `bases` are integers `[blocks]`.
    """
    kind = jnp.uint8 if split.bits == 8 else jnp.uint16
    fields = _fields(split.rest_bits)
    pieces = max([2 if split.paired else 1, *(8 // bits for bits in fields)])
    row = lax.iota(jnp.int32, len(symbols) * pieces)
    block, piece = row // pieces, row % pieces

    def unfold(packed: jax.Array, bits: int, first: int = 0) -> jax.Array:
        """Return numbers that `_fold` laid side by side, from a block's row `first`
        on.
        """
        packed = packed.reshape(-1, width // pieces)
        if bits == 8:
            return packed
        held = pieces * bits // 8
        position = block * (len(packed) // len(symbols)) + first + piece % held
        shift = (piece // held * bits).astype(jnp.uint8)
        part = packed.at[position].get(mode="clip") >> shift[:, None]
        return part & np.uint8((1 << bits) - 1)

    number = unfold(symbols, 4 if split.paired else 8).astype(kind)
    if split.window:
        base = bases.astype(kind).at[block].get(mode="clip")[:, None]
        number = jnp.where(number != 0, number + base, kind(0))
    number = number << kind(split.low)
    first = shift = 0
    rest = kind(0)
    for bits in fields:
        rest = rest | (unfold(rests, bits, first).astype(kind) << kind(shift))
        first, shift = first + pieces * bits // 8, shift + bits
    if not fields:
        return number
    sign = (rest >> kind(split.low)) << kind(split.bits - 1)
    return number | sign | (rest & kind((1 << split.low) - 1))


def _fields(bits: int) -> tuple[int, ...]:
    """Return widths of the fields that a rest is laid out in."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def _fold(part: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Lay numbers of so many bits, nothing above them, side by side into bytes."""
    if bits == 8:
        out[:] = part
        return
    # Halves of rows over each other, then halves of those; whole rows are multiplied
    # as NumPy takes its time from row to row.
    above = room("above", part.shape, np.uint8)
    for step in (4, 2, 1):
        half = part.shape[1] // 2
        np.multiply(part, np.uint8(1 << step), out=above)
        last = step == bits
        into = out if last else room(f"folded {step}", (len(part), half), np.uint8)
        part = np.bitwise_or(part[:, :half], above[:, half:], out=into)
        if last:
            return
        above = room(f"above {step}", part.shape, np.uint8)


def _unfold(packed: np.ndarray, bits: int, shift: int, out: np.ndarray) -> None:
    """Undo `_fold`; the numbers are `shift` bits up, which must leave them room."""
    # One product moves each number to the top of its byte; what is above is lost.
    steps = (1 << np.arange(8 - bits, -1, -bits)).astype(np.uint8)[:, None]
    table = out.reshape(len(out), steps.size, -1)
    np.multiply(packed[:, None], steps, out=table)
    np.right_shift(out, np.uint8(8 - bits - shift), out=out)
    if shift:
        np.bitwise_and(out, np.uint8(((1 << bits) - 1) << shift), out=out)

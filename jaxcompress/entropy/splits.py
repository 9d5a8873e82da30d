"""How the bits of a word are dealt out: a symbol that is coded, a rest that is not.

A word of one or two bytes is a sign, a high part and `low` more bits. The high part
(an exponent with the top bits of its mantissa) becomes the symbol; where it has more
than eight bits, or two symbols share a byte, it is counted from a `base` and what falls
outside its window is kept apart, except zero, which is symbol 0. Sign and low bits are
the rest, laid side by side: fields of 4, 2 or 1 bits of the words `j`, `j + w/2`, ...
of a block of `w`, so that all steps work on rows of neighbours.

On the host all work is on bytes, in arrays that stay in the cache, by multiplying and
dividing where NumPy has no vector instruction for shifts of bytes.
"""

import dataclasses

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
        """Bytes that the rests of a block of this many words take."""
        return width * self.rest_bits // 8

    def symbol_bytes(self, width: int) -> int:
        """Symbols of a block, as bytes."""
        return width // 2 if self.paired else width

    def high_part(self, words: np.ndarray) -> np.ndarray:
        """The bits of each word between its sign and its low bits."""
        kind = words.dtype.type
        mask = (1 << self.bits - self.signed - self.low) - 1
        return (words >> kind(self.low)) & kind(mask)


SPLITS = {
    "bfloat16": Split(16, 5, True, 255),  # exponent and two bits of mantissa
    "bfloat16 pairs": Split(16, 7, True, 15),  # two exponents in a byte
    "float16": Split(16, 7, True),  # exponent and three bits of mantissa
    "float8": Split(8, 0, True),
    "bytes": Split(8, 0, False),
}


def take_apart(
    words: np.ndarray, split: Split, base: int, symbols: np.ndarray, rests: np.ndarray
) -> np.ndarray:
    """Writes symbols and rests of words `[blocks, width]`; returns the exceptions.

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
    below, above, coarse = np.empty((3, *words.shape), np.uint8)
    np.copyto(below, words, casting="unsafe")
    np.copyto(above, words >> np.uint16(8), casting="unsafe")
    # The symbol is the upper byte's share, counted from the base, then the lower's.
    np.bitwise_and(above, 127, out=coarse)
    if split.window:
        np.subtract(coarse, base // split.step, out=coarse)
    most = (16 if split.paired else 256) // split.step
    outside = coarse >= most if int(coarse.max()) >= most else None
    np.multiply(coarse, split.step, out=coarse)
    np.bitwise_or(coarse, below // (1 << split.low), out=coarse)
    if outside is not None:
        coarse[outside] = 0
    if split.window and not coarse.all():
        missed = np.flatnonzero((coarse == 0) & (split.high_part(words) != 0))
    if split.paired:
        half = words.shape[1] // 2
        np.multiply(coarse[:, half:], 16, out=symbols)
        np.bitwise_or(symbols, coarse[:, :half], out=symbols)
    else:
        symbols[:] = coarse
    np.bitwise_and(below, (1 << split.low) - 1, out=below)
    np.bitwise_and(above, 128, out=above)
    if split.low < 7:  # the sign on top of the low bits
        np.floor_divide(above, 1 << 7 - split.low, out=above)
    np.bitwise_or(below, above, out=below)
    at = shift = 0
    for bits in _fields(split.rest_bits):
        size = words.shape[1] * bits // 8
        part = below // (1 << shift) if shift else below
        if bits < 8 and shift + bits < split.rest_bits:
            part = part & ((1 << bits) - 1)
        _fold(part, bits, rests[:, at : at + size])
        at, shift = at + size, shift + bits
    return missed


def put_together(
    symbols: np.ndarray, rests: np.ndarray, base: int, split: Split, out: np.ndarray
) -> None:
    """Undoes `take_apart`, exceptions aside: words `[blocks, width]` into `out`."""
    if split.bits == 8:
        if not split.signed:
            out[:] = symbols
            return
        _unfold(rests, 1, out)
        np.multiply(out, 128, out=out)
        np.bitwise_or(out, symbols, out=out)
        return
    width = out.shape[1]
    low, high, number = np.empty((3, *out.shape), np.uint8)
    if split.paired:
        np.bitwise_and(symbols, 15, out=number[:, : width // 2])
        np.floor_divide(symbols, 16, out=number[:, width // 2 :])
        symbols = number
    at = shift = 0
    for bits in _fields(split.rest_bits):
        size = width * bits // 8
        part = low if shift == 0 else high
        _unfold(rests[:, at : at + size], bits, part)
        if shift:
            np.multiply(part, 1 << shift, out=part)
            np.bitwise_or(low, part, out=low)
        at, shift = at + size, shift + bits
    # `low` holds low bits and, above them, the sign: the sign goes to the upper byte.
    np.bitwise_and(low, 1 << split.low, out=high)
    if split.low < 7:
        np.multiply(high, 1 << 7 - split.low, out=high)
    np.bitwise_and(low, (1 << split.low) - 1, out=low)
    share = np.floor_divide(symbols, split.step)
    if split.window:
        np.add(share, base // split.step, out=share)
        if not symbols.all():
            share[symbols == 0] = 0
    np.bitwise_or(high, share, out=high)
    np.multiply(symbols, 1 << split.low, out=share)
    np.bitwise_or(low, share, out=low)
    np.copyto(out, high)
    np.left_shift(out, 8, out=out)
    np.bitwise_or(out, low, out=out)


def words_of(
    symbols: jax.Array, rests: jax.Array, bases: jax.Array, split: Split, width: int
) -> jax.Array:
    """`put_together` in JAX: words `[blocks, width]`; bases are integers `[blocks]`."""
    kind = jnp.uint8 if split.bits == 8 else jnp.uint16
    fields = _fields(split.rest_bits)
    pieces = max([2 if split.paired else 1, *(8 // bits for bits in fields)])
    size = width // pieces

    def piece(packed: jax.Array, bits: int, q: int) -> jax.Array:
        """Numbers `q * size` and on of those that `_fold` laid side by side."""
        row = width * bits // 8
        over, at = divmod(q * size, row)
        part = packed[:, at : at + size]
        if bits == 8:
            return part
        return (part >> np.uint8(over * bits)) & np.uint8((1 << bits) - 1)

    def words(q: int) -> jax.Array:
        number = piece(symbols, 4 if split.paired else 8, q).astype(kind)
        if split.window:
            base = bases.astype(kind)[:, None]
            number = jnp.where(number != 0, number + base, kind(0))
        number = number << kind(split.low)
        at = shift = 0
        rest = kind(0)
        for bits in fields:
            row = width * bits // 8
            part = piece(rests[:, at : at + row], bits, q).astype(kind)
            rest = rest | (part << kind(shift))
            at, shift = at + row, shift + bits
        if not fields:
            return number
        sign = (rest >> kind(split.low)) << kind(split.bits - 1)
        return number | sign | (rest & kind((1 << split.low) - 1))

    if pieces == 1:
        return words(0)
    out = jnp.zeros((symbols.shape[0], width), kind)
    for q in range(pieces):  # several times as fast as concatenation on a CPU
        out = lax.dynamic_update_slice(out, words(q), (0, q * size))
    return out


def _fields(bits: int) -> tuple[int, ...]:
    """Widths of the fields that a rest is laid out in."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def _fold(part: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Lays numbers of so many bits side by side into bytes."""
    step = out.shape[1]
    out[:] = part[:, :step]
    for j in range(1, 8 // bits):
        more = part[:, j * step : (j + 1) * step] * np.uint8(1 << j * bits)
        np.bitwise_or(out, more, out=out)


def _unfold(packed: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Undoes `_fold`."""
    step = packed.shape[1]
    for j in range(8 // bits):
        part = out[:, j * step : (j + 1) * step]
        if j:
            np.floor_divide(packed, 1 << j * bits, out=part)
        else:
            part[:] = packed
    if bits < 8:
        np.bitwise_and(out, (1 << bits) - 1, out=out)

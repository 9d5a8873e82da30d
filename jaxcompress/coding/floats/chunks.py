"""Words coded chunk by chunk on the host: Huffman-coded symbols, the rest as it is.

A chunk of about 2^20 words is independent, so that chunks are coded in parallel and
read one by one. Its words are split (`splits`) in blocks; blocks are sorted into up to
eight classes by their scale (`classes`), and each class is one
Zstandard frame of literals with a table of its own: entropy falls as if every block
knew its scale, and both directions run at the library's speed.

A chunk as bytes: a list of numbers (`record.write_numbers`), after its own length,
two bytes; classes of blocks; frames; exceptions; rests; tails. Numbers: words, base,
bytes of the classes, exceptions, frames, bytes of the three parts of the tails, then
bytes and blocks of each frame.

The lower halves of words of four bytes, the tails, have no structure as a rule and are
kept raw; where all words of a segment end in four zeros or more (weights that were
a shorter type), their upper and lower bytes are two frames of their own.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.coding import zstd
from jaxcompress.coding.floats.bit_fields import (
    SPLITS,
    Split,
    fresh,
    put_together,
    room,
    take_apart,
)
from jaxcompress.coding.floats.block_classes import classes_of, sums_of
from jaxcompress.coding.record import Record, write_numbers
from jaxcompress.coding.tables import entropy
from jaxcompress.coding.zstd_literals import parse

CHUNK = 1 << 20  # words
SEGMENT = 128  # words whose lowest bits are looked at together
SAMPLE = 1 << 12  # words that are counted, or somewhat more
WHAT = "a coded chunk"  # bytes should be
PIECE = 1 << 19  # words worked on at a time: calls cost, and memory does


class Chunk(NamedTuple):
    """A coded chunk, taken apart.

    Args:
      count: words; width: of a block.
      base: of the window of symbols.
      classes: uint8 `[blocks]`.
      frames: of the symbols of all blocks, sorted by class; bytes and blocks of each.
      spots: uint32, words outside the window; values: their upper halves.
      rests: uint8 `[blocks, rest bytes]`.
      tails: uint16 `[count]`, lower halves of words of four bytes; or None.
    """

    count: int
    width: int
    base: int
    classes: np.ndarray
    frames: list[tuple[bytes | memoryview, int]]
    spots: np.ndarray
    values: np.ndarray
    rests: np.ndarray
    tails: np.ndarray | None


@functools.cache
def block_width(shape: tuple[int, ...]) -> int:
    """Return words of a block of an array: a part of a row where that is near 512, else
    512.

    A row of a matrix has one scale, as a rule, so blocks had better not be across two.
    """
    if math.prod(shape) < 1 << 14:
        return 128
    parts = [n for n in range(320, 641, 16) if shape[-1] % n == 0]
    return min(parts, key=lambda n: abs(n - 512), default=512)


def chunk_words(width: int) -> int:
    """Return words of a chunk of whole blocks."""
    return CHUNK // width * width


def encode(
    words: np.ndarray, split: Split, width: int, *, plain: bool = False
) -> Chunk | None:
    """Return one chunk, coded; None where too many words fall outside the window.

    The chunk is to be used at once: its rests are in an array that is used again.

    Args:
      words: unsigned, flat, as many as a chunk holds or fewer; four bytes where the
        split's words are the upper halves.
      width: of a block.
      plain: see to it that frames hold literals only, so that XLA decodes them.
    """
    tails = None
    if words.itemsize == 4:
        halves = words.view(np.uint16).reshape(-1, 2)
        words = room("words", halves.shape[:1], np.uint16)
        np.copyto(words, halves[:, 1])
        tails = halves[:, 0]
    count = words.size
    base = _base(_counts(words[:: -(-count // SAMPLE)], split), split)
    blocks = -(-count // width)
    if count % width:
        words = np.append(words, np.full(-count % width, words[-1]))
    words = words.reshape(blocks, width)
    symbols = room("symbols", (blocks, split.symbol_bytes(width)), np.uint8)
    rests = room("rests", (blocks, split.rest_bytes(width)), np.uint8)
    sums, spots = np.zeros(blocks, np.uint32), []
    rows = PIECE // width
    for first in range(0, blocks, rows):
        part = slice(first, first + rows)
        missed = take_apart(words[part], split, base, symbols[part], rests[part])
        spots.append(missed + first * width)
        if split.rest_bits:
            sums[part] = sums_of(symbols[part], split.paired)
    spots = np.concatenate(spots)
    spots = spots[spots < count]
    if spots.size > count // 8:
        return None
    sample = symbols[:: -(-count // SAMPLE)]
    if split.paired:
        sample = np.append(sample & np.uint8(15), sample >> np.uint8(4))
    classes = classes_of(sums, sample, width)
    order = np.argsort(classes, kind="stable")
    bounds = np.searchsorted(classes[order], np.arange(classes.max() + 2)).tolist()
    by_class = room("by class", symbols.shape, np.uint8)
    np.take(symbols, order, axis=0, out=by_class, mode="clip")
    frames: list[tuple[bytes, int]] = []
    for first, last in itertools.pairwise(bounds):
        frames += _frames(by_class[first:last], plain)
    values = words.reshape(-1)[spots]
    spots = spots.astype(np.uint32)
    return Chunk(count, width, base, classes, frames, spots, values, rests, tails)


def estimate(words: np.ndarray, split: Split) -> float | None:
    """Estimate the bytes of flat words; None as `encode`.

    By the entropy of symbols, of which each takes a bit or more.
    """
    tails = 0
    if words.itemsize == 4:
        halves = words.view(np.uint16).reshape(-1, 2)
        words, tails = halves[:, 1], sum(map(len, _write_tails(halves[:, 0])))
    counts = _counts(words, split)
    base, missed = _base(counts, split), 0
    if split.window:
        kept = counts[base + 1 : base + 1 + split.window]
        missed = words.size - int(kept.sum() + counts[0])
        counts = np.append(kept, counts[0] + missed)
    if missed > words.size // 8:
        return None
    bits = max(entropy(counts), words.size) + split.rest_bits * words.size
    return bits / 8 + (4 + split.bits // 8) * missed + tails


def decode(chunk: Chunk, split: Split, out: np.ndarray) -> None:
    """Write the words of a chunk to `out`; ValueError where it is damaged."""
    blocks, width = chunk.classes.size, chunk.width
    symbols = _symbols(chunk, split)
    rows = PIECE // width
    for first in range(0, blocks, rows):
        part = slice(first, first + rows)
        fields = symbols[part], chunk.rests[part], chunk.base, split
        words = slice(first * width, (first + rows) * width)
        segment = upper = out[words]
        if chunk.tails is not None:
            upper = room("upper", segment.shape, np.uint16)
        if segment.size % width:
            whole = np.empty((fields[0].shape[0], width), upper.dtype)
            put_together(*fields, whole)
            upper[:] = whole.reshape(-1)[: segment.size]
        else:
            put_together(*fields, upper.reshape(-1, width))
        if chunk.tails is not None:
            _join(upper, chunk.tails[words], segment)
    values = chunk.values
    if chunk.tails is not None:
        values = np.empty(values.size, np.uint32)
        _join(chunk.values, chunk.tails[chunk.spots], values)
    out[chunk.spots] = values


def _join(upper: np.ndarray, tails: np.ndarray, out: np.ndarray) -> None:
    """Return words of four bytes of their halves."""
    np.copyto(out, upper)
    np.left_shift(out, np.uint32(16), out=out)
    np.bitwise_or(out, tails, out=out)


def _symbols(chunk: Chunk, split: Split) -> np.ndarray:
    """Return symbols of blocks in order, uint8 `[blocks, bytes]`, to be used at
    once.
    """
    shape = chunk.classes.size, split.symbol_bytes(chunk.width)
    by_class, first = room("by class", shape, np.uint8), 0
    for frame, held in chunk.frames:
        zstd.decompress_into(frame, by_class[first : first + held])
        first += held
    if not chunk.classes.any():
        return by_class
    place = np.empty(shape[0], np.intp)
    place[np.argsort(chunk.classes, kind="stable")] = np.arange(shape[0])
    # Clipped, as NumPy would else work in memory of its own.
    symbols = room("symbols", shape, np.uint8)
    return np.take(by_class, place, axis=0, out=symbols, mode="clip")


def write(chunk: Chunk) -> memoryview:
    """Return a chunk as bytes."""
    classes = b""
    if chunk.classes.any():
        classes = zstd.pack(chunk.classes.tobytes())
    tails = _write_tails(chunk.tails)
    numbers = [chunk.count, chunk.base, len(classes), chunk.spots.size]
    numbers += [len(chunk.frames), *map(len, tails)]
    numbers += [number for frame, held in chunk.frames for number in (len(frame), held)]
    head = write_numbers(numbers)
    parts = [len(head).to_bytes(2, "little"), head, classes]
    parts += [frame for frame, _ in chunk.frames]
    parts += [_little(chunk.spots), _little(chunk.values), chunk.rests, *tails]
    parts = [np.frombuffer(part, np.uint8) for part in parts if len(part)]
    out = fresh(sum(part.size for part in parts))
    return np.concatenate(parts, out=out).data


def read(
    data: bytes | memoryview, split: Split, itemsize: int, count: int, width: int
) -> Chunk:
    """Undo `write`, for `count` words of so many bytes, in blocks of `width`.

    Raises:
      ValueError: these are not the bytes of such a chunk.
    """
    record = Record(data, WHAT)
    length = int.from_bytes(record.take(2, "no length"), "little")
    head = Record(record.take(length, f"{length} bytes of numbers"), WHAT)
    have, base, size, missed, held, *tails = head.numbers(8)
    head.require(have == count, f"a chunk of {have} words, not {count}")
    blocks = -(-count // width)
    most = split.high_parts
    head.require(held <= blocks and base < most, f"{held} frames, base {base}")
    numbers = head.numbers(2 * held)
    head.require(not len(head), "a list of numbers of another length")
    lengths, holds = numbers[::2], numbers[1::2]
    head.require(sum(holds) == blocks, f"frames of {sum(holds)} blocks, not {blocks}")
    head.require(missed <= count, f"{missed} exceptions of {count} words")
    value, rest = np.dtype(f"<u{split.bits // 8}"), split.rest_bytes(width)
    whole = size + sum(lengths) + (4 + value.itemsize) * missed + rest * blocks
    whole += sum(tails)
    record.require(whole == len(record), f"{len(record)} bytes, not {whole}")
    classes = np.zeros(blocks, np.uint8)
    if size:
        packed = record.take(size, "classes")
        classes = np.frombuffer(zstd.decompress(packed, blocks), np.uint8)
    pairs = zip(lengths, holds, strict=True)
    frames = [(record.take(length, "a frame"), number) for length, number in pairs]
    spots = record.array("<u4", (missed,), "exceptions")
    record.require(not missed or int(spots.max()) < count, "an exception outside")
    values = record.array(value.str, (missed,), "exceptions")
    rests = record.array("u1", (blocks, rest), "rests")
    halves = _read_tails(record, tails, count) if itemsize == 4 else None
    return Chunk(count, width, base, classes, frames, spots, values, rests, halves)


def symbols_of(chunk: Chunk, split: Split) -> Iterator[np.ndarray]:
    """Return symbols of one frame after another, decoded: uint8 `[blocks, bytes]`."""
    size = split.symbol_bytes(chunk.width)
    for frame, held in chunk.frames:
        data = zstd.decompress(frame, held * size)
        yield np.frombuffer(data, np.uint8).reshape(held, size)


def split_for(kind: str, *, fast: bool = False) -> str | None:
    """Name of the split for a dtype of `kind`; None where there is none."""
    if kind in ("bfloat16", "float32"):
        return "bfloat16 pairs" if fast else "bfloat16"
    if kind.startswith("float8") and kind != "float8_e8m0fnu":
        return "float8"
    return kind if kind in SPLITS else None


def _counts(words: np.ndarray, split: Split) -> np.ndarray:
    """Return how often each high part occurs."""
    return np.bincount(split.high_part(words), minlength=split.high_parts)


@functools.cache
def _windows(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return bases that there may be, and the last high part of the window of each."""
    bases = np.arange(0, split.high_parts, split.step)
    return bases, np.minimum(bases + split.window, split.high_parts - 1)


def _base(counts: np.ndarray, split: Split) -> int:
    """Choose the number below the window that holds most of what was counted."""
    if not split.window:
        return 0
    sums = np.cumsum(counts)
    bases, last = _windows(split)
    return int(bases[(sums[last] - sums[bases]).argmax()])


def _frames(symbols: np.ndarray, plain: bool) -> list[tuple[bytes, int]]:
    """Return blocks as frames: one, or more where only halves are free of
    repetitions.
    """
    frame = zstd.pack(symbols.data)
    blocks = symbols.shape[0]
    if plain and blocks >= 8 and parse(frame) is None:
        half = blocks // 8 * 4
        halves = _frames(symbols[:half], True) + _frames(symbols[half:], True)
        if sum(len(part) for part, _ in halves) < len(frame) + 64 * len(halves):
            return halves
    return [(frame, blocks)]


def _write_tails(words: np.ndarray | None) -> tuple[Any, Any, Any]:
    """Return flags of segments with fewer bits, their bytes, then the other segments
    raw.
    """
    if words is None:
        return b"", b"", b""
    tails = room("tails", words.shape, np.uint16)
    np.copyto(tails, words)
    whole = tails.size // SEGMENT * SEGMENT
    segments = tails[:whole].reshape(-1, SEGMENT)
    short = np.bitwise_or.reduce(segments, axis=1) & np.uint16(15) == 0
    if short.size == 0 or np.count_nonzero(short) < short.size / 256:
        return b"", b"", _little(tails)
    flags = zstd.pack(np.packbits(short).tobytes())
    some = segments[short].view(np.uint8).reshape(-1, 2)
    frames = [zstd.pack(some[:, i].tobytes()) for i in (0, 1)]
    packed = len(frames[0]).to_bytes(4, "little") + b"".join(frames)
    raw = np.concatenate([segments[~short].reshape(-1), tails[whole:]])
    return flags, packed, _little(raw)


def _read_tails(record: Record, sizes: list[int], count: int) -> np.ndarray:
    flags, packed, raw = sizes
    if not flags:
        fits = raw == 2 * count and not packed
        record.require(fits, f"{raw} bytes of {count} tails")
        return record.array("<u2", (count,), "tails")
    segments = count // SEGMENT
    bits = zstd.decompress(record.take(flags, "flags"), -(-segments // 8))
    short = np.unpackbits(np.frombuffer(bits, np.uint8))[:segments].astype(bool)
    some = int(np.count_nonzero(short)) * SEGMENT
    fits = raw == 2 * (count - some) and packed > 4
    record.require(fits, f"{raw} bytes of raw tails")
    first = int.from_bytes(record.take(4, "a length"), "little")
    halves = np.empty((some, 2), np.uint8)
    for i, size in enumerate((first, packed - 4 - first)):
        frame = zstd.decompress(record.take(size, "short tails"), some)
        halves[:, i] = np.frombuffer(frame, np.uint8)
    rest = record.array("<u2", (count - some,), "tails")
    out = np.empty(count, np.uint16)
    table = out[: segments * SEGMENT].reshape(segments, SEGMENT)
    table[short] = halves.view("<u2").reshape(-1, SEGMENT)
    kept = (segments * SEGMENT) - some
    table[~short] = rest[:kept].reshape(-1, SEGMENT)
    out[segments * SEGMENT :] = rest[kept:]
    return out


def _little(x: np.ndarray) -> np.ndarray:
    return x.astype(x.dtype.newbyteorder("<"), copy=False).view(np.uint8)

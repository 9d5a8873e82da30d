"""Chunks of few distinct words: a list of these, and the place of each word in it.

For integers kept as floating-point numbers, levels of a lattice, masks. A place takes
8, 4, 2 or 1 bits, and the bytes that places side by side make up are coded as those of
the split "bytes" are (`chunks`): a mask costs less than a bit for each number then, and
so does what neighbours have in common.

A chunk as bytes: number of distinct words less one, a byte; places in a byte, another;
the distinct words, ascending, little-endian; the coded bytes, in the last of which
places of 0 may follow. Where words differ more than a sample of the array did: two
bytes of 0, and Zstandard's frame of the words.
"""

import numpy as np

from jaxcompress.coding import zstd
from jaxcompress.coding.floats import chunks as float_chunks
from jaxcompress.coding.floats.bit_fields import SPLITS
from jaxcompress.coding.record import Record

MOST = 256  # distinct words
SHARES = (1, 2, 4, 8)  # places in a byte
SLOTS = 1 << 16
BYTES = SPLITS["bytes"]
# Odd. 256 words in 65536 slots have these to themselves for six factors of ten.
FACTORS = tuple(0x9E3779B97F4A7C15 * (2 * i + 1) for i in range(10))


def fits(words: np.ndarray) -> bool:
    """Return whether flat words are few enough distinct ones."""
    # Weights show within the first words that they are not.
    first = np.sort(words[:1024])
    few = np.count_nonzero(first[1:] != first[:-1]) < MOST
    return few and _places(words) is not None


def encode(words: np.ndarray, width: int) -> bytes:
    """Return flat words of a chunk as bytes, coded in blocks of `width`."""
    palette = _places(words)
    if palette is None:
        return bytes(2) + zstd.compress(words)
    listed, places = palette
    tried = []
    for share in SHARES:
        if listed.size <= 1 << 8 // share:
            chunk = float_chunks.encode(_side_by_side(places, share), BYTES, width)
            tried.append((share, float_chunks.write(chunk)))
    share, data = min(tried, key=lambda one: len(one[1]))
    little = listed.astype(listed.dtype.newbyteorder("<"), copy=False)
    return bytes([listed.size - 1, share]) + little.tobytes() + data


def decode(data: bytes, width: int, out: np.ndarray) -> None:
    """Fill `out` with the words of a chunk; ValueError where it is damaged."""
    record = Record(data, float_chunks.WHAT)
    record.require(len(data) > 2, f"a chunk of {len(data)} bytes")
    last, share = record.take(2, "no sizes")
    if not last and not share:
        zstd.decompress_into(record.take(len(record), "a frame"), out)
        return
    size = last + 1
    held = share in SHARES and size <= 1 << 8 // share
    record.require(held, f"{size} distinct words, {share} places in a byte")
    words = f"{size} distinct words"
    listed = record.array(out.dtype.newbyteorder("<").str, (size,), words)
    record.require(len(record) > 0, words)
    count = -(-out.size // share)
    packed = np.empty(count, np.uint8)
    rest = record.take(len(record), "places")
    float_chunks.decode(float_chunks.read(rest, BYTES, 1, count, width), BYTES, packed)
    # What a byte means: all words of its places at once.
    places = np.arange(256)[:, None] >> np.arange(0, 8, 8 // share)
    places &= (1 << 8 // share) - 1
    valid = (places < size).all(axis=1)
    table = listed.astype(out.dtype)[np.minimum(places, size - 1)]
    for first in range(0, count, float_chunks.PIECE):
        piece = packed[first : first + float_chunks.PIECE]
        record.require(
            valid[piece].all(), f"a place behind the last of {size} distinct words"
        )
        piece_words = out[first * share : (first + piece.size) * share]
        whole = piece_words.size // share
        rows = piece_words[: whole * share].reshape(whole, share)
        np.take(table, piece[:whole], axis=0, out=rows, mode="clip")
        piece_words[whole * share :] = table[piece[-1], : piece_words.size % share]


def _places(words: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the distinct words, ascending, and uint8 places of all; None for too many.

    Words are told apart by their slots, which a product gives that mixes their bits;
    that no two distinct ones share a slot is seen by looking them up.
    """
    pieces = [
        slice(first, first + float_chunks.PIECE)
        for first in range(0, words.size, float_chunks.PIECE)
    ]
    places = np.empty(words.size, np.uint8)
    for factor in FACTORS:
        seen, word = np.zeros(SLOTS, bool), np.zeros(SLOTS, words.dtype)
        for piece in pieces:
            slots = _slots(words[piece], factor)
            seen[slots] = True
            word[slots] = words[piece]
            if np.count_nonzero(seen) > MOST:
                return None
        used = np.flatnonzero(seen)
        listed = np.sort(word[used])
        place = np.zeros(SLOTS, np.uint8)
        place[used] = np.searchsorted(listed, word[used])
        for piece in pieces:
            places[piece] = place[_slots(words[piece], factor)]
            shared = words.itemsize > 2  # else a word is its own slot
            if shared and not np.array_equal(listed[places[piece]], words[piece]):
                break
        else:
            return listed, places
    return None


def _slots(words: np.ndarray, factor: int) -> np.ndarray:
    bits = 8 * words.itemsize
    if bits <= 16:
        return words
    kind = words.dtype.type
    mixed = words * kind(factor % (1 << bits))
    np.right_shift(mixed, kind(bits - 16), out=mixed)
    return mixed.astype(np.uint16)


def _side_by_side(places: np.ndarray, share: int) -> np.ndarray:
    """Pack so many positions into a byte, the first in the lowest bits."""
    if share == 1:
        return places
    places = np.append(places, np.zeros(-places.size % share, np.uint8))
    out = places[::share].copy()
    for i in range(1, share):
        np.bitwise_or(out, places[i::share] << np.uint8(8 // share * i), out=out)
    return out

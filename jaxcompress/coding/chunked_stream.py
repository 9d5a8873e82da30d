"""Chunked byte stream: independent chunks, then an index of offsets and CRCs.

    chunks     as `floats.chunks` writes them, each of about 2^20 words but the last;
               or of as many words, where the coding is "palette", what
               `palette_codec` writes, where it is "zstd", Zstandard's frames
    index      numbers: words, words of a block, chunks, bytes of each chunk; then four
               bytes of the CRC-32 of each chunk
    4 bytes    length of the index, little-endian; and zeros to a multiple of 8 bytes
               before the index

The index is at the end so that chunks can be written before the last is known; a
part of the array is read by its end and the chunks that hold the part.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jaxcompress.coding import palette_codec, zstd
from jaxcompress.coding.floats import chunks as float_chunks
from jaxcompress.coding.floats.bit_fields import SPLITS, Split
from jaxcompress.coding.record import Record, require, write_numbers
from jaxcompress.coding.threads import in_order

CHECKSUM = 4  # bytes
WHAT = "a coded array"  # bytes should be
PALETTE, ZSTD = "palette", "zstd"

Buffer = bytes | memoryview
Read = Callable[[int, int], bytes]  # from one byte to another


def encode(
    words: np.ndarray, coding: str, width: int, *, threads: int | None = None
) -> Iterator[Buffer]:
    """Return flat unsigned words as the bytes of a stream, chunk by chunk.

    Args:
      words: of the size that the coding takes.
      coding: a split by name, "halves" for that of bfloat16, "palette" or "zstd".
      width: words of a block.
      threads: as for `in_order`.

    Raises:
      ValueError: too many words outside the window of the symbols.
    """
    step = float_chunks.chunk_words(width)

    def work(start: int) -> Buffer:
        data = encode_chunk(words[start : start + step], coding, width)
        if data is None:
            raise ValueError(
                f"numbers {start} to {start + step} have exponents further apart than "
                f"the coding {coding!r} holds"
            )
        return data

    starts = range(0, words.size, step)
    return bind(in_order(work, starts, threads=threads), words.size, width)


def encode_chunk(words: np.ndarray, coding: str, width: int) -> Buffer | None:
    """Return the bytes of one chunk; None where the coding does not hold its words."""
    if coding == ZSTD:
        return zstd.compress(words)
    if coding == PALETTE:
        return palette_codec.encode(words, width)
    chunk = float_chunks.encode(words, _split(coding), width)
    return None if chunk is None else float_chunks.write(chunk)


def decode_chunk(data: bytes, coding: str, width: int, out: np.ndarray) -> None:
    """Undo `encode_chunk`: fills `out` with words; ValueError for anything else."""
    if coding == ZSTD:
        zstd.decompress_into(data, out)
    elif coding == PALETTE:
        palette_codec.decode(data, width, out)
    else:
        split = _split(coding)
        chunk = float_chunks.read(data, split, out.itemsize, out.size, width)
        float_chunks.decode(chunk, split, out)


def estimate(words: np.ndarray, coding: str, width: int) -> float | None:
    """Estimate the bytes that words take; None where the coding does not hold them."""
    if coding in (PALETTE, ZSTD):
        return len(encode_chunk(words, coding, width))
    return float_chunks.estimate(words, _split(coding))


def _split(coding: str) -> Split:
    return SPLITS["bfloat16" if coding == "halves" else coding]


def bind(chunks: Iterable[Buffer], count: int, width: int) -> Iterator[Buffer]:
    """Return chunks of `count` words in all, and their index."""
    sizes, checksums = [], []
    for chunk in chunks:
        sizes.append(len(chunk))
        checksums.append(_checksum(chunk))
        yield chunk
    index = write_numbers([count, width, len(sizes), *sizes]) + b"".join(checksums)
    room = -(sum(sizes) + len(index) + 4) % 8
    yield bytes(room) + index + len(index).to_bytes(4, "little")


class Stream:
    """A stream to read from.

    Args:
      read: gives its bytes.
      size: of the stream in bytes.
      coding: as `encode` was given.
      itemsize: bytes of a word.
      count: words there must be.

    Raises:
      ValueError: the index is not that of such a stream.
    """

    def __init__(self, read: Read, size: int, coding: str, itemsize: int, count: int):
        self._read, self._itemsize, self._count = read, itemsize, count
        self._coding = coding
        require(size >= 4, f"{size} bytes", WHAT)
        length = int.from_bytes(read(size - 4, size), "little")
        require(length <= size - 4, f"an index of {length} bytes in {size}", WHAT)
        index = Record(read(size - 4 - length, size - 4), WHAT)
        have, self.width, chunks = index.numbers(3)
        require(have == count, f"{have} words, not {count}", WHAT)
        fits = 16 <= self.width <= 1024 and self.width % 16 == 0
        require(fits, f"blocks of {self.width} words", WHAT)
        self._step = float_chunks.chunk_words(self.width)
        require(chunks == -(-count // self._step), f"{chunks} chunks of {count}", WHAT)
        require(chunks <= length, f"{chunks} chunks in {length} bytes", WHAT)
        # Zstandard makes 128 KB of four bytes, at most.
        require(count * itemsize <= size << 15, f"{count} words in {size} bytes", WHAT)
        sizes = index.numbers(chunks)
        require(CHECKSUM * chunks == len(index), "an index of another length", WHAT)
        self._checksums = bytes(index.take(len(index), "checksums"))
        ends = np.cumsum([0, *sizes], dtype=np.float64)  # no sum too large to compare
        room = size - 4 - length - ends[-1]
        require(0 <= room < 8, f"chunks of {ends[-1]:.0f} bytes in {size}", WHAT)
        self._ends = ends.astype(np.int64).tolist()

    def chunks(self) -> Iterator[float_chunks.Chunk]:
        """Return all chunks of a split, taken apart."""
        for number in range(len(self._ends) - 1):
            yield self._chunk(self._bytes(number, False), self._held(number))

    def _held(self, number: int) -> int:
        """Return words of a chunk."""
        return min(self._step, self._count - number * self._step)

    def _bytes(self, number: int, check: bool) -> bytes:
        data = self._read(self._ends[number], self._ends[number + 1])
        if check and _checksum(data) != self._checksums[CHECKSUM * number :][:CHECKSUM]:
            raise ValueError(f"not a coded chunk: chunk {number}; the file is damaged")
        return data

    def _chunk(self, data: bytes, count: int) -> float_chunks.Chunk:
        split = _split(self._coding)
        return float_chunks.read(data, split, self._itemsize, count, self.width)

    def words(
        self,
        first: int = 0,
        last: int | None = None,
        *,
        check: bool = False,
        threads: int | None = None,
    ) -> np.ndarray:
        """Return words from `first` to before `last`; reads the chunks that hold them.

        `check` compares the digest of each chunk, where its bytes were not checked
        otherwise.
        """
        last = self._count if last is None else last
        out = np.empty(last - first, f"u{self._itemsize}")

        def work(number: int) -> None:
            data = self._bytes(number, check)
            start = number * self._step
            stop = start + self._held(number)
            if first <= start and stop <= last:
                decode_chunk(
                    data, self._coding, self.width, out[start - first : stop - first]
                )
                return
            whole = np.empty(stop - start, out.dtype)
            decode_chunk(data, self._coding, self.width, whole)
            low, high = max(first, start), min(last, stop)
            out[low - first : high - first] = whole[low - start : high - start]

        numbers = range(first // self._step, -(-last // self._step))
        for _ in in_order(work, numbers if last > first else (), threads=threads):
            pass
        return out


def from_bytes(data: Any, coding: str, itemsize: int, count: int) -> Stream:
    """Return a stream in memory."""
    view = memoryview(data)

    def read(start: int, stop: int) -> bytes:
        return bytes(view[start:stop])

    return Stream(read, len(view), coding, itemsize, count)


def _checksum(data: Buffer) -> bytes:
    return zlib.crc32(data).to_bytes(CHECKSUM, "little")

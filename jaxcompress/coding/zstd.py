"""Frames of Zstandard: literals alone, or with repetitions, and back.

Errors are those of a damaged file, as ValueError.
"""

import functools
import threading
from typing import Any

import numpy as np
import zstandard


@functools.cache
def _parameters() -> zstandard.ZstdCompressionParameters:
    """Return literals only, as far as the library can be told: hardly a table of
    matches.
    """
    return zstandard.ZstdCompressionParameters(
        window_log=17,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        strategy=1,
        write_content_size=False,
    )


class _Local(threading.local):
    """A context of the library for each thread: contexts are costly and not shared."""

    def __init__(self) -> None:
        self.general = zstandard.ZstdCompressor(level=3)
        self.compressor = zstandard.ZstdCompressor(compression_params=_parameters())
        self.decompressor = zstandard.ZstdDecompressor()


_local = _Local()


def pack(data: Any) -> bytes:
    """Return bytes as a frame of literals, Huffman-coded."""
    return _local.compressor.compress(data)


def compress(words: np.ndarray) -> bytes:
    """Return words as a frame that makes use of repetitions."""
    return _local.general.compress(np.ascontiguousarray(words).data)


def decompress_into(frame: bytes | memoryview, out: np.ndarray) -> None:
    """Fill a contiguous array with what `compress` made; ValueError if it does not."""
    room = out.data.cast("B") if out.size else memoryview(b"")
    try:
        with _local.decompressor.stream_reader(frame) as reader:
            while len(room):
                count = reader.readinto(room)
                if not count:
                    raise ValueError("a frame ends early; the file is damaged")
                room = room[count:]
            if reader.read(1):
                raise ValueError("a frame does not end; the file is damaged")
    except zstandard.ZstdError as error:
        raise ValueError(f"a frame is damaged: {error}") from error


def decompress(frame: bytes | memoryview, size: int) -> bytes:
    """Return the `size` bytes of a frame; ValueError for anything else."""
    try:
        # The library makes room for what a frame claims, whatever it may give.
        claimed = zstandard.frame_content_size(frame)
        if claimed not in (-1, size):
            raise ValueError(f"a frame of {claimed} bytes, not {size}; it is damaged")
        data = _local.decompressor.decompress(frame, max_output_size=max(1, size))
    except zstandard.ZstdError as error:
        raise ValueError(f"a frame is damaged: {error}") from error
    if len(data) != size:
        raise ValueError(f"a frame of {len(data)} bytes, not {size}; it is damaged")
    return data


def compress_text(data: bytes) -> bytes:
    """Return bytes as a small frame: level 19."""
    return zstandard.ZstdCompressor(level=19).compress(data)


def decompress_text(frame: bytes, most: int) -> bytes:
    """Return contents of a frame; ValueError where it is damaged or holds over `most`.

    Memory grows with what the frame holds, not with what it claims.
    """
    try:
        with _local.decompressor.stream_reader(frame) as reader:
            parts, size = [], 0
            while part := reader.read(1 << 20):
                parts.append(part)
                size += len(part)
                if size > most:
                    raise ValueError(f"a frame holds more than {most} bytes")
    except zstandard.ZstdError as error:
        raise ValueError(f"a Zstandard frame is damaged: {error}") from error
    return b"".join(parts)

"""Plain arrays as fewer bytes, for files: which coding, both ways, and parts alone.

Codings: the splits of `splits` on the numbers' bits ("bfloat16" on float32 too, whose
lower halves are then tails), "halves" for float32 that is bfloat16, "bytes" for types
of one byte, "palette" for few distinct numbers of any type (`palettes`), and "zstd" for
what repeats itself.
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jaxcompress.coding import chunked_stream, palette_codec
from jaxcompress.coding.floats import chunks as float_chunks
from jaxcompress.coding.floats.bit_fields import SPLITS
from jaxcompress.types import DType

LEAST = 2048  # bytes; what a shorter array would gain its entry in a header costs
SAMPLE = 1 << 10  # words, at each of so many places; or 8 times as many
PLACES = 4
CLEAR = 1.1  # the bytes of the next coding to those of the best, on a small sample
GAIN = 0.99  # of the bytes as they are, at most, on a sample
CODINGS = len((*SPLITS, "halves", chunked_stream.PALETTE, chunked_stream.ZSTD))


def choose(array: np.ndarray, *, fast: bool = False) -> str | None:
    """Return the coding that shrinks samples of an array most; None where none does.

    `fast` prefers the splits that decode sooner, see `code_floats`.
    """
    raw, sizes = _tried(array, fast)
    best = min(sizes, key=sizes.get, default=None)
    return best if best is not None and sizes[best] < GAIN * raw else None


def estimate(array: np.ndarray) -> float:
    """Estimate the bytes that an array takes in a file."""
    raw, sizes = _tried(array, False)
    share = min([raw, *sizes.values()]) / max(1, raw)
    return share * array.nbytes


def _tried(array: np.ndarray, fast: bool) -> tuple[int, dict[str, float]]:
    """Return bytes of a sample, as it is and, about, by each coding that holds it."""
    if array.nbytes < LEAST or array.dtype.itemsize not in (1, 2, 4, 8):
        return array.nbytes, {}
    whole = np.ascontiguousarray(array).reshape(-1)
    width = float_chunks.block_width(array.shape)
    for size in (SAMPLE, 8 * SAMPLE):
        flat, sizes = _sample(whole, size), {}
        few = palette_codec.fits(_bits(flat))
        for name in _candidates(array.dtype, fast):
            words = _words(flat, name)
            if words is None or (name == chunked_stream.PALETTE and not few):
                continue
            estimated = chunked_stream.estimate(words, name, width)
            if estimated is not None:
                sizes[name] = estimated
        best = sorted(sizes.values())[:2]
        clear = not few and (len(best) < 2 or best[1] > CLEAR * best[0])
        # In more, what must be listed weighs less, and repetitions are found.
        if clear or flat.size == whole.size:
            break
    return flat.nbytes, sizes


def _sample(flat: np.ndarray, size: int) -> np.ndarray:
    """Sample so many numbers at each of several positions; all where there are no
    more.
    """
    if flat.size <= PLACES * size:
        return flat
    places = [(flat.size - size) * i // (PLACES - 1) for i in range(PLACES)]
    return np.concatenate([flat[place : place + size] for place in places])


def encode(
    array: np.ndarray, coding: str, *, threads: int | None = None
) -> Iterator[chunked_stream.Buffer]:
    """Return an array as the bytes of a stream, a few million at a time.

    Raises:
      ValueError: the coding does not hold these numbers, though a sample did.
    """
    words = _words(np.ascontiguousarray(array).reshape(-1), coding)
    if words is None:
        raise ValueError(f"{coding} does not hold these numbers")
    width = float_chunks.block_width(array.shape)
    return chunked_stream.encode(words, coding, width, threads=threads)


def open_stream(
    read: chunked_stream.Read,
    size: int,
    coding: str,
    dtype: DType,
    shape: tuple[int, ...],
) -> chunked_stream.Stream:
    """Return the stream of an array of this dtype and shape.

    Raises:
      ValueError: it is none, or the dtype has no such coding.
    """
    dtype = jnp.dtype(dtype)
    if coding not in (*_candidates(dtype, False), *_candidates(dtype, True)):
        raise ValueError(
            f"{dtype} has no coding {coding!r} here; the file is damaged, or of a "
            "newer jaxcompress"
        )
    itemsize = 2 if coding == "halves" else dtype.itemsize
    return chunked_stream.Stream(read, size, coding, itemsize, math.prod(shape))


def decode(
    stream: chunked_stream.Stream,
    dtype: DType,
    first: int = 0,
    last: int | None = None,
    *,
    check: bool = False,
    threads: int | None = None,
) -> np.ndarray:
    """Return numbers `first` to before `last` of an array, flat; `check` as for
    `Stream`.

    Raises:
      ValueError: the bytes are damaged.
    """
    dtype = jnp.dtype(dtype)
    words = stream.words(first, last, check=check, threads=threads)
    if words.dtype.itemsize != dtype.itemsize:
        words = words.astype(np.uint32)
        words <<= np.uint32(16)
    return words.view(dtype)


def _candidates(dtype: np.dtype, fast: bool) -> tuple[str, ...]:
    """Return codings that numbers of this type may have."""
    dtype = jnp.dtype(dtype)
    split = float_chunks.split_for(dtype.name, fast=fast)
    if split is None:
        split = "bytes" if dtype.itemsize == 1 else None
    wide = ("halves",) if dtype.name == "float32" else ()
    return (*wide, *filter(None, (split,)), chunked_stream.PALETTE, chunked_stream.ZSTD)


def _words(flat: np.ndarray, coding: str) -> np.ndarray | None:
    """Return the words that a coding codes; None where it does not hold the numbers."""
    words = _bits(flat)
    if coding != "halves":
        return words
    halves = words.view(np.uint16).reshape(-1, 2)
    for start in range(0, len(halves), float_chunks.CHUNK):
        if halves[start : start + float_chunks.CHUNK, 0].any():
            return None
    return np.ascontiguousarray(halves[:, 1])


def _bits(flat: np.ndarray) -> np.ndarray:
    return flat.view(f"u{flat.dtype.itemsize}")

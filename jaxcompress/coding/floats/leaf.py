"""Words of one, two or four bytes, coded by planes: `CodedWords`, decoded in XLA."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxcompress.coding import chunked_stream, huffman_xla
from jaxcompress.coding.floats import chunks as float_chunks
from jaxcompress.coding.floats.bit_fields import SPLITS, words_of
from jaxcompress.coding.floats.device_layout import lay_out, pick_up
from jaxcompress.coding.record import Record, write_numbers, write_stack
from jaxcompress.coding.threads import in_order
from jaxcompress.tree.leaf import Leaf, leaf, static

TOGETHER = 2048  # blocks decoded at a time on a CPU, whose caches hold their streams


@leaf
class CodedWords(Leaf):
    """Unsigned words `[..., *trailing]`; each slice coded by `chunks`, on its own.

    Invariant: every data array has the stack axes first, and a slice of all of them
    is the `CodedWords` of a slice. Words of a slice are blocks of `width` words in
    order; a block is a lane of Huffman-coded symbols in `frames`,
    which hold what the file holds: the frames of Zstandard, one after another. Blocks
    that are not coded there alone follow them, as they are.

    Args:
      frames: uint32 `[..., words]`, little-endian; the first four bytes are empty.
      starts: uint32 `[..., blocks]`, one past the first bit of each block.
      tables: uint16 `[..., blocks]`, of each block; alphabets: uint8 `[..., tables,
        256]`, symbols by falling length of their codes; counts: uint16 `[..., tables,
        11]`, codes of 11 bits to 1.
      classes: uint8 `[..., blocks]`, which tell the order of blocks in frames; sizes:
        int32 `[..., frames, 2]`, bytes and blocks of each frame.
      bases: int32 `[..., chunks]`, of the windows of symbols.
      rests: uint8 `[..., blocks, bytes]`.
      tails: uint16 `[..., words]`, lower halves of words of four bytes; or None.
      spots: int32 `[..., exceptions]`, words outside the window, filled up with the
        number of words; values: uint8 or uint16 alike, their upper halves.
      dtype: of the words. split: by name. width: words of a block.

    Example:
      >>> coded = jc.code_floats(jax.random.normal(key, (256, 256)))
      >>> type(coded.bits).__name__
      'CodedWords'
    """

    frames: jax.Array
    starts: jax.Array
    tables: jax.Array
    alphabets: jax.Array
    counts: jax.Array
    classes: jax.Array
    sizes: jax.Array
    bases: jax.Array
    rests: jax.Array
    tails: jax.Array | None
    spots: jax.Array
    values: jax.Array
    trailing: tuple[int, ...] = static()
    dtype: np.dtype = static()
    split: str = static()
    width: int = static()

    lossless: ClassVar[bool] = True
    entropy_coded: ClassVar[bool] = True
    integers: ClassVar[tuple[str, ...]] = ("frames", "starts", "rests")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.starts.shape[:-1] + self.trailing

    def materialize(self) -> jax.Array:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(self)):
            return _slices(self)
        if isinstance(self.frames, np.ndarray) or len(self.frames.devices()) == 1:
            return jnp.asarray(self.on_host())
        return _decoded(self)

    def take_rows(self, indices: jax.Array) -> jax.Array:
        """Return rows of a 2-D array: only the blocks that hold them are decoded."""
        if len(self.shape) != 2 or self.trailing != self.shape:
            return super().take_rows(indices)
        return _rows(self, jnp.asarray(indices))

    def on_host(self) -> np.ndarray:
        """Return the array, decoded by NumPy; ValueError where it is damaged."""
        lead = self.starts.shape[:-1]
        count = math.prod(self.trailing)
        out = np.empty((math.prod(lead), count), self.dtype)

        def work(job: tuple[np.ndarray, int, float_chunks.Chunk]) -> None:
            row, number, chunk = job
            start = number * float_chunks.chunk_words(self.width)
            part = row[start : start + chunk.count]
            float_chunks.decode(chunk, SPLITS[self.split], part)

        rows = zip(out, _chunks_of_slices(self), strict=True)
        jobs = ((row, i, one) for row, some in rows for i, one in enumerate(some))
        for _ in in_order(work, jobs):
            pass
        return out.reshape(lead + self.trailing)

    def stored(self) -> dict[str, np.ndarray]:
        """Return what a file holds: streams of the slices, after their sizes."""
        lead = self.starts.shape[:-1]
        count = math.prod(self.trailing)
        streams = [
            b"".join(
                chunked_stream.bind(map(float_chunks.write, chunks), count, self.width)
            )
            for chunks in _chunks_of_slices(self)
        ]
        head = write_numbers([*write_stack(lead), *map(len, streams)])
        return {"stream": np.frombuffer(b"".join([head, *streams]), np.uint8)}

    @classmethod
    def restored(
        cls, arrays: dict[str, np.ndarray], static: dict[str, Any]
    ) -> "CodedWords":
        """Undo `stored`, given the static fields; ValueError if they do not fit."""
        data = Record(
            np.ascontiguousarray(arrays["stream"], np.uint8).data, "coded words"
        )
        trailing = tuple(static["trailing"])
        kind, name = np.dtype(static["dtype"]), static["split"]
        fits = name in SPLITS and kind.kind == "u" and kind.itemsize <= 4
        fits = fits and (kind.itemsize * 8 == SPLITS[name].bits or kind.itemsize == 4)
        data.require(fits, f"split {name!r} of {kind}")
        lead = data.stack()
        slices, count = math.prod(lead), math.prod(trailing)
        data.require(slices <= len(data), f"{slices} slices")
        sizes = data.numbers(slices)
        fits = sum(sizes) == len(data) and slices * count > 0
        data.require(fits, f"{len(data)} bytes of {slices} slices")
        chunks = []
        for size in sizes:
            part = data.take(size, "a slice")
            stream = chunked_stream.from_bytes(part, name, kind.itemsize, count)
            fits = stream.width == static["width"]
            data.require(fits, f"blocks of {stream.width} words")
            chunks.append(list(stream.chunks()))
        return from_chunks(chunks, lead, trailing, kind, name)


def code_words(
    words: np.ndarray, split: str, stack: int
) -> tuple[CodedWords | None, int]:
    """Return words `[..., *trailing]` as a leaf, and its bytes in a file; None if
    unsuitable.

    Args:
      words: uint8, uint16 or uint32.
      stack: number of leading axes whose slices are coded on their own.
    """
    lead, trailing = words.shape[:stack], words.shape[stack:]
    count = math.prod(trailing)
    width = float_chunks.block_width(trailing)
    step = float_chunks.chunk_words(width)
    rows = np.ascontiguousarray(words).reshape(-1, count)

    def work(part: np.ndarray) -> float_chunks.Chunk | None:
        chunk = float_chunks.encode(part, SPLITS[split], width, plain=True)
        return chunk and chunk._replace(rests=chunk.rests.copy())

    starts = range(0, count, step)
    parts = (row[start : start + step] for row in rows for start in starts)
    chunks = list(in_order(work, parts))
    if any(chunk is None for chunk in chunks):
        return None, 0
    size = sum(
        len(float_chunks.write(chunk)) + chunked_stream.CHECKSUM for chunk in chunks
    )
    each = len(starts)
    slices = [chunks[i : i + each] for i in range(0, len(chunks), each)]
    leaf = from_chunks(slices, lead, trailing, words.dtype, split)
    return jax.tree.map(jnp.asarray, leaf), size


def from_chunks(
    slices: list[list[float_chunks.Chunk]],
    lead: tuple[int, ...],
    trailing: tuple[int, ...],
    kind: np.dtype,
    split: str,
) -> CodedWords:
    """Return the leaf of coded chunks, one list for each slice; NumPy arrays.

    Raises:
      ValueError: a frame is damaged, or a slice is too large.
    """
    rows = [lay_out(chunks, SPLITS[split]) for chunks in slices]
    fills = {"spots": math.prod(trailing)}
    fields = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if parts[0] is None:
            fields[name] = None
            continue
        # A single exception would not be scattered but fused, which costs far more.
        least = 2 if name in ("spots", "values") else 0
        size = max(least, *(part.shape[0] for part in parts))
        shape = (len(parts), size, *parts[0].shape[1:])
        joined = np.full(shape, fills.get(name, 0), parts[0].dtype)
        for row, part in zip(joined, parts, strict=True):
            row[: part.shape[0]] = part
        fields[name] = joined.reshape(lead + shape[1:])
    width = slices[0][0].width
    return CodedWords(**fields, trailing=trailing, dtype=kind, split=split, width=width)


def _chunks_of_slices(coded: CodedWords) -> list[list[float_chunks.Chunk]]:
    """Return the chunks of every slice, as the host codes them."""
    fields = {
        name: np.asarray(getattr(coded, name))
        for name in ("frames", "classes", "sizes", "bases", "rests", "spots", "values")
    }
    lead = len(coded.starts.shape) - 1
    slices = math.prod(coded.starts.shape[:-1])
    fields = {k: x.reshape(slices, *x.shape[lead:]) for k, x in fields.items()}
    tails = [None] * slices
    if coded.tails is not None:
        tails = np.asarray(coded.tails).reshape(slices, -1)
    rows = zip(*(fields[name] for name in fields), tails, strict=True)
    return [pick_up(*row, math.prod(coded.trailing), coded.width) for row in rows]


@jax.jit
def _decoded(coded: CodedWords) -> jax.Array:
    return _slices(coded)


def _slices(coded: CodedWords) -> jax.Array:
    lead = coded.starts.shape[:-1]
    if not lead:
        return _one(coded).reshape(coded.trailing)
    count = math.prod(lead)
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(lead) :]), coded)
    return lax.map(_one, flat).reshape(lead + coded.trailing)


def _one(coded: CodedWords) -> jax.Array:
    """Return the words of one slice, flat."""
    blocks = coded.starts.shape[0]
    entries = huffman_xla.lookup(coded.alphabets, coded.counts)

    def whole() -> jax.Array:
        return _excepted(coded, _blocks(coded, entries, lambda x: x))

    groups = -(-blocks // TOGETHER)
    size = -(-blocks // groups)

    def in_groups() -> jax.Array:
        def work(number: jax.Array, out: jax.Array) -> jax.Array:
            first = number * size  # the last not after the end: some blocks twice
            part = _blocks(
                coded, entries, lambda x: lax.dynamic_slice_in_dim(x, first, size)
            )
            # None is set: a scatter keeps XLA from fusing what follows, which would
            # make it ten times slower.
            behind = jnp.full_like(coded.spots[:2], len(part))
            part = part.at[behind, behind].set(coded.values[:2], mode="drop")
            return lax.dynamic_update_slice(
                out, part.reshape(size, coded.width), (first, 0)
            )

        # Overwritten; see `lanes.decode`.
        out = coded.starts[0].astype(coded.values.dtype)
        out = jnp.broadcast_to(out, (blocks, coded.width))
        return _excepted(coded, lax.fori_loop(0, groups, work, out))

    if groups > 1:
        upper = lax.platform_dependent(cpu=in_groups, default=whole)
    else:
        upper = whole()
    upper = upper[: math.prod(coded.trailing)]
    return _joined(upper, coded.tails, coded.dtype)


def _excepted(coded: CodedWords, upper: jax.Array) -> jax.Array:
    """Return upper halves, flat, once exceptions are put in."""
    row, column = jnp.divmod(coded.spots, upper.shape[1])
    return upper.at[row, column].set(coded.values, mode="drop").reshape(-1)


def _blocks(
    coded: CodedWords, entries: jax.Array, pick: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Return upper halves of the blocks that `pick` takes, no exceptions; see
    `words_of`.
    """
    split = SPLITS[coded.split]
    width = coded.width
    chunks = np.arange(coded.starts.shape[0], dtype=np.int32)
    chunks //= float_chunks.chunk_words(width) // width
    bases = coded.bases.at[pick(jnp.asarray(chunks))].get(mode="clip")
    symbols = huffman_xla.decode(
        coded.frames,
        pick(coded.starts),
        pick(coded.tables),
        entries,
        split.symbol_bytes(width),
    )
    # Fused into what follows, either would be computed for every word again.
    symbols, bases = lax.optimization_barrier((symbols, bases))
    return words_of(symbols, pick(coded.rests), bases, split, width)


@jax.jit
def _rows(coded: CodedWords, indices: jax.Array) -> jax.Array:
    """Return rows `[..., features]`: the blocks that each is in, decoded for each."""
    rows, features = coded.trailing
    width = coded.width
    wanted = indices.reshape(-1).astype(jnp.int32)
    wanted = jnp.where(wanted < 0, wanted + rows, wanted)
    start = jnp.clip(wanted, 0, rows - 1)
    many = (features - 1) // width + 2
    # In blocks and words after them, as rows times features may pass 32 bits.
    block = start * (features // width) + (start * (features % width)) // width
    behind = (start * (features % width)) % width
    which = (block[:, None] + jnp.arange(many)[None]).reshape(-1)
    entries = huffman_xla.lookup(coded.alphabets, coded.counts)
    words = _blocks(coded, entries, lambda x: x.at[which].get(mode="clip"))
    words = words.reshape(-1, many * width)
    place = behind[:, None] + jnp.arange(features)[None]
    gathered = jnp.take_along_axis(words, place, axis=1)
    spot_row, spot_column = coded.spots // features, coded.spots % features

    def patch(row: jax.Array, number: jax.Array) -> jax.Array:
        column = jnp.where(spot_row == number, spot_column, features)
        return row.at[column].set(coded.values, mode="drop")

    if coded.spots.size:
        gathered = jax.vmap(patch)(gathered, start)
    tails = None
    if coded.tails is not None:
        tails = coded.tails.reshape(rows, features)[start]
    return _joined(gathered, tails, coded.dtype).reshape(*indices.shape, features)


def _joined(upper: jax.Array, tails: jax.Array | None, kind: np.dtype) -> jax.Array:
    if tails is None:
        return upper.astype(kind)
    return (upper.astype(jnp.uint32) << np.uint32(16)) | tails.astype(jnp.uint32)

"""Words of one, two or four bytes, coded by planes: `CodedWords`, decoded in XLA."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.entropy import lanes, planes, streams
from jaxcompress.entropy.literals import parse
from jaxcompress.entropy.splits import SPLITS, Split, words_of
from jaxcompress.entropy.tables import read_numbers, write_numbers
from jaxcompress.tree.leaves import Leaf, leaf, static

MOST_BYTES = 1 << 29  # of the frames of a slice: places of bits are 32-bit numbers
_RAW = np.full(256, 8, np.uint8)  # a table under which a byte is its own code


@leaf
class CodedWords(Leaf):
    """Unsigned words `[..., *trailing]`; each slice coded by `planes`, on its own.

    Invariant: every data array has the stack axes in front, and a slice of all of them
    is the `CodedWords` of a slice. Words of a slice are blocks of `width` words in
    order, 2048 blocks a chunk; a block is a lane of Huffman-coded symbols in `frames`,
    which hold what the file holds: the frames of Zstandard, one after another. Blocks
    that are not coded there alone lie behind them, as they are.

    Args:
      frames: uint32 `[..., words]`, little-endian; the first four bytes are empty.
      starts: uint32 `[..., blocks]`, one past the first bit of each block.
      tables: uint16 `[..., blocks]`, of each block; lengths: uint8 `[..., tables,
        256]`, bits of the codes of each table.
      classes: uint8 `[..., blocks]`, which tell the order of blocks in frames; sizes:
        int32 `[..., frames, 2]`, bytes and blocks of each frame.
      bases: int32 `[..., chunks]`, of the windows of symbols.
      rests: uint8 `[..., blocks, bytes]`.
      tails: uint16 `[..., words]`, lower halves of words of four bytes; or None.
      spots: int32 `[..., exceptions]`, words outside the window, filled up with the
        number of words; values: uint8 or uint16 alike, their upper halves.
      kind: dtype of the words. split: by name.
    """

    frames: jax.Array
    starts: jax.Array
    tables: jax.Array
    lengths: jax.Array
    classes: jax.Array
    sizes: jax.Array
    bases: jax.Array
    rests: jax.Array
    tails: jax.Array | None
    spots: jax.Array
    values: jax.Array
    trailing: tuple[int, ...] = static()
    kind: str = static()
    split: str = static()

    lossless: ClassVar[bool] = True
    entropy_coded: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.starts.shape[:-1] + self.trailing

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.kind)

    def materialize(self) -> jax.Array:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self)):
            return _slices(self)
        if isinstance(self.frames, np.ndarray) or len(self.frames.devices()) == 1:
            return jnp.asarray(self.on_host())
        return _decoded(self)

    def take_rows(self, indices: jax.Array) -> jax.Array:
        """Rows of a 2-D array: only the blocks that hold them are decoded."""
        if len(self.shape) != 2 or self.trailing != self.shape:
            return super().take_rows(indices)
        return _rows(self, jnp.asarray(indices))

    def on_host(self) -> np.ndarray:
        """The array, decoded by NumPy; ValueError where it is damaged."""
        lead = self.starts.shape[:-1]
        count = math.prod(self.trailing)
        out = np.empty((math.prod(lead), count), self.kind)
        split = SPLITS[self.split]
        for row, chunks in zip(out, _chunks_of_slices(self), strict=True):
            for number, chunk in enumerate(chunks):
                start = number * planes.CHUNK
                planes.decode(chunk, split, row[start : start + planes.CHUNK])
        return out.reshape(lead + self.trailing)

    def stored(self) -> dict[str, np.ndarray]:
        """What a file holds: streams of the slices, behind their sizes."""
        lead = self.starts.shape[:-1]
        count = math.prod(self.trailing)
        made = [
            b"".join(streams.bind(map(planes.write, chunks), count))
            for chunks in _chunks_of_slices(self)
        ]
        head = write_numbers([len(lead) + 1, *lead, *map(len, made)])
        return {"stream": np.frombuffer(b"".join([head, *made]), np.uint8)}

    @classmethod
    def restored(
        cls, arrays: dict[str, np.ndarray], static: dict[str, Any]
    ) -> "CodedWords":
        """Undoes `stored`, given the static fields; ValueError if they do not fit."""
        data = memoryview(np.ascontiguousarray(arrays["stream"], np.uint8)).cast("B")
        trailing = tuple(static["trailing"])
        kind, name = np.dtype(static["kind"]), static["split"]
        if name not in SPLITS or kind.kind != "u" or kind.itemsize > 4:
            raise ValueError(f"not coded words: split {name!r} of {kind}")
        fits = kind.itemsize * 8 == SPLITS[name].bits or kind.itemsize == 4
        if not fits:
            raise ValueError(f"not coded words: split {name!r} of {kind}")
        head = bytes(data[: 1 << 16])
        (axes,), at = read_numbers(head, 0, 1)
        if not 0 < axes < 16:
            raise ValueError(f"not coded words: {axes - 1} stack axes")
        lead, at = read_numbers(head, at, axes - 1)
        slices, count = math.prod(lead), math.prod(trailing)
        if slices > len(data):
            raise ValueError(f"not coded words: {slices} slices in {len(data)} bytes")
        sizes, at = read_numbers(bytes(data[: at + 10 * slices]), at, slices)
        if at + sum(sizes) != len(data) or not slices * count:
            raise ValueError(f"not coded words: {len(data)} bytes of {slices} slices")
        found = []
        for size in sizes:
            part = data[at : at + size]
            stream = streams.from_bytes(part, name, kind.itemsize, count)
            found.append(list(stream.chunks()))
            at += size
        return from_chunks(found, tuple(lead), trailing, kind.name, name)


def code_words(
    words: np.ndarray, split: str, stack: int
) -> tuple[CodedWords | None, int]:
    """Words `[..., *trailing]` as a leaf, and its bytes in a file; None if unsuitable.

    Args:
      words: uint8, uint16 or uint32.
      stack: number of leading axes whose slices are coded on their own.
    """
    lead, trailing = words.shape[:stack], words.shape[stack:]
    count = math.prod(trailing)
    width = planes.block_width(count)
    slices = []
    for row in np.ascontiguousarray(words).reshape(-1, count):
        chunks = []
        for start in range(0, count, planes.CHUNK):
            part = row[start : start + planes.CHUNK]
            chunks.append(planes.encode(part, SPLITS[split], width, plain=True))
        slices.append(chunks)
    if any(chunk is None for chunks in slices for chunk in chunks):
        return None, 0
    size = sum(
        len(planes.write(chunk)) + streams.DIGEST for row in slices for chunk in row
    )
    made = from_chunks(slices, lead, trailing, words.dtype.name, split)
    return jax.tree.map(jnp.asarray, made), size


def from_chunks(
    slices: list[list[planes.Chunk]],
    lead: tuple[int, ...],
    trailing: tuple[int, ...],
    kind: str,
    split: str,
) -> CodedWords:
    """The leaf of coded chunks, one list for each slice; NumPy arrays.

    Raises:
      ValueError: a frame is damaged, or a slice is too large.
    """
    rows = [_laid_out(chunks, SPLITS[split]) for chunks in slices]
    fills = {"spots": math.prod(trailing)}
    fields = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if parts[0] is None:
            fields[name] = None
            continue
        size = max(part.shape[0] for part in parts)
        shape = (len(parts), size, *parts[0].shape[1:])
        joined = np.full(shape, fills.get(name, 0), parts[0].dtype)
        for row, part in zip(joined, parts, strict=True):
            row[: part.shape[0]] = part
        fields[name] = joined.reshape(lead + shape[1:])
    return CodedWords(**fields, trailing=trailing, kind=kind, split=split)


def _laid_out(
    chunks: list[planes.Chunk], split: Split
) -> dict[str, np.ndarray | None]:
    """The fields of one slice."""
    starts, tables, lengths, sizes, raw = [], [], [], [], []
    data = [bytes(lanes.AHEAD // 8)]
    at = lanes.AHEAD // 8
    for number, chunk in enumerate(chunks):
        blocks = chunk.classes.size
        order = np.argsort(chunk.classes, kind="stable")
        places, table = np.zeros((2, blocks), np.int64)
        first = 0
        for (frame, held), symbols in zip(
            chunk.frames, planes.symbols_of(chunk, split), strict=True
        ):
            here = order[first : first + held]
            begins, table[here] = _places(frame, symbols, lengths)
            places[here] = begins + 8 * at
            for i in np.flatnonzero(begins < 0):
                raw.append((number, here[i], symbols[i]))
            data.append(frame)
            sizes.append((len(frame), held))
            at += len(frame)
            first += held
        starts.append(places)
        tables.append(table)
    if raw:
        lengths.append(_RAW)
    for number, block, symbols in raw:
        data.append(symbols[::-1].tobytes())  # streams are read from their ends
        at += symbols.size
        starts[number][block], tables[number][block] = 8 * at, len(lengths) - 1
    if at > MOST_BYTES or len(lengths) > 1 << 16:
        raise ValueError(
            f"{at} bytes of coded symbols in one slice, at most {MOST_BYTES}; code the "
            "array in slices (stack=1)"
        )
    data.append(bytes(-at % 4 + 4))
    tails = [chunk.tails for chunk in chunks]
    firsts = np.arange(len(chunks), dtype=np.int64) * planes.CHUNK
    spots = [chunk.spots + first for chunk, first in zip(chunks, firsts, strict=True)]
    return {
        "frames": np.frombuffer(b"".join(data), "<u4").astype(np.uint32),
        "starts": np.concatenate(starts).astype(np.uint32),
        "tables": np.concatenate(tables).astype(np.uint16),
        "lengths": np.stack(lengths),
        "classes": np.concatenate([chunk.classes for chunk in chunks]),
        "sizes": np.array(sizes, np.int32),
        "bases": np.array([chunk.base for chunk in chunks], np.int32),
        "rests": np.concatenate([chunk.rests for chunk in chunks]),
        "tails": None if tails[0] is None else np.concatenate(tails),
        "spots": np.concatenate(spots).astype(np.int32),
        "values": np.concatenate([chunk.values for chunk in chunks]),
    }


def _places(
    frame: bytes, symbols: np.ndarray, lengths: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the blocks in a frame begin, in bits from its start, and their tables.

    -1 for blocks that are not Huffman-coded in one piece. Tables join `lengths`.
    """
    held, size = symbols.shape
    places, tables = np.full(held, -(1 << 40)), np.zeros(held, np.int64)
    flat = symbols.reshape(-1)
    first = 0  # symbol
    for literals in parse(frame) or ():
        if not lengths or not np.array_equal(literals.lengths, lengths[-1]):
            lengths.append(literals.lengths)
        part = -(-literals.count // len(literals.ends))
        for j, end in enumerate(literals.ends):
            low = first + min(j * part, literals.count)
            high = first + min((j + 1) * part, literals.count)
            top = 8 * (end - 1) + frame[end - 1].bit_length() - 1
            whole = range(-(-low // size), high // size)
            if not whole:
                continue
            taken = np.cumsum(literals.lengths[flat[low:high]], dtype=np.int64)
            before = np.append(0, taken)[np.array(whole) * size - low]
            places[whole.start : whole.stop] = top - before
            tables[whole.start : whole.stop] = len(lengths) - 1
        first += literals.count
    return places, tables


def _chunks_of_slices(coded: CodedWords) -> list[list[planes.Chunk]]:
    """The chunks of every slice, as the host codes them."""
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
    return [_chunks(*row, math.prod(coded.trailing)) for row in rows]


def _chunks(
    frames: np.ndarray,
    classes: np.ndarray,
    sizes: np.ndarray,
    bases: np.ndarray,
    rests: np.ndarray,
    spots: np.ndarray,
    values: np.ndarray,
    tails: np.ndarray | None,
    count: int,
) -> list[planes.Chunk]:
    data = memoryview(frames.astype("<u4")).cast("B")
    width = planes.block_width(count)
    at, number, made = lanes.AHEAD // 8, 0, []
    for i, base in enumerate(bases.tolist()):
        start = i * planes.CHUNK
        held = min(planes.CHUNK, count - start)
        blocks = slice(start // width, start // width + -(-held // width))
        left, here = blocks.stop - blocks.start, []
        while left > 0:
            size, some = sizes[number].tolist() if number < len(sizes) else (0, 0)
            if some < 1 or some > left or size < 0:
                raise ValueError("frames of other blocks: the coded words are damaged")
            here.append((bytes(data[at : at + size]), some))
            at, left, number = at + size, left - some, number + 1
        mine = (spots >= start) & (spots < start + held)
        made.append(
            planes.Chunk(
                held,
                width,
                base,
                classes[blocks],
                here,
                (spots[mine] - start).astype(np.uint32),
                values[mine],
                rests[blocks],
                None if tails is None else tails[start : start + held],
            )
        )
    return made


@jax.jit
def _decoded(coded: CodedWords) -> jax.Array:
    return _slices(coded)


def _slices(coded: CodedWords) -> jax.Array:
    lead = coded.starts.shape[:-1]
    if not lead:
        return _one(coded).reshape(coded.trailing)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), coded)
    return lax.map(_one, flat).reshape(lead + coded.trailing)


def _one(coded: CodedWords) -> jax.Array:
    """The words of one slice, flat."""
    count = math.prod(coded.trailing)
    upper = _blocks(coded, lambda x: x)
    upper = upper.reshape(-1)[:count]
    upper = upper.at[coded.spots].set(coded.values, mode="drop")
    return _joined(upper, coded.tails, coded.kind)


def _blocks(
    coded: CodedWords, pick: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Upper halves `[blocks, width]` of the blocks that `pick` takes, no exceptions."""
    split = SPLITS[coded.split]
    width = planes.block_width(math.prod(coded.trailing))
    chunks = np.arange(coded.starts.shape[0], dtype=np.int32) // (planes.CHUNK // width)
    bases = coded.bases.at[pick(jnp.asarray(chunks))].get(mode="clip")
    symbols = lanes.decode(
        coded.frames,
        pick(coded.starts),
        pick(coded.tables),
        lanes.lookup(coded.lengths),
        split.symbol_bytes(width),
    )
    # Fused into what follows, either would be computed for every word again.
    symbols, bases = lax.optimization_barrier((symbols, bases))
    return words_of(symbols, pick(coded.rests), bases, split, width)


@jax.jit
def _rows(coded: CodedWords, indices: jax.Array) -> jax.Array:
    """Rows `[..., features]`: the blocks that each lies in, decoded for each."""
    rows, features = coded.trailing
    width = planes.block_width(rows * features)
    wanted = indices.reshape(-1).astype(jnp.int32)
    wanted = jnp.where(wanted < 0, wanted + rows, wanted)
    start = jnp.clip(wanted, 0, rows - 1)
    many = (features - 1) // width + 2
    # In blocks and words behind, as rows times features may pass 32 bits.
    block = start * (features // width) + (start * (features % width)) // width
    behind = (start * (features % width)) % width
    which = (block[:, None] + jnp.arange(many)).reshape(-1)
    words = _blocks(coded, lambda x: x.at[which].get(mode="clip"))
    words = words.reshape(-1, many * width)
    place = behind[:, None] + jnp.arange(features)
    found = jnp.take_along_axis(words, place, axis=1)
    spot_row, spot_column = coded.spots // features, coded.spots % features

    def patch(row: jax.Array, number: jax.Array) -> jax.Array:
        column = jnp.where(spot_row == number, spot_column, features)
        return row.at[column].set(coded.values, mode="drop")

    if coded.spots.size:
        found = jax.vmap(patch)(found, start)
    tails = None
    if coded.tails is not None:
        tails = coded.tails.reshape(rows, features)[start]
    return _joined(found, tails, coded.kind).reshape(*indices.shape, features)


def _joined(upper: jax.Array, tails: jax.Array | None, kind: str) -> jax.Array:
    if tails is None:
        return upper.astype(kind)
    return (upper.astype(jnp.uint32) << np.uint32(16)) | tails.astype(jnp.uint32)

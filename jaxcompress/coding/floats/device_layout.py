"""From coded chunks to blocks that XLA finds, and back: arrays of one slice.

The names are those of the fields of `CodedWords`, which says what they hold.
"""

import numpy as np

from jaxcompress.coding import huffman_xla
from jaxcompress.coding.floats import chunks as float_chunks
from jaxcompress.coding.floats.bit_fields import Split
from jaxcompress.coding.zstd_literals import TABLE_BITS, parse

MOST_BYTES = 1 << 29  # of the frames of a slice: places of bits are 32-bit numbers
_RAW = np.full(256, 8, np.uint8)  # a table under which a byte is its own code


def lay_out(
    chunks: list[float_chunks.Chunk], split: Split
) -> dict[str, np.ndarray | None]:
    """Return the fields of one slice."""
    starts, tables, lengths, sizes, raw = [], [], [], [], []
    data = [bytes(huffman_xla.AHEAD // 8)]
    at = huffman_xla.AHEAD // 8
    for number, chunk in enumerate(chunks):
        blocks = chunk.classes.size
        order = np.argsort(chunk.classes, kind="stable")
        places, table = np.zeros((2, blocks), np.int64)
        first = 0
        for (frame, held), symbols in zip(
            chunk.frames, float_chunks.symbols_of(chunk, split), strict=True
        ):
            rows = order[first : first + held]
            begins, table[rows] = _places(frame, symbols, lengths)
            places[rows] = begins + 8 * at
            for i in np.flatnonzero(begins < 0):
                raw.append((number, rows[i], symbols[i]))
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
    firsts = np.arange(len(chunks), dtype=np.int64) * float_chunks.chunk_words(
        chunks[0].width
    )
    spots = [chunk.spots + first for chunk, first in zip(chunks, firsts, strict=True)]
    return {
        "frames": np.frombuffer(b"".join(data), "<u4").astype(np.uint32),
        "starts": np.concatenate(starts).astype(np.uint32),
        "tables": np.concatenate(tables).astype(np.uint16),
        **_codes(np.stack(lengths)),
        "classes": np.concatenate([chunk.classes for chunk in chunks]),
        "sizes": np.array(sizes, np.int32),
        "bases": np.array([chunk.base for chunk in chunks], np.int32),
        "rests": np.concatenate([chunk.rests for chunk in chunks]),
        "tails": None if tails[0] is None else np.concatenate(tails),
        "spots": np.concatenate(spots).astype(np.int32),
        "values": np.concatenate([chunk.values for chunk in chunks]),
    }


def _codes(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Return codes of these lengths, uint8 `[tables, 256]`, as `lanes.lookup` takes
    them.
    """
    order = np.argsort(-lengths.astype(np.int8), axis=-1, kind="stable")
    sizes = np.arange(TABLE_BITS, 0, -1)
    counts = np.count_nonzero(lengths[..., None] == sizes, axis=1)
    return {"alphabets": order.astype(np.uint8), "counts": counts.astype(np.uint16)}


def _places(
    frame: bytes, symbols: np.ndarray, lengths: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Locate the blocks in a frame: bits from its start, and their tables.

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


def pick_up(
    frames: np.ndarray,
    classes: np.ndarray,
    sizes: np.ndarray,
    bases: np.ndarray,
    rests: np.ndarray,
    spots: np.ndarray,
    values: np.ndarray,
    tails: np.ndarray | None,
    count: int,
    width: int,
) -> list[float_chunks.Chunk]:
    data = frames.astype("<u4").data.cast("B")
    step = float_chunks.chunk_words(width)
    at, number, chunks = huffman_xla.AHEAD // 8, 0, []
    for i, base in enumerate(bases.tolist()):
        start = i * step
        held = min(step, count - start)
        blocks = slice(start // width, start // width + -(-held // width))
        left, pieces = blocks.stop - blocks.start, []
        while left > 0:
            size, some = sizes[number].tolist() if number < len(sizes) else (0, 0)
            if some < 1 or some > left or size < 0:
                raise ValueError("frames of other blocks: the coded words are damaged")
            pieces.append((bytes(data[at : at + size]), some))
            at, left, number = at + size, left - some, number + 1
        mine = (spots >= start) & (spots < start + held)
        chunks.append(
            float_chunks.Chunk(
                held,
                width,
                base,
                classes[blocks],
                pieces,
                (spots[mine] - start).astype(np.uint32),
                values[mine],
                rests[blocks],
                None if tails is None else tails[start : start + held],
            )
        )
    return chunks

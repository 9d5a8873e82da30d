"""Range asymmetric numeral systems with one 32-bit state for each lane.

States are in [2**16, 2**32) between symbols, and frequencies sum to 2**16, so that a
symbol moves at most one 16-bit word. A lane is encoded from its last symbol to its
first, from the state 2**16; the decoder must end on that state with no word left.

J. Duda, "Asymmetric numeral systems", arXiv:1311.2540 (2013).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

START = 1 << 16


class Reader(NamedTuple):
    """Lanes that are being decoded.

    Args:
      state: uint32 `[lanes]`.
      position: int32 `[lanes]`, of each lane's next word.
      words: uint16 `[words]`, those of all lanes one after another, and padding.
    """

    state: jax.Array
    position: jax.Array
    words: jax.Array


def encode_lanes(intervals: list[np.ndarray]) -> list[bytes]:
    """Return bytes of each lane: its state, then its words in the order they are read.

    Args:
      intervals: for each lane the starts and sizes of its symbols, `[symbols, 2]`.
    """
    count = len(intervals)
    longest = max((len(x) for x in intervals), default=0)
    starts = np.zeros((longest, count), np.uint64)
    sizes = np.zeros((longest, count), np.uint64)
    for lane, x in enumerate(intervals):
        starts[: len(x), lane], sizes[: len(x), lane] = x[:, 0], x[:, 1]
    state = np.full(count, START, np.uint64)
    words = np.zeros((longest, count), np.uint16)
    moved = np.zeros((longest, count), bool)
    for step in range(longest - 1, -1, -1):
        size = sizes[step]
        coded = size > 0  # not past the end of a shorter lane
        size = np.maximum(size, 1)
        full = coded & (state >= size << np.uint64(16))
        words[step], moved[step] = state & np.uint64(0xFFFF), full
        state = np.where(full, state >> np.uint64(16), state)
        after = (state // size << np.uint64(16)) + state % size + starts[step]
        state = np.where(coded, after, state)
    return [
        state[lane].astype("<u4").tobytes()
        + words[moved[:, lane], lane].astype("<u2").tobytes()
        for lane in range(count)
    ]


def open_lanes(lanes: list[bytes]) -> Reader:
    """Return a reader at the first symbol of each lane; words are padded to a power of
    two.

    Raises ValueError where a lane is no state and whole words.
    """
    for i, lane in enumerate(lanes):
        if len(lane) < 4 or len(lane) % 2:
            raise ValueError(f"lane {i} has {len(lane)} bytes; 4, 6, 8, ... are wanted")
    states = [int.from_bytes(lane[:4], "little") for lane in lanes]
    counts = [len(lane) // 2 - 2 for lane in lanes]
    words = np.frombuffer(b"".join(lane[4:] for lane in lanes), "<u2")
    room = 1 << max(10, len(words).bit_length())
    padded = np.zeros(room, np.uint16)
    padded[: len(words)] = words
    position = np.cumsum([0, *counts[:-1]])
    return Reader(
        jnp.asarray(np.array(states, np.uint32)),
        jnp.asarray(position.astype(np.int32)),
        jnp.asarray(padded),
    )


def is_finished(reader: Reader, lanes: list[bytes]) -> np.ndarray:
    """Return which lanes ended on the first state of the encoder and with no word
    left.
    """
    ends = np.cumsum([len(lane) // 2 - 2 for lane in lanes])
    return (np.asarray(reader.state) == START) & (np.asarray(reader.position) == ends)


def advance(reader: Reader, start: jax.Array, size: jax.Array) -> Reader:
    """Return the reader after one symbol of each lane, whose interval is given."""
    state, position, words = reader
    slot = state & 0xFFFF
    state = size.astype(jnp.uint32) * (state >> 16) + slot - start.astype(jnp.uint32)
    low = state < START
    word = words[jnp.minimum(position, len(words) - 1)].astype(jnp.uint32)
    state = jnp.where(low, (state << 16) | word, state)
    return Reader(state, position + low.astype(jnp.int32), words)

"""Interleaved range asymmetric numeral systems: encode on the host, decode anywhere.

Symbols are coded as an array `[steps, lanes]`: each lane is one coder with a 32-bit
state and its own run of 16-bit words, all lanes step together, and a step's symbols
are interleaved, so that a decoder writes its output in order. The probability of
column `a` of table `k` is `frequencies[k, a] / 4096`.

A table is picked per symbol by the sum of what the decoder knows: `lane_tables` (one
number per lane), `contexts` (an array like the symbols), and the `memory` of a lane,
`(step, state, tables)`: a traceable `step(state, symbols) -> (state, tables)` over
vectors of lanes, the initial state, and the tables `[lanes]` of the first symbols.

J. Duda, "Asymmetric numeral systems", arXiv:1311.2540 (2013); F. Giesen, "Interleaved
entropy coders", arXiv:1402.3392 (2014). Lanes have separate words here, back to back,
so that a lane's place is an offset and no lane waits for another.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.types import Array

PRECISION = 12  # bits: with 8 for a symbol, one 32-bit entry tells all of a slot
TOTAL = 1 << PRECISION
START = 1 << 16  # lowest state; every lane ends on it
SYMBOLS_PER_LANE = 8192
BYTES_PER_LANE = 2048
MOST_LANES = 4096

Memory = tuple[Callable[[Any, jax.Array], tuple[Any, jax.Array]], Any, jax.Array]


class Stream(NamedTuple):
    """Coded symbols: lane `l` reads `words[starts[l]:ends[l]]` from the front.

    Args:
      words: uint16 `[words]`; other words may be between the lanes'.
      starts: int32 `[lanes]`.
      ends: int32 `[lanes]`, used for checking only.
      states: uint32 `[lanes]`, where decoding starts.
    """

    words: Array
    starts: Array
    ends: Array
    states: Array


def count_lanes(symbols: int, coded_bytes: int | None = None) -> int:
    """Return lanes for so many symbols: one in 8192, at least 1 and at most 4096.

    A lane costs about four bytes more than its symbols; where these take less than a
    quarter of a byte each, the number of lanes follows `coded_bytes` instead.
    """
    lanes = symbols // SYMBOLS_PER_LANE
    if coded_bytes is not None:
        lanes = min(lanes, coded_bytes // BYTES_PER_LANE)
    return min(MOST_LANES, max(1, lanes))


def encode(
    columns: np.ndarray,
    frequencies: np.ndarray,
    contexts: np.ndarray | None = None,
    *,
    lane_tables: np.ndarray | None = None,
    raw: np.ndarray | None = None,
    escape: int = 0,
) -> Stream:
    """Return codes columns of the tables; on the host, vectorized over lanes.

    Args:
      columns: integers `[steps, lanes]`; the frequency of each must not be zero.
      frequencies: `[tables, columns]`, each row summing to 4096.
      contexts: `[steps, lanes]` tables (with a memory: what `follow` returns).
      lane_tables: `[lanes]`, added to the contexts.
      raw: int32 `[steps, lanes]`, the values of symbols in the last column when
        `escape` is 1 or 2: that many words follow such a symbol, verbatim.

    Raises:
      ValueError: a symbol whose frequency is zero, or tables that do not sum to 4096.
    """
    steps, lanes = columns.shape
    frequencies = np.asarray(frequencies, np.uint32)
    if (frequencies.sum(axis=-1) != TOTAL).any():
        raise ValueError(f"frequencies must sum to {TOTAL} in each table")
    width = frequencies.shape[-1]
    starts = (np.cumsum(frequencies, axis=-1, dtype=np.uint32) - frequencies).ravel()
    flat = frequencies.ravel()
    words = np.zeros((steps, 1 + escape, lanes), np.uint16)
    emitted = np.zeros(words.shape, bool)
    state = np.full(lanes, START, np.uint32)
    for first in range((steps - 1) // 256 * 256, -1, -256):
        part = slice(first, min(first + 256, steps))
        where = columns[part].astype(np.int64)
        if escape:
            emitted[part, 1:] = (where == width - 1)[:, None]
            words[part, 1] = raw[part].astype(np.uint16)
            if escape == 2:
                words[part, 2] = (raw[part] >> 16).astype(np.uint16)
        if contexts is not None:
            where += contexts[part].astype(np.int64) * width
        if lane_tables is not None:
            where += lane_tables.astype(np.int64)[None] * width
        sizes, begins = flat[where], starts[where]
        if not sizes.all():
            raise ValueError("a symbol has frequency zero in its table")
        for t in range(part.stop - first - 1, -1, -1):
            full = np.greater_equal(state >> 20, sizes[t], out=emitted[first + t, 0])
            words[first + t, 0] = state.astype(np.uint16)
            state = np.where(full, state >> 16, state)
            quotient = state // sizes[t]
            state += (quotient << PRECISION) - quotient * sizes[t] + begins[t]
    by_lane = emitted.transpose(2, 0, 1)
    offsets = np.zeros(lanes + 1, np.int64)
    np.cumsum(by_lane.sum(axis=(1, 2)), out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]} words in one stream; code it in parts")
    words = words.transpose(2, 0, 1)[by_lane]
    offsets = offsets.astype(np.int32)
    return Stream(words, offsets[:-1], offsets[1:], state)


def follow(
    symbols: np.ndarray, memory: Memory, contexts: np.ndarray | None = None
) -> np.ndarray:
    """Return tables `[steps, lanes]` that a decoder with this memory uses on these
    symbols.
    """
    step, state, tables = memory

    def advance(carry: Any, row: jax.Array) -> tuple[Any, jax.Array]:
        state, tables = carry
        return step(state, row), tables

    carry = (state, jnp.asarray(tables, jnp.int32))
    _, used = lax.scan(advance, carry, jnp.asarray(symbols))
    used = np.asarray(used)
    return used if contexts is None else used + contexts


def lookup(
    frequencies: Array, symbols: Array | None = None, escape: int = 0
) -> tuple[Array, Array | None]:
    """Tabulate what each of the 4096 slots of each table means; NumPy in, NumPy out.

    An entry holds, from the lowest bit, eight bits of symbol (the column; or, when
    values are given as `symbols`, one if the slot escapes), twelve of frequency less
    one, twelve of the slot's place in its symbol. Any input gives a table that a
    decoder can walk without leaving its arrays.

    Returns: entries uint32 `[tables * 4096]`, and values int32 of that shape or None.
    """
    xp: Any = np if isinstance(frequencies, np.ndarray) else jnp
    tables, width = frequencies.shape
    sizes = frequencies.astype(xp.int32)
    ends = xp.cumsum(sizes, axis=-1, dtype=xp.int32)
    slots = xp.arange(TOTAL, dtype=xp.int32)
    if xp is np:
        columns = np.stack([np.searchsorted(row, slots, side="right") for row in ends])
    else:
        columns = _count_until(ends, slots)
    columns = xp.minimum(columns, width - 1).astype(xp.int32)
    size = xp.take_along_axis(sizes, columns, axis=-1)
    place = slots[None] - (xp.take_along_axis(ends, columns, axis=-1) - size)
    values = None
    low = columns
    if symbols is not None:
        low = (columns == width - 1) if escape else xp.zeros_like(columns)
        values = xp.take_along_axis(symbols.astype(xp.int32), columns, axis=-1).ravel()
    last = np.int32(TOTAL - 1)
    parts = [low & np.int32(255), (size - 1) & last, place & last]
    low, size, place = (part.astype(xp.uint32) for part in parts)
    entries = low | (size << np.uint32(8)) | (place << np.uint32(20))
    return entries.reshape(tables * TOTAL), values


def _count_until(ends: Array, slots: Array) -> jax.Array:
    """Return how many of each row's ends, which never fall, a slot has reached:
    bisection.
    """
    width = ends.shape[-1]

    def halve(i: jax.Array, count: jax.Array) -> jax.Array:
        more = count + (1 << width.bit_length() - 1 - i)
        end = jnp.take_along_axis(ends, jnp.minimum(more, width) - 1, axis=-1)
        return jnp.where((more <= width) & (end <= slots[None]), more, count)

    # Zeros that follow from the ends: plain ones would be made, a copy for each leaf,
    # before the program begins.
    zeros = jnp.broadcast_to(ends[:, :1] >> 31, (len(ends), len(slots)))
    return lax.fori_loop(0, width.bit_length(), halve, zeros)


def decode(
    stream: Stream,
    frequencies: jax.Array,
    symbols: jax.Array | None = None,
    contexts: jax.Array | None = None,
    *,
    steps: int,
    escape: int = 0,
    lane_tables: jax.Array | None = None,
    memory: Memory | None = None,
) -> jax.Array:
    """Return the coded symbols `[steps, lanes]`; traceable.

    uint8 columns without `symbols`; with `symbols` int32 `[tables, columns]`, the
    values found there, int32. The other arguments as they were given to `encode`.
    A damaged stream gives wrong symbols, never a read outside an array nor a loop
    without end: check checksums before.
    """
    step, *carry = memory if memory is not None else (None, (), None)
    return _decode(
        stream,
        frequencies,
        symbols,
        contexts,
        lane_tables,
        tuple(carry),
        steps=steps,
        escape=escape,
        step=step,
    )


@functools.partial(jax.jit, static_argnames=("steps", "escape", "step"))
def _decode(
    stream: Stream,
    frequencies: jax.Array,
    symbols: jax.Array | None,
    contexts: jax.Array | None,
    lane_tables: jax.Array | None,
    memory: tuple[Any, jax.Array | None],
    *,
    steps: int,
    escape: int,
    step: Callable | None,
) -> jax.Array:
    entries, values = lookup(jnp.asarray(frequencies), symbols, escape)
    words = jnp.pad(stream.words, (0, 1))  # an empty array has nothing to clamp to
    lanes = stream.states.shape[0]
    state, tables = memory
    if tables is not None:
        tables = jnp.broadcast_to(jnp.asarray(tables, jnp.int32), (lanes,))

    def read(at: jax.Array) -> jax.Array:
        return words.at[at].get(mode="clip").astype(jnp.uint32)

    def advance(t: jax.Array, carry: tuple) -> tuple:
        x, at, out, state, tables = carry
        slot = (x & jnp.uint32(TOTAL - 1)).astype(jnp.int32)
        for more in (
            lane_tables,
            None if contexts is None else contexts[t],
            tables,
        ):
            if more is not None:
                slot = slot + (more.astype(jnp.int32) << PRECISION)
        entry = entries.at[slot].get(mode="clip")
        size = ((entry >> 8) & jnp.uint32(TOTAL - 1)) + jnp.uint32(1)
        x = size * (x >> PRECISION) + (entry >> 20)
        short = x < START
        x = jnp.where(short, (x << 16) | read(at), x)
        at = at + short
        if values is None:
            symbol = entry.astype(jnp.uint8)
        else:
            symbol = values.at[slot].get(mode="clip")
            if escape:
                escaped = (entry & jnp.uint32(1)) == 1
                verbatim = read(at)
                if escape == 1:
                    verbatim = verbatim.astype(jnp.int16).astype(jnp.int32)
                else:
                    verbatim = (verbatim | (read(at + 1) << 16)).astype(jnp.int32)
                symbol = jnp.where(escaped, verbatim, symbol)
                at = at + escaped * escape
        out = lax.dynamic_update_slice(out, symbol[None], (t, 0))
        if step is not None:
            state, tables = step(state, symbol)
            tables = tables.astype(jnp.int32)
        return x, at, out, state, tables

    # Overwritten; zeros would be made for all streams of a program before it begins.
    kind = jnp.uint8 if values is None else jnp.int32
    out = jnp.broadcast_to(stream.states.astype(kind), (steps, lanes))
    at = stream.starts.astype(jnp.int32)
    carry = (stream.states, at, out, state, tables)
    return lax.fori_loop(0, steps, advance, carry)[2]


def decode_on_host(
    stream: Stream,
    frequencies: np.ndarray,
    symbols: np.ndarray | None = None,
    contexts: np.ndarray | None = None,
    *,
    steps: int,
    escape: int = 0,
    lane_tables: np.ndarray | None = None,
    memory: Memory | None = None,
) -> np.ndarray:
    """Decode in NumPy, for checks and for loading where XLA is not wanted.

    Raises:
      ValueError: the lanes do not end where they must, so the stream is damaged.
    """
    words, at, ends, x = (np.asarray(part) for part in stream)
    words = np.append(words, np.zeros(3, np.uint16)).astype(np.uint32)
    entries, values = lookup(np.asarray(frequencies), symbols, escape)
    out = np.zeros((steps, x.size), np.uint8 if values is None else np.int32)
    at = at.astype(np.int64)
    step, state, tables = memory if memory is not None else (None, (), None)
    base = 0 if lane_tables is None else lane_tables.astype(np.int64) << PRECISION
    for t in range(steps):
        slot = (x & np.uint32(TOTAL - 1)).astype(np.int64) + base
        if contexts is not None:
            slot += contexts[t].astype(np.int64) << PRECISION
        if tables is not None:
            slot += np.asarray(tables, np.int64) << PRECISION
        slot = np.clip(slot, 0, entries.size - 1)
        entry = entries[slot]
        size = ((entry >> 8) & np.uint32(TOTAL - 1)) + np.uint32(1)
        x = size * (x >> PRECISION) + (entry >> 20)
        short = x < START
        at = np.clip(at, 0, words.size - 3)
        x = np.where(short, (x << 16) | words[at], x)
        at += short
        if values is None:
            out[t] = entry & np.uint32(255)
        else:
            out[t] = values[slot]
            if escape:
                escaped = (entry & np.uint32(1)) == 1
                verbatim = words[at].astype(np.uint16).astype(np.int16).astype(np.int32)
                if escape == 2:
                    verbatim = (words[at] | (words[at + 1] << 16)).astype(np.int32)
                out[t] = np.where(escaped, verbatim, out[t])
                at += escaped * escape
        if step is not None:
            state, tables = step(state, jnp.asarray(out[t]))
    if (x != START).any() or (at != ends).any():
        raise ValueError("a lane does not end where it must: the stream is damaged")
    return out

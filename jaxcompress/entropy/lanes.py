"""Huffman-coded bytes decoded in XLA: every block of symbols is a lane of its own.

A lane knows the place of its first bit and its table; all lanes read down their
streams together, two symbols a step. How long the streams are does not matter, so the
file may hold few long ones, as Zstandard writes them, and a device many short lanes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.entropy.literals import TABLE_BITS

SLOTS = 1 << TABLE_BITS
AHEAD = 32  # bits in front of the first stream, so that no window begins before it


def lookup(lengths: jax.Array) -> jax.Array:
    """What the next 11 bits mean: uint32 `[tables * 2048]`, length above symbol.

    Codes are given in order of falling length, then of symbols, from zero on.

    Args:
      lengths: uint8 `[tables, 256]`, bits of the codes, 0 for none.
    """
    tables = lengths.shape[0]
    order = jnp.argsort(-lengths.astype(jnp.int32), axis=-1, stable=True)
    size = jnp.take_along_axis(lengths, order, axis=-1).astype(jnp.int32)
    taken = jnp.where(size > 0, SLOTS >> jnp.minimum(size, TABLE_BITS), 0)
    begins = jnp.cumsum(taken, axis=-1, dtype=jnp.int32) - taken
    # Each slot gets the place of the last code that begins at it or before.
    begins = begins + SLOTS * jnp.arange(tables, dtype=jnp.int32)[:, None]
    begins = jnp.where(size > 0, begins, tables * SLOTS)
    places = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32), begins.shape)
    slots = jnp.zeros(tables * SLOTS, jnp.int32)
    slots = slots.at[begins].max(places, mode="drop").reshape(tables, SLOTS)
    slots = lax.cummax(slots, axis=1)
    entry = (order | (size << 8)).astype(jnp.uint32)
    return jnp.take_along_axis(entry, slots, axis=-1).reshape(tables * SLOTS)


def decode(
    words: jax.Array,
    starts: jax.Array,
    tables: jax.Array,
    entries: jax.Array,
    count: int,
) -> jax.Array:
    """The symbols of lanes: uint8 `[lanes, count]`.

    A damaged stream gives wrong symbols, never a read outside an array.

    Args:
      words: uint32 `[words]`, little-endian bytes of the streams.
      starts: uint32 `[lanes]`, one past a lane's first bit, which is its highest.
      tables: integers `[lanes]`.
      entries: what `lookup` gives.
      count: symbols of a lane, a multiple of 4.
    """
    lanes = starts.shape[0]
    table = tables.astype(jnp.int32) << TABLE_BITS

    def word(at: jax.Array) -> jax.Array:
        return words.at[at].get(mode="clip")

    def entry(bits: jax.Array) -> jax.Array:
        slot = table + (bits >> np.uint32(32 - TABLE_BITS)).astype(jnp.int32)
        return entries.at[slot].get(mode="clip")

    def step(t: jax.Array, carry: tuple) -> tuple:
        place, four, out = carry
        place = place - np.uint32(32)
        at, shift = (place >> np.uint32(5)).astype(jnp.int32), place & np.uint32(31)
        above = (word(at + 1) << (np.uint32(31) - shift)) << np.uint32(1)
        window = (word(at) >> shift) | above
        first = entry(window)
        size = first >> np.uint32(8)
        second = entry(window << size)
        both = (first & np.uint32(255)) | ((second & np.uint32(255)) << np.uint32(8))
        both = both | ((size + (second >> np.uint32(8))) << np.uint32(16))
        both = lax.optimization_barrier(both)  # computed once, used twice
        place = place + np.uint32(32) - (both >> np.uint32(16))
        four = (four >> np.uint32(16)) | (both << np.uint32(16))
        return place, four, lax.dynamic_update_slice(out, four[None], (t >> 1, 0))

    starts = starts.astype(jnp.uint32)
    # Overwritten; zeros would be made for all leaves of a program before it begins.
    out = jnp.broadcast_to(starts, (count // 4, lanes))
    start = (starts, jnp.zeros(lanes, jnp.uint32), out)
    out = lax.fori_loop(0, count // 2, step, start)[2]
    return lax.bitcast_convert_type(out.T, jnp.uint8).reshape(lanes, count)

"""Huffman-coded bytes decoded in XLA: every block of symbols is a lane of its own.

A lane knows the place of its first bit and its table; all lanes read down their
streams together, two symbols a step. How long the streams are does not matter, so the
file may hold few long ones, as Zstandard writes them, and a device many short lanes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.coding.zstd_literals import TABLE_BITS

SLOTS = 1 << TABLE_BITS
AHEAD = 32  # bits before the first stream, so that no window begins before it


def lookup(alphabets: jax.Array, counts: jax.Array) -> jax.Array:
    """Tabulate what the next 11 bits mean: uint32 `[tables * 2048]`, length above
    symbol.

    Codes are given from zero on, the longest first.

    Args:
      alphabets: uint8 `[tables, 256]`, symbols by falling length of their codes.
      counts: integers `[tables, 11]`, codes of 11 bits, of 10, and so on to 1.
    """
    tables = alphabets.shape[0]
    slot = lax.broadcasted_iota(jnp.int32, (tables, SLOTS), 1)
    place, size = jnp.zeros_like(slot), jnp.zeros_like(slot)
    begin = first = jnp.zeros((tables, 1), jnp.int32)
    for shorter in range(TABLE_BITS):
        reached = slot >= begin
        place = jnp.where(reached, first + ((slot - begin) >> shorter), place)
        size = jnp.where(reached, TABLE_BITS - shorter, size)
        count = counts[:, shorter, None].astype(jnp.int32)
        begin, first = begin + (count << shorter), first + count
    symbols = jnp.take_along_axis(alphabets, place, axis=-1, mode="clip")
    return (symbols | (size << 8)).astype(jnp.uint32).reshape(tables * SLOTS)


def decode(
    words: jax.Array,
    starts: jax.Array,
    tables: jax.Array,
    entries: jax.Array,
    count: int,
) -> jax.Array:
    """Return the symbols of lanes: uint8 `[lanes, count]`.

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

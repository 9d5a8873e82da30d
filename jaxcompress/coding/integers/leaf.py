"""Integer arrays at their entropy: `Coded`, and the method that makes it."""

import math
from collections.abc import Hashable
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxcompress.coding import rans
from jaxcompress.coding.integers import record as integer_record
from jaxcompress.coding.integers import shared_programs
from jaxcompress.coding.integers.scale_contexts import contexts_by_scale
from jaxcompress.coding.integers.symbol_model import Plan, plan
from jaxcompress.coding.packing import (
    Packed,
    pack_bits,
    pack_fields,
    packed_bytes,
    packed_rows,
    packing_axis,
    unpack_fields,
)
from jaxcompress.coding.threads import in_order
from jaxcompress.tree.decoding import announced
from jaxcompress.tree.leaf import Leaf, leaf, nbytes, static
from jaxcompress.tree.methods import method
from jaxcompress.types import Array

__all__ = ["Coded", "Packed", "entropy_code", "pack_bits"]

ALLOWANCE = 128  # bytes: what a coded array's longer entry in a file's header takes
LANES_TOGETHER = 64  # of several slices, decoded in one loop
STEP = 80  # symbols that NumPy decodes in the time that a step takes at least (15 us)
FEW = 1 << 21  # symbols of one program; NumPy decodes these sooner than XLA compiles
PART = 1 << 22  # symbols that a thread codes at a time, to bound memory


@leaf
class Coded(Leaf):
    """One integer array `[..., *trailing]`, each slice of it coded on its own.

    Invariant: every data array has the stack axes first, and a slice of all of them
    is the `Coded` of a slice. Symbol `i` of a slice is step `i // lanes` of lane
    `i % lanes`; no lanes means that every code of a slice is its base.

    The words of the longest slice set the size in memory; `stored` leaves the padding
    of the others out.

    Args:
      words: uint16 `[..., words]`; offsets: int32 `[..., lanes + 1]`; states: uint32
        `[..., lanes]`: a `rans.Stream` per slice.
      frequencies: uint16 `[..., contexts, columns]`.
      base: int32 `[...]`, added to the codes in bytes; None for whole codes.
      symbols: int32 `[..., contexts, columns]`, values of the columns; None where
        column and value are the same.
      low: uint8, the `low_bits` lowest bits of each code, packed; or None.
      contexts: uint8 `[..., *trailing]`, any trailing size may be 1; or None.
      width: bits per code of a coded byte, which holds `8 // width` codes side
        by side along the inputs; 0 where whole codes are coded.
      escape: 16-bit words after a symbol of the last column: its value, verbatim.

    Example:
      >>> jc.entropy_code(jnp.zeros((64, 64), jnp.uint8)).materialize().sum()
      Array(0, dtype=uint32)
    """

    words: jax.Array
    offsets: jax.Array
    states: jax.Array
    frequencies: jax.Array
    base: jax.Array | None
    symbols: jax.Array | None
    low: jax.Array | None
    contexts: jax.Array | None
    trailing: tuple[int, ...] = static()
    dtype: np.dtype = static()
    width: int = static()
    escape: int = static()
    low_bits: int = static()

    lossless: ClassVar[bool] = True
    entropy_coded: ClassVar[bool] = True
    integers: ClassVar[tuple[str, ...]] = ("words", "offsets", "states", "frequencies")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.states.shape[:-1] + self.trailing

    def materialize(self) -> jax.Array:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(self)):
            return _slices(self)
        host = isinstance(self.words, np.ndarray) or len(self.words.devices()) == 1
        if host and announced(*self.decoding_work()) < FEW:
            return jnp.asarray(self.on_host())
        return _decoded(shared_programs.fill_up(self))

    def decoding_work(self) -> tuple[Hashable, int]:
        """Return its program, and the symbols that NumPy would decode in the same
        time.
        """
        lanes = max(1, self.states.size)
        work = -(-self.size // lanes) * max(lanes, STEP)
        return shared_programs.program(self), work

    def on_host(self) -> np.ndarray:
        """Return array, decoded by NumPy; ValueError where the stream is damaged."""
        return _codes(jax.tree.map(np.asarray, self), np)

    def stored(self) -> dict[str, np.ndarray]:
        """Return what a file holds: all but raw bits and contexts in one `stream` of
        bytes.
        """
        arrays = {"stream": np.frombuffer(integer_record.write(self), np.uint8)}
        if self.low is not None:
            arrays["low"] = np.asarray(self.low)
        if self.contexts is not None:
            arrays["contexts"] = np.asarray(self.contexts)
        return arrays

    @classmethod
    def restored(cls, arrays: dict[str, np.ndarray], static: dict[str, Any]) -> "Coded":
        """Undo `stored`, given the static fields; ValueError if they do not fit."""
        return cls(**integer_record.read(arrays, static))


@method(selects="codes", traceable=False)
def entropy_code(
    codes: Array,
    moments: Any = None,
    *,
    contexts: Array | None = None,
    stack: int | None = None,
) -> Any:
    """Code integers at their order-0 entropy; the result materializes bit for bit.

    Slices along the stack axes have their own tables and streams. Returns the smallest
    in a file of: `Coded`, `Packed`, and the array as it is; of the leaves only what
    is smaller in memory, too.

    Args:
      codes: bool or integers of up to 32 bits, `[..., inputs, outputs]`.
      moments: not used.
      contexts: integers in `[0, 255]` that choose the table of each code; axes as
        `codes`, stack axes alike, other sizes alike or 1. They are stored with the
        codes, and dropped where they do not pay. Without them, those of
        `scales.contexts_by_scale` are tried.
      stack: number of leading stack axes; all but the last two if not given.

    Raises:
      TypeError: codes are not integers of up to 32 bits.
      ValueError: contexts or stack do not fit the codes.

    Example:
      >>> recipe = jc.chain("symmetric(bits=4, block=32)", "entropy_code()")
      >>> small = jc.compress(params, recipe)

    Source: rANS, see `rans`; tables are static, one per slice and context.
    """
    del moments
    array = np.asarray(codes)
    kind = jnp.dtype(array.dtype)
    if not (kind == np.bool_ or kind.kind in "iu") or kind.itemsize > 4:
        raise TypeError(
            f"entropy_code takes integers of up to 32 bits, not {kind}; "
            "code_floats takes floating-point arrays"
        )
    stack = max(0, array.ndim - 2) if stack is None else stack
    if array.size == 0 or array.ndim == 0:
        return codes
    if not 0 <= stack < array.ndim:
        raise ValueError(
            f"stack={stack} for codes of shape {array.shape}: at least one axis must "
            "be left to each slice"
        )
    lead, trailing = array.shape[:stack], array.shape[stack:]
    if contexts is not None:
        contexts = _checked(np.asarray(contexts), array.shape, stack)
    slices = array.astype(np.uint32 if kind == np.uint32 else np.int32)
    slices = slices.view(np.int32).reshape(-1, *trailing)
    if contexts is None and len(trailing) == 2:
        contexts = contexts_by_scale(slices)
        if contexts is not None:
            contexts = contexts.reshape(*lead, *contexts.shape[1:])
    spread = None
    if contexts is not None:
        spread = np.broadcast_to(contexts, array.shape).reshape(slices.shape)
    coded = _coded(plan(slices, spread), lead, trailing, kind, slices, contexts)
    size = ALLOWANCE + stored_bytes(coded)
    bits = 8 * kind.itemsize
    if slices.min() >= 0:
        bits = min(bits, int(slices.max()).bit_length() or 1)
    packed = packed_bytes(array.shape, bits)
    if size < min(packed, array.nbytes) and nbytes(coded) < array.nbytes:
        return coded
    return pack_bits(array, bits) if packed < array.nbytes else codes


def stored_bytes(x: Any) -> int:
    """Return bytes of the arrays of a leaf, or of an array, in a file."""
    leaves = jax.tree.leaves(x, is_leaf=lambda part: hasattr(part, "stored"))
    return sum(
        sum(array.nbytes for array in part.stored().values())
        if hasattr(part, "stored")
        else part.nbytes
        for part in leaves
    )


def _checked(contexts: np.ndarray, shape: tuple[int, ...], stack: int) -> np.ndarray:
    fits = contexts.ndim == len(shape) and all(
        have == want or (have == 1 and axis >= stack)
        for axis, (have, want) in enumerate(zip(contexts.shape, shape, strict=True))
    )
    if not fits:
        raise ValueError(
            f"contexts of shape {contexts.shape} do not fit codes of shape {shape} "
            f"with {stack} stack axes; sizes must agree, or be 1 after the stack axes"
        )
    if contexts.dtype.kind not in "iub" or contexts.min() < 0 or contexts.max() > 255:
        raise ValueError("contexts must be integers in [0, 255]")
    return contexts.astype(np.uint8)


def _coded(
    plan: Plan,
    lead: tuple[int, ...],
    trailing: tuple[int, ...],
    kind: np.dtype,
    codes: np.ndarray,
    contexts: Array | None,
) -> Coded:
    """Return the leaf of a plan: all slices coded together, padded to the longest."""
    view, lanes = plan.view, plan.lanes
    slices, count = plan.columns.shape
    tables, width = plan.frequencies.shape[1:]
    raw = view.numbers if plan.escape else None
    per = max(1, PART // count)

    def work(first: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return words of some slices, the places of their lanes in these, and
        states.
        """
        part = slice(first, first + per)
        frequencies = plan.frequencies[part]
        slices_of_part = frequencies.shape[0]
        rest = -count % lanes
        likely = frequencies[:, 0].argmax(axis=-1)[:, None]
        columns = np.append(plan.columns[part], np.repeat(likely, rest, 1), axis=1)
        stream = rans.encode(
            _by_step(columns, lanes),
            frequencies.reshape(-1, width),
            _filled(view.contexts, part, lanes),
            lane_tables=np.repeat(np.arange(slices_of_part) * tables, lanes),
            raw=_filled(raw, part, lanes),
            escape=plan.escape,
        )
        starts = stream.starts.reshape(slices_of_part, lanes)
        places = np.append(starts, stream.ends[lanes - 1 :: lanes, None], axis=1)
        words = [stream.words[row[0] : row[-1]] for row in places]
        return (
            words,
            places - places[:, :1],
            stream.states.reshape(slices_of_part, lanes),
        )

    words, offsets, states = [], [], []
    for coded_part in in_order(work, range(0, slices if lanes else 0, per)):
        words += coded_part[0]
        offsets.append(coded_part[1])
        states.append(coded_part[2])
    low = None
    if view.low_bits:
        mask = np.int32((1 << view.low_bits) - 1)
        axis = packing_axis(trailing, view.low_bits)
        low = pack_fields((codes & mask).view(np.uint32), view.low_bits, axis=axis)
        low = _lead(low, lead)
    padded = np.zeros((slices, max((row.size for row in words), default=0)), np.uint16)
    for i, row in enumerate(words):
        padded[i, : row.size] = row
    none = np.zeros((slices, 0), np.uint32)
    offsets = np.concatenate(offsets) if lanes else np.zeros((slices, 1), np.int32)
    stacked = (
        padded,
        offsets.astype(np.int32),
        np.concatenate(states) if lanes else none,
        plan.frequencies,
        view.base,
        plan.symbols,
    )
    data = [None if x is None else _lead(x, lead) for x in stacked]
    if view.contexts is None:
        contexts = None
    elif contexts is not None:
        contexts = jnp.asarray(contexts)
    return Coded(
        *data, low, contexts, trailing, kind, view.width, plan.escape, view.low_bits
    )


def _lead(x: Array, lead: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(x.reshape(lead + x.shape[1:]))


def _by_step(x: Any, lanes: int) -> Any:
    """Transpose `[slices, steps * lanes]` to `[steps, slices * lanes]`."""
    slices = x.shape[0]
    x = x.reshape(slices, -1, lanes).swapaxes(0, 1)
    return x.reshape(-1, slices * lanes)


def _filled(x: np.ndarray | None, part: slice, lanes: int) -> np.ndarray | None:
    """Return an array like the columns, zeros where lanes are filled up."""
    if x is None:
        return None
    return _by_step(np.pad(x[part], [(0, 0), (0, -x.shape[1] % lanes)]), lanes)


def _codes(coded: Coded, xp: ModuleType) -> Any:
    """Return the array of a leaf, by JAX or by NumPy."""
    lead, trailing = coded.states.shape[:-1], coded.trailing
    slices, lanes = math.prod(lead), coded.states.shape[-1]
    axis, shape = packing_axis(trailing, coded.width or coded.low_bits), list(trailing)
    if coded.width:
        shape[axis] = packed_rows(coded.width, trailing[axis])
    count = math.prod(shape)
    if lanes:
        tables, width = coded.frequencies.shape[-2:]
        words = coded.words.reshape(-1)
        moved = np.arange(slices, dtype=np.int32) * coded.words.shape[-1]
        offsets = coded.offsets.reshape(slices, lanes + 1) + moved[:, None]
        contexts = coded.contexts
        if contexts is not None:
            contexts = xp.broadcast_to(contexts, lead + trailing)
            contexts = contexts.reshape(slices, count)
            contexts = xp.pad(contexts, [(0, 0), (0, -count % lanes)])
            contexts = _by_step(contexts, lanes)
        symbols = coded.symbols
        decode = rans.decode if xp is jnp else rans.decode_on_host
        out = decode(
            rans.Stream(
                words,
                offsets[:, :-1].reshape(-1),
                offsets[:, 1:].reshape(-1),
                coded.states.reshape(-1),
            ),
            coded.frequencies.reshape(slices * tables, width),
            None if symbols is None else symbols.reshape(slices * tables, width),
            contexts,
            steps=-(-count // lanes),
            escape=coded.escape,
            lane_tables=np.repeat(np.arange(slices, dtype=np.int32) * tables, lanes),
        )
        out = out.reshape(-1, slices, lanes).swapaxes(0, 1)
        out = out.reshape(slices, -1)[:, :count].reshape((*lead, *shape))
    else:
        out = xp.zeros((*lead, *shape), xp.uint8)
    if coded.width:
        out = out.astype(xp.uint8)
        if coded.width < 8:
            out = unpack_fields(out, coded.width, trailing[axis], axis=axis)
        narrow = coded.dtype.itemsize == 1
        wide = xp.uint8 if narrow else xp.int32
        base = coded.base.reshape(lead + (1,) * len(trailing))
        out = out.astype(wide) + base.astype(wide)
    elif coded.low_bits:
        low = unpack_fields(
            coded.low, coded.low_bits, trailing[axis], axis=axis, dtype="int32"
        )
        out = (out << np.int32(coded.low_bits)) | low
    return out.astype(coded.dtype)


@jax.jit
def _decoded(coded: Coded) -> jax.Array:
    return _slices(coded)


def _slices(coded: Coded) -> jax.Array:
    """Return all slices, some at a time: faster on a CPU, whose cache holds few
    tables.
    """
    lead, lanes = coded.states.shape[:-1], coded.states.shape[-1]
    if not lead:
        return _codes(coded, jnp)
    count = math.prod(lead)
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(lead) :]), coded)
    together = max(1, LANES_TOGETHER // max(1, lanes))
    out = lax.map(lambda one: _codes(one, jnp), flat, batch_size=together)
    return out.reshape(lead + coded.trailing)

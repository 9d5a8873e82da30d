"""Integers at their entropy, decoded inside `jit`: `CodedLevels`."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxcompress.coding import array_codecs, rans
from jaxcompress.coding.levels import (
    contexts,
    generalized_gaussian,
    trellis,
)
from jaxcompress.coding.levels import (
    record as level_record,
)
from jaxcompress.coding.packing import bits_needed
from jaxcompress.tree.leaf import Leaf, leaf, static

TABLE_BITS = 1000  # about, before steps that are coded
LARGEST = 1 << 15  # levels are below it: one word holds an escaped one


@leaf
class CodedLevels(Leaf):
    """Integers `[..., inputs, outputs]` at their entropy, decoded inside `jit`.

    Invariant: every data array has the stack axes first, and a slice of all of them
    is the `CodedLevels` of a slice. Each row, its outputs as `in_groups` lays them, is
    cut into walks of `places` outputs, the last filled up; a lane codes the same number
    of walks, one after the other, and so all lanes begin walks together. The table of a
    level follows from the kinds of its row and column (`contexts.Contexts`) and, with a
    trellis, from whether the state of its walk is odd: such tables follow the
    others.

    Args:
      words: uint16 `[..., words]`; offsets: int32 `[..., lanes + 1]`; states: uint32
        `[..., lanes]`: a `rans.Stream`.
      frequencies: uint16 `[..., parities * contexts, columns]`, which `parameters`
        uint8 `[..., contexts, 2]` determine.
      rows: uint8 `[..., inputs]`; columns: uint8 `[..., outputs]`, in the order of
        walks; edges: uint8 `[..., contexts - 1]`.
      places: outputs in a walk.
      trellis: its number of states; 0 for plain integers.
      groups: that the outputs of a walk are in, one after the other.
      dtype: of the integers, int8 where they fit.

    Example:
      >>> small = jc.rate_distortion(x, rate=3.0, states=8)
      >>> type(small.levels).__name__
      'CodedLevels'
    """

    words: jax.Array
    offsets: jax.Array
    states: jax.Array
    frequencies: jax.Array
    parameters: jax.Array
    rows: jax.Array
    columns: jax.Array
    edges: jax.Array
    places: int = static()
    trellis: int = static()
    dtype: np.dtype = static()
    groups: int = static(default=1)

    lossless: ClassVar[bool] = True
    entropy_coded: ClassVar[bool] = True
    integers: ClassVar[tuple[str, ...]] = ("words", "offsets", "states", "frequencies")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape, self.columns.shape[-1])

    def materialize(self) -> jax.Array:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(self)):
            return _each_slice(self)
        return _decoded(_roomy(self))

    def stored(self) -> dict[str, np.ndarray]:
        """Return what a file holds: one `stream` of bytes."""
        return {"stream": np.frombuffer(level_record.write(self), np.uint8)}

    @classmethod
    def restored(
        cls, arrays: dict[str, np.ndarray], static: dict[str, Any]
    ) -> "CodedLevels":
        """Undo `stored`, given the static fields; ValueError if they do not fit."""
        return cls(**level_record.read(arrays, static))


def count_lanes(inputs: int, outputs: int) -> int:
    """Return lanes for a slice of this shape, with as few walks to fill up as can be.

    About as many as `rans.count_lanes` would take, within a factor of two.
    """
    count, places = trellis.walks(outputs)
    total = inputs * count
    wanted = total / rans.count_lanes(total * places)
    each = range(max(1, math.ceil(wanted / 2)), int(2 * wanted) + 1)
    return min(
        (-(-total // n) * n, abs(math.log(n / wanted)), -(-total // n)) for n in each
    )[2]


def in_groups(x: Any, groups: int, places: int) -> Any:
    """Return outputs, the last axis, in the order of walks: group by group within each
    walk.

    Group `g` is outputs `g`, `g + groups`, ...; each walk has as many of each.
    """
    if groups == 1:
        return x
    by_walk = x.reshape(*x.shape[:-1], -1, places // groups, groups)
    return by_walk.swapaxes(-1, -2).reshape(x.shape)


def out_of_groups(x: Any, groups: int, places: int) -> Any:
    """Undo `in_groups`."""
    if groups == 1:
        return x
    by_walk = x.reshape(*x.shape[:-1], -1, groups, places // groups)
    return by_walk.swapaxes(-1, -2).reshape(x.shape)


def code_levels(levels: np.ndarray, states: int, groups: int = 1) -> CodedLevels:
    """Return codes the levels of a stack of weights, each slice with its own tables.

    Args:
      levels: int32 `[..., inputs, outputs]`; with a trellis, its walks along outputs.
      states: of the trellis, or 0.
      groups: of outputs, that walks lead through one after the other.

    Raises:
      ValueError: a level past 16 bits, or one that its walk does not allow.
    """
    largest = int(np.abs(levels).max(initial=0))
    if largest >= LARGEST:
        raise ValueError(
            f"a level of {largest} does not fit 16 bits: the rate is too high for "
            "these weights; keep the leaf, or code_floats it"
        )
    lead, (inputs, outputs) = levels.shape[:-2], levels.shape[-2:]
    parities = 2 if states else 1
    _, places = trellis.walks(outputs)
    slices = in_groups(levels, groups, places).reshape(-1, inputs, outputs)
    fits = [contexts.fit(each, parities) for each in slices]
    lanes = count_lanes(inputs, outputs)
    kinds = max(len(each.parameters) for each in fits)
    edges = _stacked([each.edges for each in fits], kinds - 1, 255)
    parameters = _stacked([each.parameters for each in fits], kinds, 0)
    frequencies = np.stack([contexts.frequencies(x, parities) for x in parameters])
    streams = []
    for i, each in enumerate(fits):
        tables = _contexts(each.rows, each.columns, edges[i], places, lanes, np)
        raw = _by_step(slices[i], places, lanes, np)
        if states:
            _check_walks(raw.reshape(-1, places, lanes), states)
            tables = tables + (raw & 1) * kinds
        columns = contexts.columns_of(raw >> (parities - 1))
        columns = contexts.escaped(columns, tables, frequencies[i])
        streams.append(rans.encode(columns, frequencies[i], tables, raw=raw, escape=1))
    offsets = np.stack([np.append(x.starts, x.ends[-1:]) for x in streams])
    data = {
        "words": _stacked([x.words for x in streams], int(offsets.max()), 0),
        "offsets": offsets,
        "states": np.stack([x.states for x in streams]),
        "frequencies": frequencies,
        "parameters": parameters,
        "rows": np.stack([each.rows for each in fits]),
        "columns": np.stack([each.columns for each in fits]),
        "edges": edges,
    }
    return CodedLevels(
        **{k: jnp.asarray(x.reshape(lead + x.shape[1:])) for k, x in data.items()},
        places=places,
        trellis=states,
        dtype=np.dtype("int8" if largest < 128 else "int16"),
        groups=groups,
    )


def _check_walks(levels: np.ndarray, states: int) -> None:
    """Raise where a decoder would lose its way: `[walks, places, lanes]`."""
    state = np.zeros_like(levels[:, 0])
    for place in range(levels.shape[1]):
        current = levels[:, place]
        if ((current ^ state) & 1).any():
            raise ValueError(
                f"levels that no walk through a trellis of {states} states gives; make "
                "them with trellis.search, zeros after the last output"
            )
        state = trellis.advance(state, current, states)


def _stacked(arrays: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    """Return arrays of different lengths in one, filled up."""
    out = np.full((len(arrays), length, *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out


def _by_step(x: Any, places: int, lanes: int, xp: Any) -> Any:
    """Arrange `[inputs, outputs]` as `[steps, lanes]`, segment after segment, padded
    with zeros.

    Zero is a level that state 0 allows, and leads from it to itself.
    """
    inputs, outputs = x.shape
    count = -(-outputs // places)
    x = xp.pad(x, [(0, 0), (0, count * places - outputs)])
    x = x.reshape(inputs * count, places)
    each = -(-inputs * count // lanes)
    x = xp.pad(x, [(0, each * lanes - inputs * count), (0, 0)])
    return x.reshape(lanes, each * places).T


def _contexts(
    rows: Any, columns: Any, edges: Any, places: int, lanes: int, xp: Any
) -> Any:
    """Return the context of each symbol, uint8 `[steps, lanes]`."""
    scale = rows[:, None].astype(xp.int32) + columns[None].astype(xp.int32)
    classes = xp.zeros(scale.shape, xp.uint8)
    for i in range(edges.shape[0]):
        classes = classes + (scale >= edges[i].astype(xp.int32)).astype(xp.uint8)
    return _by_step(classes, places, lanes, xp)


def _slice(coded: CodedLevels) -> jax.Array:
    """Return one slice, `[inputs, outputs]`."""
    (inputs,), (outputs,) = coded.rows.shape, coded.columns.shape
    (lanes,), places = coded.states.shape, coded.places
    count = -(-outputs // places)
    each = -(-inputs * count // lanes)
    kinds = coded.parameters.shape[0]
    tables = _contexts(coded.rows, coded.columns, coded.edges, places, lanes, jnp)
    column = (
        np.arange(generalized_gaussian.WIDTH, dtype=np.int32)
        - generalized_gaussian.REACH
    )
    values, memory = column[None], None
    if coded.trellis:
        values = np.stack([2 * column, 2 * column + 1])

        def step(walk: Any, level: jax.Array) -> tuple[Any, jax.Array]:
            place, state = walk
            place = jnp.where(place + 1 == places, 0, place + 1)
            state = trellis.advance(state, level, coded.trellis)
            state = jnp.where(place == 0, 0, state)
            return (place, state), (state & 1) * kinds

        zero = jnp.zeros(lanes, jnp.int32)
        memory = step, (jnp.int32(0), zero), zero
    levels = rans.decode(
        rans.Stream(coded.words, coded.offsets[:-1], coded.offsets[1:], coded.states),
        coded.frequencies,
        jnp.asarray(np.repeat(values, kinds, axis=0)),
        tables,
        steps=each * places,
        escape=1,
        memory=memory,
    )
    levels = levels.T.reshape(lanes * each, places)[: inputs * count]
    levels = levels.reshape(inputs, count * places)[:, :outputs]
    return out_of_groups(levels, coded.groups, coded.places).astype(coded.dtype)


@jax.jit
def _decoded(coded: CodedLevels) -> jax.Array:
    return _each_slice(coded)


def _each_slice(coded: CodedLevels) -> jax.Array:
    lead = coded.states.shape[:-1]
    if not lead:
        return _slice(coded)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), coded)
    out = lax.map(_slice, flat)
    return out.reshape(*lead, *out.shape[1:])


def _roomy(coded: CodedLevels) -> CodedLevels:
    """Return words and contexts filled up to sizes that many leaves share: fewer
    compilations.

    What is filled up is never used.
    """
    kinds = coded.parameters.shape[-2]
    room = max(0, contexts.MOST - kinds)
    width = coded.frequencies.shape[-1]
    lead = coded.states.shape[:-1]
    # On the host: under a trace, JAX turns an operation on constants into a tracer.
    tables = _on_host(coded.frequencies).reshape(*lead, -1, kinds, width)
    tables = _filled(tables, -2, kinds + room, 0).reshape(*lead, -1, width)
    words = max(64, coded.words.shape[-1])
    return dataclasses.replace(
        coded,
        words=_filled(coded.words, -1, 1 << (words - 1).bit_length(), 0),
        frequencies=tables,
        parameters=_filled(coded.parameters, -2, kinds + room, 0),
        edges=_filled(coded.edges, -1, kinds + room - 1, 255),
    )


def _filled(x: Any, axis: int, size: int, value: int) -> Any:
    room = [(0, 0)] * x.ndim
    room[axis] = (0, size - x.shape[axis])
    x = _on_host(x)
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.pad(x, room, constant_values=value)


def _on_host(x: Any) -> Any:
    """Return a concrete array of one device in NumPy, others as they are."""
    traced = isinstance(x, jax.core.Tracer)
    spread = isinstance(x, jax.Array) and not traced and len(x.devices()) > 1
    return x if traced or spread else np.asarray(x)


def side_bits(fit: contexts.Contexts, outputs: int) -> int:
    """Return bits of a slice in a file that are not its words, nor steps or column
    scales.
    """
    inputs = fit.rows.size
    lanes = count_lanes(inputs, outputs)
    widths = [bits_needed(x.max()) for x in (fit.rows, fit.columns)]
    layout = level_record.layout(
        1, inputs, outputs, lanes, len(fit.parameters), widths[0], widths[1], 2
    )
    sizes = (
        math.prod(shape) * np.dtype(kind).itemsize for kind, shape in layout.values()
    )
    return 8 * sum(sizes)


def step_bits(steps: np.ndarray, slices: int) -> float:
    """Return bits of a step in a file that holds as many for each of so many slices.

    A file codes long arrays of bfloat16: sign and five bits of a number as they are,
    exponent and two bits at their entropy, for which it holds a table.
    """
    if 2 * slices * steps.size < array_codecs.LEAST:
        return 16.0
    symbols = steps.astype(jnp.bfloat16).view(np.uint16) >> 5 & 1023
    shares = np.bincount(symbols) / symbols.size
    shares = shares[shares > 0]
    return 6.0 - float(shares @ np.log2(shares)) + TABLE_BITS / (slices * steps.size)

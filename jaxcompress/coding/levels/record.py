"""The bytes of coded levels in a file: no padding, no tables."""

import math
from typing import Any

import jax
import numpy as np

from jaxcompress.coding.levels import contexts, trellis
from jaxcompress.coding.packing import (
    bits_needed,
    pack_fields,
    packed_rows,
    unpack_fields,
)
from jaxcompress.coding.tables import read_numbers, write_numbers


def write(coded: Any) -> bytes:
    """Return bytes of a leaf: no padding, and no tables, which `parameters` determine.

    Numbers: one more than the stack axes, their sizes, inputs, outputs, lanes,
    contexts, bits of row and of column kinds, bytes of a length. Then, little endian,
    the arrays that `layout` lists, and the words of each slice.
    """
    lead = coded.states.shape[:-1]
    widths = [bits_needed(np.asarray(x).max()) for x in (coded.rows, coded.columns)]
    offsets = np.asarray(coded.offsets).reshape(-1, coded.offsets.shape[-1])
    lengths = np.diff(offsets)
    wide = 2 if lengths.max() < 1 << 16 else 4
    sizes = [coded.states.shape[-1], coded.parameters.shape[-2], *widths, wide]
    out = [write_numbers([len(lead) + 1, *lead, *coded.shape[-2:], *sizes])]
    arrays = {
        "edges": np.asarray(coded.edges),
        "parameters": np.asarray(coded.parameters),
        "rows": _packed(coded.rows, widths[0]),
        "columns": _packed(coded.columns, widths[1]),
        "states": np.asarray(coded.states),
        "lengths": lengths,
    }
    for name, (kind, _) in layout(1, *coded.shape[-2:], *sizes).items():
        out.append(arrays[name].astype(kind).tobytes())
    words = np.asarray(coded.words).reshape(len(offsets), -1)
    for row, last in zip(words, offsets[:, -1], strict=True):
        out.append(row[:last].astype("<u2").tobytes())
    return b"".join(out)


def read(arrays: dict[str, np.ndarray], static: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a leaf, from what it stored and its static fields.

    Raises:
      ValueError: they do not fit each other. (What fits and is wrong all the same, a
        checksum must find.)
    """
    data = memoryview(np.ascontiguousarray(arrays["stream"], np.uint8))
    (axes,), at = read_numbers(data, 0, 1)
    _require(0 < axes < 16, f"{axes - 1} stack axes")
    lead, at = read_numbers(data, at, axes - 1)
    (inputs, outputs, lanes, kinds, *widths, wide), at = read_numbers(data, at, 7)
    places, states = static["places"], static["trellis"]
    slices = math.prod(lead)
    _require(inputs > 0 and outputs > 0, f"weights of {inputs} x {outputs}")
    _require(0 < places == trellis.walks(outputs)[1], f"walks of {places} places")
    _require(0 < lanes <= inputs * outputs, f"{lanes} lanes")
    _require(wide in (2, 4), f"lengths of {wide} bytes")
    _require(0 < kinds <= 255 and all(0 < w <= 8 for w in widths), f"{kinds} contexts")
    _require(states == 0 or states in trellis.CHECKS, f"a trellis of {states} states")
    groups = static.get("groups", 1)
    fits = groups == 1 or (groups > 1 and not places % groups and not outputs % places)
    _require(fits, f"{groups} groups of {outputs} outputs")
    found = {}
    for name, (kind, shape) in layout(
        slices, inputs, outputs, lanes, kinds, *widths, wide
    ).items():
        size = math.prod(shape) * np.dtype(kind).itemsize
        _require(at + size <= len(data), f"{len(data)} bytes, cut off in its {name}")
        found[name] = np.frombuffer(data, kind, math.prod(shape), at).reshape(shape)
        at += size
    offsets = np.zeros((slices, lanes + 1), np.int64)
    np.cumsum(found.pop("lengths"), axis=1, out=offsets[:, 1:])
    total = int(offsets[:, -1].sum())
    _require(at + 2 * total == len(data), f"{len(data) - at} bytes of {total} words")
    words = np.zeros((slices, int(offsets[:, -1].max(initial=0))), np.uint16)
    for row, last in zip(words, offsets[:, -1], strict=True):
        row[:last] = np.frombuffer(data, "<u2", int(last), at)
        at += 2 * int(last)
    parities = 2 if states else 1
    tables = [contexts.frequencies(x, parities) for x in found["parameters"]]
    for name, width, length in zip(
        ("rows", "columns"), widths, (inputs, outputs), strict=True
    ):
        found[name] = unpack_fields(found[name], width, length, axis=-1)
    found |= {
        "words": words,
        "offsets": offsets.astype(np.int32),
        "frequencies": np.stack(tables),
        "states": found["states"].astype(np.uint32),
    }
    return {
        **{name: x.reshape((*lead, *x.shape[1:])) for name, x in found.items()},
        **static,
    }


def layout(
    slices: int,
    inputs: int,
    outputs: int,
    lanes: int,
    kinds: int,
    row_bits: int,
    column_bits: int,
    wide: int,
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each array of a stream, in their order."""
    return {
        "edges": ("u1", (slices, kinds - 1)),
        "parameters": ("u1", (slices, kinds, 2)),
        "rows": ("u1", (slices, packed_rows(row_bits, inputs))),
        "columns": ("u1", (slices, packed_rows(column_bits, outputs))),
        "states": ("<u4", (slices, lanes)),
        "lengths": (f"<u{wide}", (slices, lanes)),
    }


def _packed(kinds: jax.Array, width: int) -> np.ndarray:
    return pack_fields(np.asarray(kinds), width, axis=-1)


def _require(fits: bool, found: str) -> None:
    if not fits:
        raise ValueError(f"not coded levels: {found}; the file is damaged")

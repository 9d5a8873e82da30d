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
from jaxcompress.coding.record import (
    Record,
    lane_lengths,
    write_numbers,
    write_stack,
    write_words,
)


def write(coded: Any) -> bytes:
    """Return bytes of a leaf: no padding, and no tables, which `parameters` determine.

    Numbers: one more than the stack axes, their sizes, inputs, outputs, lanes,
    contexts, bits of row and of column kinds, bytes of a length. Then, little endian,
    the arrays that `layout` lists, and the words of each slice.
    """
    lead = coded.states.shape[:-1]
    widths = [bits_needed(np.asarray(x).max()) for x in (coded.rows, coded.columns)]
    lengths, wide = lane_lengths(coded.offsets)
    sizes = [coded.states.shape[-1], coded.parameters.shape[-2], *widths, wide]
    out = [write_numbers([*write_stack(lead), *coded.shape[-2:], *sizes])]
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
    out.append(write_words(coded.words, coded.offsets))
    return b"".join(out)


def read(arrays: dict[str, np.ndarray], static: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a leaf, from what it stored and its static fields.

    Raises:
      ValueError: they do not fit each other. (What fits and is wrong all the same, a
        checksum must find.)
    """
    data = Record(np.ascontiguousarray(arrays["stream"], np.uint8).data, "coded levels")
    lead = data.stack()
    inputs, outputs, lanes, kinds, *widths, wide = data.numbers(7)
    places, states = static["places"], static["trellis"]
    slices = math.prod(lead)
    data.require(inputs > 0 and outputs > 0, f"weights of {inputs} x {outputs}")
    data.require(0 < places == trellis.walks(outputs)[1], f"walks of {places} places")
    data.require(0 < lanes <= inputs * outputs, f"{lanes} lanes")
    data.require(wide in (2, 4), f"lengths of {wide} bytes")
    data.require(
        0 < kinds <= 255 and all(0 < w <= 8 for w in widths), f"{kinds} contexts"
    )
    data.require(
        states == 0 or states in trellis.CHECKS, f"a trellis of {states} states"
    )
    groups = static.get("groups", 1)
    fits = groups == 1 or (groups > 1 and not places % groups and not outputs % places)
    data.require(fits, f"{groups} groups of {outputs} outputs")
    sizes = layout(slices, inputs, outputs, lanes, kinds, widths[0], widths[1], wide)
    fields = {
        name: data.array(kind, shape, f"cut off in its {name}: {shape}")
        for name, (kind, shape) in sizes.items()
    }
    fields |= data.words(fields.pop("lengths"))
    parities = 2 if states else 1
    tables = [contexts.frequencies(x, parities) for x in fields["parameters"]]
    for name, width, length in zip(
        ("rows", "columns"), widths, (inputs, outputs), strict=True
    ):
        fields[name] = unpack_fields(fields[name], width, length, axis=-1)
    fields["frequencies"] = np.stack(tables)
    fields["states"] = fields["states"].astype(np.uint32)
    return {
        **{name: x.reshape((*lead, *x.shape[1:])) for name, x in fields.items()},
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

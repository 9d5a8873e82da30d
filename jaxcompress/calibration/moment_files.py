"""Moments as arrays that a file can hold, and back; and those that are mapped."""

import dataclasses
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcompress.calibration.moments import AVERAGED, Moments
from jaxcompress.tree.layouts import Layout, trailing


def moments_to_arrays(moments: Moments) -> dict[str, Any]:
    """Return the moments as a dict of arrays, which `save` can write.

    `moments_from_arrays` gives them back, layout included.
    """
    fields = {name: getattr(moments, name) for name in ("count", *AVERAGED)}
    arrays = {name: x for name, x in fields.items() if x is not None}
    if moments.layout is not None:
        slice_ = trailing(moments.layout)
        arrays["input_axes"] = np.asarray(slice_.inputs, np.int32)
        arrays["output_axes"] = np.asarray(slice_.outputs, np.int32)
        if slice_.stack:
            arrays["stack_axes"] = np.asarray(slice_.stack, np.int32)
    return arrays


def moments_from_arrays(arrays: Mapping[str, Any]) -> Moments:
    """Return the moments of a dict of `moments_to_arrays`."""
    fields = dict(arrays)
    keys = "stack_axes", "input_axes", "output_axes"
    axes = [fields.pop(key, None) for key in keys]
    layout = None
    if axes[1] is not None and axes[2] is not None:
        each = (() if x is None else tuple(np.asarray(x).tolist()) for x in axes)
        layout = Layout(*each)
    return Moments(**fields, layout=layout)


def in_memory(moments: Moments) -> Moments:
    """Return moments whose arrays are in memory, where some are mapped from files.

    Pages of the files leave the memory of this process, so that moments of many leaves,
    read one after the other, take the room of one.
    """
    fields = {name: getattr(moments, name) for name in AVERAGED}
    mapped = {n: x for n, x in fields.items() if isinstance(x, np.memmap)}
    return dataclasses.replace(
        moments, **{n: read_mapped(x) for n, x in mapped.items()}
    )


def read_mapped(x: np.memmap) -> np.ndarray:
    """Return a copy of an array that is mapped from a file, and release its pages."""
    copied = np.array(x)
    if isinstance(x.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        x.base.madvise(mmap.MADV_DONTNEED)
    return copied

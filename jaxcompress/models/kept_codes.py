"""Weights of foreign files as `Quantized` leaves, codes and scales unchanged."""

from typing import Any

import numpy as np

from jaxcompress.models.gguf_blocks import (
    BLOCK,
    unpack_q4_0,
    unpack_q4_1,
    unpack_q8_0,
)
from jaxcompress.quantization.grids import Quantized, Scheme, Steps, quantized
from jaxcompress.tree.layouts import ROWS, restore
from jaxcompress.tree.leaf import Leaf

# GGUF's types that a leaf holds exactly, and the bits of their codes.
TYPES = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
# Types that hold floating-point weights; the others are dequantized.
FLOATS = ("F32", "F16", "BF16", "F64")


def gguf_leaf(
    tensor: Any, name: str, dtype: Any, rows: np.ndarray | None = None
) -> Leaf:
    """Return leaf of a tensor of the gguf package's reader, stored as one of `TYPES`.

    Args:
      tensor: its rows are outputs of a kernel, of a stack of them, or rows of an
        embedding.
      name: of our parameter; it says which of the two.
      dtype: of the restored weight.
      rows: the order in which to take the rows.
    """
    kind = tensor.tensor_type.name
    data = np.asarray(tensor.data)  # [..., rows, bytes]
    data = data if rows is None else data[rows]
    stack, data = data.shape[:-1], data.reshape(-1, data.shape[-1])
    if kind == "Q4_1":
        codes, *steps = (x.reshape(*stack, -1) for x in unpack_q4_1(data))
        leaf = quantized(
            codes.swapaxes(-1, -2),
            Steps(*(x.swapaxes(-1, -2) for x in steps)),
            Scheme("offset", TYPES[kind], BLOCK, np.float16),
            dtype=dtype,
        )
        return _placed(leaf, name)
    unpack = unpack_q4_0 if kind == "Q4_0" else unpack_q8_0
    codes, scale = (x.reshape(*stack, -1) for x in unpack(data))
    return symmetric_leaf(
        codes, scale, name, bits=TYPES[kind], block=BLOCK, dtype=dtype
    )


def symmetric_leaf(
    codes: np.ndarray,
    scale: np.ndarray,
    name: str,
    *,
    bits: int,
    block: int | None,
    dtype: Any,
) -> Leaf:
    """Return leaf of signed codes `[..., rows, columns]`, scales `[..., rows, blocks]`.

    A block whose scale is zero becomes codes of zero with scale one, since a leaf has
    no zero steps: the values are the same.
    """
    empty = scale == 0
    if empty.any():
        size = codes.shape[-1] // scale.shape[-1]
        codes = np.where(np.repeat(empty, size, axis=-1), 0, codes)
        scale = np.where(empty, np.ones_like(scale), scale)
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    leaf = quantized(
        unsigned.swapaxes(-1, -2),
        Steps(scale.swapaxes(-1, -2)),
        Scheme("symmetric", bits, block, scale.dtype),
        dtype=dtype,
    )
    return _placed(leaf, name)


def _placed(leaf: Quantized, name: str) -> Leaf:
    """Return a kernel `[inputs, outputs]`, or an embedding: the transpose of one."""
    if not name.endswith("/embedding"):
        return leaf
    return restore(leaf, leaf.shape[::-1], ROWS)

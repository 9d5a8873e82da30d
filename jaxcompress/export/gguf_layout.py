"""One leaf as the bytes of a GGUF tensor, codes and scales unchanged."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress.export.compressed_tensors_layout import (
    channel_scales,
    repeat_scales,
    signed_codes,
)
from jaxcompress.models.gguf_blocks import BLOCK, pack_q4_0, pack_q8_0
from jaxcompress.quantization.grids import Quantized
from jaxcompress.tree.generic_leaves import Reshaped
from jaxcompress.types import DType

DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Stored(NamedTuple):
    """Bytes of one tensor, rows first; `type` is GGUF's name of their layout."""

    type: str
    data: np.ndarray


def quantized_of(name: str, value: Any) -> Quantized | None:
    """Return codes of a kernel or embedding whose rows are their outputs, or None."""
    if name.endswith("/embedding"):
        transposed = isinstance(value, Reshaped) and value.order == (-1, -2)
        value = value.inner if transposed else None
    return value if isinstance(value, Quantized) else None


def store(leaf: Quantized, rows: np.ndarray | None = None) -> Stored:
    """Store a symmetric leaf `[inputs, outputs]`: Q4_0 up to 4 bits, else Q8_0.

    The values are those of the leaf: scales of blocks larger than 32 are repeated, none
    is rounded. `rows` is the order of its outputs in the file.

    Raises:
      ValueError: GGUF has no counterpart; says what it has.
    """
    if leaf.grid != "symmetric":
        raise ValueError(
            f"the grid {leaf.grid!r} has no counterpart in GGUF; Q4_0 and Q8_0 hold "
            "symmetric codes"
        )
    codes, scale = signed_codes(leaf), channel_scales(leaf)
    scale, _ = repeat_scales(scale, leaf.block, codes.shape[1], (BLOCK,))
    half = scale.astype(np.float32).astype(np.float16)
    if not np.array_equal(half.astype(np.float64), scale.astype(np.float64)):
        raise ValueError(
            f"scales of {np.abs(scale).min():.3g} to {np.abs(scale).max():.3g} in "
            f"{scale.dtype} are no float16 numbers, which GGUF's scales are; compress "
            "with scale_dtype='float16'"
        )
    if rows is not None:
        codes, half = codes[rows], half[rows]
    if leaf.bits <= 4:
        return Stored("Q4_0", pack_q4_0(codes, half))
    return Stored("Q8_0", pack_q8_0(codes, half))


def store_dense(array: np.ndarray, dtype: DType | None = None) -> Stored:
    """Store an array of rows as F32, F16 or BF16; vectors always as F32.

    Raises:
      ValueError: another dtype, or numbers that overflow in float16.
    """
    name = jnp.dtype(array.dtype if dtype is None else dtype).name
    if name not in DENSE:
        raise ValueError(
            f"GGUF stores dense weights as {', '.join(DENSE)}, not as {name}"
        )
    if array.ndim == 1:
        name = "float32"
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array.astype(jnp.dtype(name)))
    if name == "float16" and np.isinf(stored).any() and not np.isinf(array).any():
        raise ValueError("weights beyond 65504 overflow in float16; use bfloat16")
    return Stored(DENSE[name], stored)

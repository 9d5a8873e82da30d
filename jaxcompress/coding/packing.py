"""Unsigned codes of 1 to 32 bits, packed into bytes without loss."""

import math
from types import ModuleType
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress.tree.leaf import Leaf, leaf, static
from jaxcompress.types import Array, DType


@leaf
class Packed(Leaf):
    """Unsigned codes, packed along their inputs axis.

    Invariant: `bits` is split into fields, whole bytes first and then falling powers
    of two (3 = 2 + 1, 11 = 8 + 2 + 1), lowest bits of the code in the first field. A
    field of `w < 8` bits lays `8 / w` neighbours along `axis` into one byte, the first
    in its lowest bits; `packed` holds the fields' rows one after another.

    Args:
      packed: uint8 `[..., rows, outputs]`; `[..., rows]` when `axis` is -1.
      bits: per code, 1 to 32.
      length: codes along `axis`.
      axis: -2, or -1 for vectors and for matrices of fewer than 8 inputs.
      dtype: integer or boolean, of the restored codes.

    Example:
      >>> jc.pack_bits(jnp.arange(16), bits=4).materialize()[3]
      Array(3, dtype=int32)
    """

    packed: jax.Array
    bits: int = static()
    length: int = static()
    axis: int = static(default=-2)
    dtype: np.dtype = static(default=np.dtype("uint8"))

    lossless: ClassVar[bool] = True
    integers: ClassVar[tuple[str, ...]] = ("packed",)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.packed.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    def materialize(self) -> jax.Array:
        return _unpacked(self)


def pack_bits(codes: Array, bits: int) -> Packed:
    """Pack codes `[..., inputs, outputs]` (or `[inputs]`) of `bits` bits into bytes.

    Traceable. Codes are unsigned: values in `[0, 2^bits - 1]`, whatever the dtype.
    They are packed along inputs; where these are fewer than 8, along outputs if that
    takes fewer bytes.

    Args:
      codes: integers or booleans, `[..., inputs, outputs]` or `[inputs]`.
      bits: of a code, 1 to 32.

    Raises:
      TypeError: codes are not integer or boolean.
      ValueError: a scalar, bits out of range, or (outside `jit` only, where values
        can be seen) a code that does not fit.

    Example:
      >>> jc.pack_bits(jnp.arange(16), bits=4).packed.shape
      (8,)
    """
    codes = codes if isinstance(codes, np.ndarray) else jnp.asarray(codes)
    kind = jnp.dtype(codes.dtype)
    if not (jnp.issubdtype(kind, jnp.integer) or kind == jnp.bool_):
        raise TypeError(f"pack takes integer codes, not {kind}; quantize first")
    if codes.ndim == 0:
        raise ValueError("pack takes codes of at least one axis, not a scalar")
    if not 1 <= bits <= 32:
        raise ValueError(f"cannot pack {bits} bits per code; bits must be 1 to 32")
    if not isinstance(codes, Tracer) and codes.size and bits < 32:
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= 1 << bits:
            raise ValueError(
                f"codes span [{low}, {high}], outside the [0, {(1 << bits) - 1}] of "
                f"{bits} bits; subtract the lowest code or raise bits"
            )
    axis = packing_axis(codes.shape, bits)
    packed = jnp.asarray(pack_fields(codes, bits, axis=axis))
    return Packed(packed, bits, codes.shape[axis], axis, kind)


def field_widths(bits: int) -> tuple[int, ...]:
    """Return widths, whole bytes first, of the fields that `bits` is split into.

    Raises:
      ValueError: more bits than codes have, as a file may claim.
    """
    if not 0 <= bits <= 64:
        raise ValueError(f"codes of {bits} bits; they have at most 64")
    return (8,) * (bits // 8) + tuple(w for w in (4, 2, 1) if bits & w)


def packed_rows(bits: int, length: int) -> int:
    """Return byte rows that `length` codes of `bits` bits take."""
    return sum(-(-length * width // 8) for width in field_widths(bits))


def packed_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Return bytes that codes of this shape take when packed."""
    axis = packing_axis(shape, bits)
    return packed_rows(bits, shape[axis]) * math.prod(shape) // max(1, shape[axis])


def packing_axis(shape: tuple[int, ...], bits: int) -> int:
    """Return the axis along which codes of this shape are packed."""
    if len(shape) == 1:
        return -1
    inputs, outputs = shape[-2:]
    along_outputs = inputs * packed_rows(bits, outputs)
    fewer = along_outputs < packed_rows(bits, inputs) * outputs
    return -1 if inputs < 8 and fewer else -2


def pack_fields(codes: Array, bits: int, *, axis: int = -2) -> jax.Array:
    """Return the bytes of `pack`; a NumPy array is packed by NumPy, on the host."""
    xp: ModuleType = np if isinstance(codes, np.ndarray) else jnp
    if axis == -1:
        return pack_fields(codes[..., None], bits)[..., 0]
    *lead, length, outputs = codes.shape
    codes = codes.astype(xp.uint32 if bits > 8 else xp.uint8)
    rows, start = [], 0
    for width in field_widths(bits):
        part = (codes >> np.asarray(start, codes.dtype)).astype(xp.uint8)
        if width < 8:
            fold = 8 // width
            gap = [(0, 0)] * len(lead) + [(0, -length % fold), (0, 0)]
            part = xp.pad(part & np.uint8(2**width - 1), gap)
            part = part.reshape((*lead, -(-length // fold), fold, outputs))
            byte = part[..., 0, :]
            for i in range(1, fold):
                byte = byte | (part[..., i, :] << np.uint8(i * width))
            part = byte
        rows.append(part)
        start += width
    return rows[0] if len(rows) == 1 else xp.concatenate(rows, axis=-2)


def unpack_fields(
    packed: Array, bits: int, length: int, *, axis: int = -2, dtype: DType = "uint8"
) -> jax.Array:
    """Return the codes in `packed`; shifts of unsigned bytes only."""
    xp: ModuleType = np if isinstance(packed, np.ndarray) else jnp
    if axis == -1:
        return unpack_fields(packed[..., None], bits, length, dtype=dtype)[..., 0]
    *lead, _, outputs = packed.shape
    wide = xp.uint32 if bits > 8 else xp.uint8
    codes, row, start = None, 0, 0
    for width in field_widths(bits):
        fold = 8 // width
        rows = -(-length // fold)
        part = packed[..., row : row + rows, :]
        if width < 8:
            shifts = (np.arange(fold, dtype=np.uint8) * np.uint8(width))[:, None]
            shifts = shifts.reshape((1,) * (len(lead) + 1) + shifts.shape)
            part = (part[..., None, :] >> shifts) & np.uint8(2**width - 1)
            part = part.reshape((*lead, rows * fold, outputs))[..., :length, :]
        part = part.astype(wide) << np.asarray(start, wide)
        codes = part if codes is None else codes | part
        row, start = row + rows, start + width
    return codes.astype(dtype)


def bits_needed(largest: int) -> int:
    """Return bits of the widest code in `[0, largest]`, at least one."""
    return max(1, int(largest).bit_length())


@jax.jit
def _unpacked(x: Packed) -> jax.Array:
    return unpack_fields(x.packed, x.bits, x.length, axis=x.axis, dtype=x.dtype)

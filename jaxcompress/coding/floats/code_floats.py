"""Floating-point arrays, bit for bit: coded where predictable, the rest as it is."""

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.coding.floats import chunks as float_chunks
from jaxcompress.coding.floats.leaf import code_words
from jaxcompress.coding.integers.leaf import ALLOWANCE, entropy_code, stored_bytes
from jaxcompress.coding.tables import entropy
from jaxcompress.tree.leaf import Leaf, dense, leaf, nbytes, static
from jaxcompress.tree.methods import method
from jaxcompress.types import Array

WHOLE = {"bfloat16": 8, "float16": 11, "float32": 24}  # bits of integers held exactly


@leaf
class CodedFloats(Leaf):
    """One array of floating-point numbers `[..., *trailing]`, kept by its bits.

    Infinities, NaN payloads, subnormals and negative zero are restored as they were:
    decoding moves bits and computes nothing, but for one product with a power of two.

    Invariant: `bits` represents an array of the shape of the whole: unsigned words, the
    numbers' bits; or, where `power` is not None, integers that are the numbers divided
    by two to that power, which the dtype holds exactly.

    Args:
      bits: leaf (`CodedWords`, or `Coded` for arrays of few values) or integer array.
      dtype: of the restored array.
      coded: dtype whose bits are held: "bfloat16" for a float32 array all of whose
        numbers are bfloat16, else as `dtype`.
      power: of two; or None.

    Example:
      >>> small = jc.code_floats(params["embed"]["embedding"].astype(jnp.bfloat16))
    """

    bits: Any
    dtype: np.dtype = static()
    coded: str = static()
    power: int | None = static(default=None)

    lossless: ClassVar[bool] = True
    integers: ClassVar[tuple[str, ...]] = ("bits",)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def materialize(self) -> jax.Array:
        return _numbers(dense(self.bits), self.dtype, self.coded, self.power)

    def take_rows(self, indices: jax.Array) -> jax.Array:
        rows = (
            self.bits.take_rows(indices)
            if isinstance(self.bits, Leaf)
            else jnp.take(self.bits, indices, axis=0)
        )
        return _numbers(rows, self.dtype, self.coded, self.power)


def _numbers(
    bits: jax.Array, kind: np.dtype, coded: str, power: int | None
) -> jax.Array:
    """Return the numbers that bits, or integers, represent."""
    if power is not None:
        if not -1075 < power < 1024:  # as a damaged file may say
            raise ValueError(f"a float has no power of two of {power}: damaged")
        return bits.astype(kind) * jnp.asarray(2.0**power, kind)
    if kind != coded:
        bits = bits.astype(jnp.uint32) << np.uint32(16)
    return lax.bitcast_convert_type(bits, jnp.dtype(kind))


@method(selects="floats", traceable=False)
def code_floats(
    x: Array,
    moments: Any = None,
    *,
    speed: Literal["size", "decode"] = "size",
    stack: int | None = None,
) -> Any:
    """Code an array of floating-point numbers without loss of a bit.

    Each number is split into an exponent with the top bits of its mantissa, which are
    Huffman-coded with tables for up to eight classes of blocks of 512, and the rest,
    which is kept: about 10.56 bits for a bfloat16 weight. Arrays of few values, whole
    multiples of a power of two, and float32 arrays that hold bfloat16 numbers are
    recognized. What would not get smaller, in a file and in memory, and types wider
    than float32 or narrower than a byte, are restored unchanged.

    Args:
      x: `[..., inputs, outputs]`, or any other rank.
      moments: not used.
      speed: "size" codes smallest; "decode" codes two exponents as one symbol and keeps
        mantissas whole: bfloat16 and float32 decode in half the time, for 0.05 to 0.1
        bits more.
      stack: number of leading stack axes; all but the last two if not given.

    Raises:
      ValueError: another speed.
      TypeError: `x` is not a floating-point array.

    Example:
      >>> half = x.astype(jnp.bfloat16)
      >>> bool((jc.code_floats(half).materialize() == half).all())
      True

    Source: ZipNN (arXiv:2411.05239) codes the exponent plane by itself; top bits of
    mantissas and classes of blocks are added here, see `chunks`.
    """
    del moments
    array = np.asarray(x)
    kind = jnp.dtype(array.dtype)
    if not jnp.issubdtype(kind, jnp.floating):
        raise TypeError(
            f"code_floats takes floating-point arrays, not {kind}; entropy_code takes "
            "integers"
        )
    if speed not in ("size", "decode"):
        raise ValueError(f"code_floats takes speed='size' or 'decode', not {speed!r}")
    split = float_chunks.split_for(kind.name, fast=speed == "decode")
    if split is None or array.size == 0 or array.ndim == 0:
        return x
    stack = max(0, array.ndim - 2) if stack is None else stack
    coded, bits = words_and_kind(array)
    candidates: list[tuple[int, Any]] = [(array.nbytes - ALLOWANCE, x)]

    def add(size: int, held: CodedFloats) -> None:
        if nbytes(held) < array.nbytes:  # tables of many slices may take more
            candidates.append((size, held))

    leaf, size = code_words(bits, split, stack)
    if leaf is not None:
        add(size, CodedFloats(leaf, kind, coded))
    if _repeats(bits):
        whole = entropy_code(bits, stack=stack)
        add(stored_bytes(whole), CodedFloats(whole, kind, coded))
    power = _common_power(array) if kind.name in WHOLE else None
    if power is not None:
        integers = np.ldexp(array.astype(np.float32), -power).astype(np.int32)
        whole = entropy_code(integers, stack=stack)
        add(stored_bytes(whole), CodedFloats(whole, kind, kind.name, power))
    return min(candidates, key=lambda one: one[0])[1]


def words_and_kind(array: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the dtype whose bits tell all, and these bits as unsigned words."""
    bits = np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))
    if array.dtype == np.float32 and not (bits.reshape(-1)[:4096] & 0xFFFF).any():
        halves = bits.view(np.uint16).reshape(*bits.shape, 2)
        if not halves[..., 0].any():
            return "bfloat16", np.ascontiguousarray(halves[..., 1])
    return jnp.dtype(array.dtype).name, bits


def _repeats(bits: np.ndarray) -> bool:
    """Return whether a sample has far fewer values than noise would have."""
    sample = bits.reshape(-1)[:: max(1, bits.size // 65536)]
    _, counts = np.unique(sample, return_counts=True)
    most = min(10, np.log2(sample.size)) if bits.itemsize > 1 else 4
    return entropy(counts) < 0.95 * sample.size * most


def _common_power(array: np.ndarray) -> int | None:
    """Return the power of two of which all numbers are multiples that the dtype holds
    exactly.

    None where there is none, or a sample shows as many values as noise has.
    """
    bits = WHOLE[jnp.dtype(array.dtype).name]
    for part in (array.reshape(-1)[:4096], array.reshape(-1)):
        numbers = part.astype(np.float32)
        if not np.isfinite(numbers).all() or np.signbit(numbers[numbers == 0]).any():
            return None
        largest = np.abs(numbers).max(initial=0)
        if largest == 0:
            return None
        mantissas, exponents = np.frexp(numbers[numbers != 0])
        whole = np.ldexp(mantissas, 24).astype(np.int64)
        trailing = np.log2((whole & -whole).astype(np.float64)).astype(np.int64)
        power = int((exponents - 24 + trailing).min())
        # One bit less than the type holds: noise fills them all.
        if largest >= 2.0 ** (power + bits - 1) or not -100 <= power <= 100:
            return None
    return power

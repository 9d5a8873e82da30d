"""Floating-point arrays, bit for bit: exponents at their entropy, the rest as it is."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.entropy.integers import ALLOWANCE, entropy_code, stored_bytes
from jaxcompress.entropy.packing import pack
from jaxcompress.entropy.tables import entropy
from jaxcompress.tree.leaves import Leaf, dense, leaf, static
from jaxcompress.tree.methods import method

MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23}  # bits


@leaf
class CodedFloats(Leaf):
    """One array of floating-point numbers `[..., *trailing]`, kept by its bits.

    Infinities, NaN payloads, subnormals and negative zero come back as they were:
    decoding moves bits and computes nothing.

    Invariant: `exponents` and `rest` stand for integer arrays of the shape of the
    whole; `rest` is the mantissa, with the sign above it, or all bits of the number.

    Args:
      exponents: leaf (`Coded`, mostly) or uint8 array; None in the scheme "whole".
      rest: leaf (`Packed`, mostly) or integer array.
      kind: dtype that comes back.
      coded: dtype whose bits are held: "bfloat16" for a float32 array all of whose
        numbers are bfloat16, else as `kind`.
      scheme: how bits are split: "exponent", or "whole" for arrays of few values.
    """

    exponents: Any
    rest: Any
    kind: str = static()
    coded: str = static()
    scheme: str = static(default="exponent")

    lossless: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rest.shape

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.kind)

    def materialize(self) -> jax.Array:
        parts = dense(self.exponents), dense(self.rest)
        return _joined(dataclasses.replace(self, exponents=parts[0], rest=parts[1]))


@jax.jit
def _joined(floats: CodedFloats) -> jax.Array:
    mantissa = MANTISSA[floats.coded]
    word = jnp.uint32 if floats.coded == "float32" else jnp.uint16
    bits = floats.rest.astype(word)
    if floats.scheme == "exponent":
        sign = (bits >> word(mantissa)) << word(jnp.iinfo(word).bits - 1)
        bits = sign | (bits & word((1 << mantissa) - 1))
        bits |= floats.exponents.astype(word) << word(mantissa)
    if floats.kind != floats.coded:
        bits = bits.astype(jnp.uint32) << jnp.uint32(16)
    return lax.bitcast_convert_type(bits, floats.dtype)


@method(selects="floats", traceable=False)
def code_floats(x: jax.Array, moments: Any = None, *, stack: int | None = None) -> Any:
    """Codes an array of bfloat16, float16 or float32 without loss of a bit.

    Exponents are entropy-coded, each slice with its own table; signs and mantissas are
    packed. Where a sample shows few values, all bits are coded as one integer instead
    if that is smaller. Arrays that would not get smaller, stacked
    vectors wider than bfloat16, and other floating-point types come back unchanged.

    Args:
      x: `[..., inputs, outputs]`, or any other rank.
      moments: not used.
      stack: number of leading stack axes; all but the last two if not given.

    Raises:
      TypeError: `x` is not a floating-point array.

    Source: ZipNN (arXiv:2411.05239) codes the exponent plane by itself; the coder is
    rANS here, see `rans`.
    """
    del moments
    array = np.asarray(x)
    kind = jnp.dtype(array.dtype)
    if not jnp.issubdtype(kind, jnp.floating):
        raise TypeError(
            f"code_floats takes floating-point arrays, not {kind}; entropy_code takes "
            "integers"
        )
    if kind.name not in MANTISSA or array.size == 0 or array.ndim == 0:
        return x
    coded = kind.name
    bits = np.ascontiguousarray(array).view(np.dtype(f"u{kind.itemsize}"))
    if coded == "float32" and not (bits & np.uint32(0xFFFF)).any():
        coded = "bfloat16"
        bits = (bits >> 16).astype(np.uint16)
    mantissa = MANTISSA[coded]
    size = 8 * bits.itemsize
    signs = bits >> (size - 1)
    vectors = 0 < (stack or 0) == array.ndim - 1
    if vectors and mantissa != 7:
        return x  # the rest would be packed along inputs, which vectors lack
    rest = (signs << mantissa) | (bits & ((1 << mantissa) - 1))
    exponents = ((bits << 1) >> (mantissa + 1)).astype(np.uint8)
    if mantissa < 8:
        rest = rest.astype(np.uint8)
    small = CodedFloats(
        entropy_code(exponents, stack=stack),
        jnp.asarray(rest) if vectors else pack(rest, mantissa + 1),
        kind.name,
        coded,
    )
    if _repeats(bits):
        whole = entropy_code(bits, stack=stack)
        if stored_bytes(whole) < stored_bytes(small):
            small = CodedFloats(None, whole, kind.name, coded, "whole")
    smaller = stored_bytes(small) + ALLOWANCE < array.nbytes
    return small if smaller else x


def _repeats(bits: np.ndarray) -> bool:
    """Whether a sample has far fewer values than noise would have."""
    sample = bits.reshape(-1)[:: max(1, bits.size // 65536)]
    _, counts = np.unique(sample, return_counts=True)
    return entropy(counts) < 0.95 * sample.size * min(10, np.log2(sample.size))

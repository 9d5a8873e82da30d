"""Grids: the values that codes represent, and the leaf that holds codes and steps.

A grid is two elementwise functions. They broadcast, so they serve a kernel
`[..., inputs, outputs]` with its steps spread over the inputs, or one row `[outputs]`
of it with that row's steps.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.coding.packing import Packed, pack_bits
from jaxcompress.quantization.codebooks import LEVELS
from jaxcompress.quantization.integer_matmul import (
    has_integers,
    integer_product,
    integers_pay,
)
from jaxcompress.tree.leaf import (
    Arithmetic,
    Leaf,
    before_use,
    dense,
    leaf,
    static,
    take_columns,
)
from jaxcompress.tree.products import cut_columns
from jaxcompress.types import Array, DType

Block = int | str | None  # inputs per step; None: all of one output; "tensor": all
Bits = int | tuple[int, int]  # per code; of the positive and the negative side


class Steps(NamedTuple):
    """Steps that stretch a grid, float32 but for the integer zero point.

    `scale` is the distance of neighbouring values, on the positive side only where
    there is a `negative_scale`, or what the levels of a format are multiplied by;
    `zero_point` is the code of zero, a real number on the affine grid, and
    the value of code zero on the offset grid.
    """

    scale: Array
    zero_point: Array | None = None
    negative_scale: Array | None = None


class Scheme(NamedTuple):
    """Scheme of quantized weights: what `Quantized` keeps besides arrays; hashable.

    `grid`, `bits` and `block` as there; `scale_dtype` is that of the stored scales.
    """

    grid: str
    bits: Bits
    block: Block
    scale_dtype: DType = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """What `encode` and `decode` take."""
        return {"grid": self.grid, "bits": self.bits}


class Grid(NamedTuple):
    """`encode(x, steps, bits)` gives unsigned codes, `decode` float32 values.

    `width(bits)` is the number of bits a code is stored in.
    """

    encode: Callable[[jax.Array, Steps, Any], jax.Array]
    decode: Callable[[jax.Array, Steps, Any], jax.Array]
    width: Callable[[Any], int]


def _encode_symmetric(x: jax.Array, steps: Steps, bits: int) -> jax.Array:
    if bits == 1:
        return x >= 0
    half = 2 ** (bits - 1)
    return jnp.clip(jnp.round(x / steps.scale), -half, half - 1) + half


def _decode_symmetric(codes: jax.Array, steps: Steps, bits: int) -> jax.Array:
    codes = codes.astype(jnp.int32)
    codes = 2 * codes - 1 if bits == 1 else codes - 2 ** (bits - 1)
    return codes.astype(jnp.float32) * steps.scale


def _encode_asymmetric(x: jax.Array, steps: Steps, bits: int) -> jax.Array:
    zero = steps.zero_point.astype(jnp.float32)
    return jnp.clip(jnp.round(x / steps.scale) + zero, 0, 2**bits - 1)


def _decode_asymmetric(codes: jax.Array, steps: Steps, bits: int) -> jax.Array:
    del bits
    offset = codes.astype(jnp.int32) - steps.zero_point.astype(jnp.int32)
    return offset.astype(jnp.float32) * steps.scale


def _encode_sign_split(x: jax.Array, steps: Steps, bits: tuple[int, int]) -> jax.Array:
    lowest, highest = 1 - 2 ** bits[1], 2 ** bits[0] - 1
    scale = jnp.where(x > 0, steps.scale, steps.negative_scale)
    return jnp.clip(jnp.round(x / scale), lowest, highest) - lowest


def _decode_sign_split(
    codes: jax.Array, steps: Steps, bits: tuple[int, int]
) -> jax.Array:
    codes = codes.astype(jnp.int32) - (2 ** bits[1] - 1)
    scale = jnp.where(codes > 0, steps.scale, steps.negative_scale)
    return codes.astype(jnp.float32) * scale


def _encode_affine(x: jax.Array, steps: Steps, bits: int) -> jax.Array:
    return jnp.clip(jnp.round(x / steps.scale + steps.zero_point), 0, 2**bits - 1)


def _decode_affine(codes: jax.Array, steps: Steps, bits: int) -> jax.Array:
    del bits
    return (codes.astype(jnp.float32) - steps.zero_point) * steps.scale


def _encode_offset(x: jax.Array, steps: Steps, bits: int) -> jax.Array:
    ratio = (x - steps.zero_point) / jnp.where(steps.scale == 0, 1, steps.scale)
    return jnp.clip(jnp.round(ratio), 0, 2**bits - 1)


def _decode_offset(codes: jax.Array, steps: Steps, bits: int) -> jax.Array:
    # The product is exact for scales of 16 bits, so that a fused sum rounds alike.
    del bits
    return codes.astype(jnp.float32) * steps.scale + steps.zero_point


def _level_grid(name: str) -> Grid:
    """Return the grid of a format's levels; its `bits` are those of the format."""
    levels = LEVELS[name]
    return Grid(
        lambda x, steps, bits: levels.encode(x / steps.scale),
        lambda codes, steps, bits: levels.decode(codes) * steps.scale,
        lambda bits: levels.bits,
    )


def _sign_split_width(bits: tuple[int, int]) -> int:
    return (2 ** bits[0] + 2 ** bits[1] - 2).bit_length()


GRIDS: dict[str, Grid] = {
    "symmetric": Grid(_encode_symmetric, _decode_symmetric, int),
    "asymmetric": Grid(_encode_asymmetric, _decode_asymmetric, int),
    "sign_split": Grid(_encode_sign_split, _decode_sign_split, _sign_split_width),
    "affine": Grid(_encode_affine, _decode_affine, int),
    "offset": Grid(_encode_offset, _decode_offset, int),
    **{name: _level_grid(name) for name in LEVELS},
}


REAL_ZEROS = ("affine", "offset")  # grids whose zero point is a real number


def encode(x: jax.Array, steps: Steps, *, grid: str, bits: Bits) -> jax.Array:
    """Return the unsigned codes, uint8, of the grid values nearest to `x`; traceable.

    `steps` must broadcast against `x` (`spread`), and be what will be stored: codes of
    a step that is rounded afterwards are not the nearest any more.
    """
    codes = _grid(grid).encode(x.astype(jnp.float32), steps, bits)
    return codes.astype(jnp.uint8)


def _grid(name: str) -> Grid:
    """Look a grid up; a leaf of a forged file may name one that is none."""
    if name not in GRIDS:
        raise ValueError(f"grid {name!r} is unknown; choose among {', '.join(GRIDS)}")
    return GRIDS[name]


def decode(codes: jax.Array, steps: Steps, *, grid: str, bits: Bits) -> jax.Array:
    """Decode codes to values, float32; traceable.

    One product per value, so that `jit` cannot round differently.
    """
    return _grid(grid).decode(codes, steps, bits)


def spread(steps: Steps, block: Block, inputs: int) -> Steps:
    """Return steps `[..., blocks, outputs]` repeated to broadcast against all `inputs`.

    Raises:
      ValueError: the steps are not those of so many inputs in such blocks.
    """

    def repeat(step: jax.Array | None) -> jax.Array | None:
        if step is None or step.shape[-2] == 1:
            return step
        *lead, blocks, outputs = step.shape
        if type(block) is not int or blocks != -(-inputs // block):
            raise ValueError(
                f"{blocks} rows of steps for {inputs} inputs in blocks of {block}; the "
                "leaf is damaged, or was put together from parts of others"
            )
        wide = jnp.broadcast_to(step[..., None, :], (*lead, blocks, block, outputs))
        return wide.reshape((*lead, blocks * block, outputs))[..., :inputs, :]

    return Steps(*map(repeat, steps))


@leaf
class Quantized(Leaf):
    """A weight `[..., inputs, outputs]` as codes on a grid and the grid's steps.

    Invariant: codes are unsigned, below `2^width` of the grid; the steps are
    `[..., blocks, outputs]`, one block per `block` consecutive inputs, the last one
    possibly shorter (`block=None`: one block; `"tensor"`: steps are `[..., 1, 1]`).
    No step is zero, except that of an all-zero block at one bit, which is all it needs.

    Args:
      codes: `Packed`, or another leaf or array of integers, `[..., inputs, outputs]`.
      scale: floating point, or a leaf in place of such an array; its sign may be
        negative. Read as float32.
      zero_point: integers of the same shape (affine: floating point), or None.
      negative_scale: scale of the negative side, or None.
      grid: a name in `GRIDS`.
      bits: per code; for `sign_split` those of the two sides.
      block: inputs that share a step, None, or "tensor".
      dtype: of the weight.

    Example:
      >>> small = jc.symmetric(x, bits=4, block=32)
      >>> small.codes.shape, small.scale.shape
      ((64, 64), (2, 64))
    """

    codes: Any
    scale: Any
    zero_point: Any
    negative_scale: Any
    grid: str = static()
    bits: Bits = static()
    block: Block = static()
    dtype: np.dtype = static()

    has_tiles: ClassVar[bool] = True
    integers: ClassVar[tuple[str, ...]] = ("codes",)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def description(self) -> str:
        width = (
            "+".join(map(str, self.bits)) if isinstance(self.bits, tuple) else self.bits
        )
        steps = "one scale" if self.block == "tensor" else f"blocks of {self.block}"
        steps = "a scale per output" if self.block is None else steps
        return f"{self.grid} {width} bits, {steps}"

    @property
    def steps(self) -> Steps:
        """The steps as `decode` takes them: dense, scales in float32."""
        scale, zero, negative = map(
            dense, (self.scale, self.zero_point, self.negative_scale)
        )
        if negative is not None:
            negative = negative.astype(jnp.float32)
        if zero is not None and self.grid in REAL_ZEROS:
            zero = zero.astype(jnp.float32)
        return Steps(scale.astype(jnp.float32), zero, negative)

    def materialize(self) -> jax.Array:
        steps = spread(self.steps, self.block, self.shape[-2])
        values = decode(dense(self.codes), steps, grid=self.grid, bits=self.bits)
        return round_to(values, self.dtype).astype(self.dtype)

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Return dequantized next to the product, or in integers where `how` allows
        it.
        """
        rows = math.prod(x.shape[:-1])
        wanted = how.activations == "int8" or (
            how.activations == "auto" and integers_pay(rows)
        )
        if not (wanted and has_integers(self)):
            return super().contract(x, how)
        prepare = before_use.get()
        return integer_product(x, self if prepare is None else prepare(self))

    def tiles(self) -> Callable[[jax.Array, int], jax.Array]:
        whole_bytes = isinstance(self.codes, Packed) and self.codes.axis == -2
        codes = self.codes if whole_bytes else dense(self.codes)
        steps = self.steps

        def make(start: jax.Array, size: int) -> jax.Array:
            if whole_bytes:
                packed = cut_columns(codes.packed, start, size)
                part = dataclasses.replace(codes, packed=packed)
            else:
                part = cut_columns(codes, start, size)
            scale, zero, negative = (cut_columns(x, start, size) for x in steps)
            return dataclasses.replace(
                self, codes=part, scale=scale, zero_point=zero, negative_scale=negative
            ).materialize()

        return make

    def take_columns(self, indices: jax.Array) -> jax.Array:
        """Compute `materialize()[:, indices]` of a 2-D leaf, reading only those
        columns.
        """
        flat = jnp.ravel(indices)
        columns = dataclasses.replace(
            self,
            codes=_columns(self.codes, flat),
            scale=_columns(self.scale, flat),
            zero_point=_columns(self.zero_point, flat),
            negative_scale=_columns(self.negative_scale, flat),
        )
        values = columns.materialize()
        return values.reshape(values.shape[:1] + jnp.shape(indices))


def _columns(x: Any, indices: jax.Array) -> Any:
    if x is None or x.shape[-1] == 1:
        return x
    if isinstance(x, Packed) and x.axis == -2:
        packed = jnp.take(x.packed, indices, axis=-1)
        return dataclasses.replace(x, packed=packed)
    return take_columns(x, indices)


def quantized(
    codes: Array,
    steps: Steps,
    scheme: Scheme,
    *,
    dtype: DType,
) -> Quantized:
    """Return leaf of codes `[..., inputs, outputs]` and steps `[..., blocks, outputs]`.

    Codes are packed; so are zero points where that saves bytes. The scales must be
    exact in their dtype (`round_to`), for the codes were chosen for them. Traceable.

    Raises:
      ValueError: steps whose shape does not fit the codes and the block.
    """
    grid, bits, block, scale_dtype = scheme
    width = _grid(grid).width(bits)
    *lead, inputs, outputs = codes.shape
    blocks = -(-inputs // block) if isinstance(block, int) else 1
    shape = (*lead, blocks, 1 if block == "tensor" else outputs)
    for name, step in zip(Steps._fields, steps, strict=True):
        if step is not None and step.shape != shape:
            raise ValueError(
                f"{name} has shape {step.shape}; codes {codes.shape} in blocks of "
                f"{block!r} need {shape}"
            )
    zero, negative = steps.zero_point, steps.negative_scale
    if zero is not None and grid in REAL_ZEROS:
        zero = zero.astype(scale_dtype)
    elif zero is not None:
        zero = zero.astype(jnp.uint8)
        smaller = pack_bits(zero, width)
        zero = smaller if smaller.packed.size < zero.size else zero
    return Quantized(
        codes=pack_bits(codes, width),
        scale=steps.scale.astype(scale_dtype),
        zero_point=zero,
        negative_scale=None if negative is None else negative.astype(scale_dtype),
        grid=grid,
        bits=bits,
        block=block,
        dtype=jnp.dtype(dtype),
    )


def round_to(x: jax.Array, dtype: DType) -> jax.Array:
    """Round float32 values to those of bfloat16 or float16; the result is float32.

    A cast there and back need not do it under `jit`: XLA may drop the pair where excess
    precision is allowed. float16 is left to the cast, for rounding by
    `reduce_precision` would flush its subnormals.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return x
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

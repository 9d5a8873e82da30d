"""Levels as packed narrow integers, inputs in groups by the width that they need."""

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.coding.packing import field_widths
from jaxcompress.tree.leaf import Arithmetic, Leaf, before_use, leaf, static
from jaxcompress.tree.products import (
    cut_columns,
    product_in_tiles,
    tiles_pay,
    wide_product,
)

GROUPS = 3  # widths in one weight, at most
TOGETHER = 8  # inputs: sizes of groups are multiples of it, but for the narrowest


@leaf
class NarrowLevels(Leaf):
    """Integers `[..., inputs, outputs]`, each input in about as few bits as it needs.

    Steps of `rate_distortion` differ by input, and so do the levels' ranges. Invariant:
    `parts` hold inputs in the order of falling width; place `p` of them is input
    `order[..., p]`, and its integers are codes less half of their range, plus `shift`.

    Args:
      parts: uint32 words `[..., *, outputs]` of the unsigned codes of each group: for
        each of `field_widths` of its width a plane, whose words hold neighbouring
        places.
      order: integers `[..., inputs]`.
      shift: integers `[..., inputs, 1]`, by input.
      widths: bits of a code, for each part.
      sizes: inputs of each part.
      dtype: of the integers.

    Example:
      >>> levels = jc.rate_distortion(x, rate=3.0).levels.materialize()
      >>> narrow = narrow_levels(levels)
      >>> bool((narrow.materialize() == levels).all())
      True
    """

    parts: tuple[Any, ...]
    order: jax.Array
    shift: jax.Array
    widths: tuple[int, ...] = static()
    sizes: tuple[int, ...] = static()
    dtype: np.dtype = static()

    lossless: ClassVar[bool] = True
    for_files: ClassVar[bool] = False
    integers: ClassVar[tuple[str, ...]] = ("parts", "order", "shift")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.order.shape, self.parts[0].shape[-1])

    def materialize(self) -> jax.Array:
        codes = [
            _unpacked(*part)
            for part in zip(self.parts, self.widths, self.sizes, strict=True)
        ]
        where = jnp.argsort(self.order.astype(jnp.int32), axis=-1)[..., None]
        levels = jnp.take_along_axis(jnp.concatenate(codes, axis=-2), where, axis=-2)
        return (levels + self.shift.astype(jnp.int32)).astype(self.dtype)

    def take_columns(self, indices: jax.Array) -> jax.Array:
        """Return levels `[inputs, *indices.shape]` of these outputs."""
        parts = tuple(jnp.take(x, indices.reshape(-1), axis=1) for x in self.parts)
        levels = dataclasses.replace(self, parts=parts).materialize()
        return levels.reshape(-1, *indices.shape)

    def cut_columns(self, start: jax.Array, size: int) -> Leaf:
        """Return so many outputs from a traced start."""
        parts = tuple(cut_columns(x, start, size) for x in self.parts)
        return dataclasses.replace(self, parts=parts)

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Multiply the inputs of each part by it, in floating point, and add up."""
        prepare = before_use.get()
        held = self if prepare is None else prepare(self)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = wide_product(wide, held.shift, how)  # one column
        order = held.order.astype(jnp.int32)
        wide = wide.at[..., order].get(mode="promise_in_bounds")
        start = 0
        for words, width, size in zip(held.parts, self.widths, self.sizes, strict=True):
            own = wide[..., start : start + size]
            y = y + _product(own, words, width, how)
            start += size
        return y


def _product(x: jax.Array, words: jax.Array, width: int, how: Arithmetic) -> jax.Array:
    """Multiply by the codes of one part, large ones tile by tile."""
    size, outputs = x.shape[-1], words.shape[-1]
    if not tiles_pay((size, outputs)):
        return wide_product(x, _unpacked(words, width, size), how)

    def columns(start: jax.Array, count: int) -> jax.Array:
        return _unpacked(cut_columns(words, start, count), width, size)

    return product_in_tiles(x, columns, (size, outputs), how)


def narrow_levels(levels: Any) -> NarrowLevels:
    """Pack levels `[..., inputs, outputs]` in groups of inputs; on the host.

    Args:
      levels: integers of at most 16 bits.

    Raises:
      ValueError: levels that differ by more than 16 bits within one input.

    Example:
      >>> levels = jc.rate_distortion(x, rate=3.0).levels.materialize()
      >>> narrow_levels(levels).shape
      (64, 64)
    """
    levels = np.asarray(levels)
    wide = levels.astype(np.int32)
    inputs = wide.shape[-2]
    low, high = wide.min(axis=-1), wide.max(axis=-1)
    need = np.ceil(np.log2(high - low + 1)).astype(np.int64).clip(1)
    if need.max(initial=1) > 16:
        raise ValueError(
            f"levels of one input span {int((high - low).max())}; 16 bits hold them "
            "only up to 65535: keep them as they are"
        )
    order = np.argsort(-need, axis=-1, kind="stable")
    need = np.take_along_axis(need, order, axis=-1).reshape(-1, inputs).max(axis=0)
    widths, sizes = _groups(need)
    halves = (1 << np.repeat(widths, sizes)) >> 1
    sorted_low = np.take_along_axis(low, order, axis=-1)
    codes = np.take_along_axis(wide, order[..., None], axis=-2)
    codes = (codes - sorted_low[..., None]).astype(np.uint32)
    ends = np.cumsum(sizes)
    parts = tuple(
        jnp.asarray(_words(codes[..., end - size : end, :], width))
        for width, size, end in zip(widths, sizes, ends, strict=True)
    )
    # Of sorted inputs: code = level - shift + half.
    where = np.argsort(order, axis=-1)
    shift = np.take_along_axis(sorted_low + halves, where, axis=-1)
    most = int(np.abs(shift).max(initial=0))
    dtype = np.int8 if most < 1 << 7 else np.int16 if most < 1 << 15 else np.int32
    return NarrowLevels(
        parts,
        jnp.asarray(order.astype(np.uint16 if inputs < 1 << 16 else np.int32)),
        jnp.asarray(shift[..., None].astype(dtype)),
        widths=tuple(map(int, widths)),
        sizes=tuple(map(int, sizes)),
        dtype=levels.dtype,
    )


def _groups(need: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return falling widths, and inputs of each, of fewest bits in all.

    `need` `[inputs]` falls.
    """
    different = sorted(set(need.tolist()), reverse=True)
    best: tuple[float, Any, Any] = (math.inf, (), ())
    for count in range(min(GROUPS, len(different))):
        for narrower in itertools.combinations(different[1:], count):
            widths = (different[0], *narrower)
            # A group takes all inputs that need more than the next width.
            ends = [int((need > width).sum()) for width in narrower]
            ends = [min(len(need), -(-end // TOGETHER) * TOGETHER) for end in ends]
            sizes = np.diff([0, *ends, len(need)])
            if (sizes <= 0).any():
                continue
            bits = float(np.dot(widths, sizes))
            if bits < best[0]:
                best = bits, widths, tuple(sizes.tolist())
    return best[1], best[2]


def _words(codes: np.ndarray, width: int) -> np.ndarray:
    """Pack codes `[..., inputs, outputs]` into planes of words along inputs."""
    *lead, inputs, outputs = codes.shape
    planes, start = [], 0
    for bits in field_widths(width):
        each = 32 // bits
        field = (codes >> start) & ((1 << bits) - 1)
        field = np.pad(field, [(0, 0)] * len(lead) + [(0, -inputs % each), (0, 0)])
        field = field.reshape(*lead, -1, each, outputs)
        shifts = (np.arange(each, dtype=np.uint32) * np.uint32(bits))[:, None]
        planes.append(np.bitwise_or.reduce(field << shifts, axis=-2))
        start += bits
    return np.concatenate(planes, axis=-2)


def _unpacked(words: jax.Array, width: int, inputs: int) -> jax.Array:
    """Return the codes of `_words` less half of their range, int32.

    CPUs shift numbers of 32 bits, not bytes; the highest bit alone is compared, which
    takes fewer operations than shifting it there and back.
    """
    *lead, _, outputs = words.shape
    total, row, start = None, 0, 0
    for bits in field_widths(width):
        each = 32 // bits
        rows = -(-inputs // each)
        plane = words[..., row : row + rows, :][..., :, None, :]
        shifts = (np.arange(each, dtype=np.uint32) * np.uint32(bits))[:, None]
        shifts = shifts.reshape((1,) * (len(lead) + 1) + shifts.shape)
        if bits == 1 and total is not None:
            field = (plane & (np.uint32(1) << shifts)) != 0
        else:
            field = (plane >> shifts) & np.uint32((1 << bits) - 1)
        field = field.reshape(*lead, rows * each, outputs)[..., :inputs, :]
        if field.dtype == bool:
            return jnp.where(field, total, total - (1 << start))
        field = field.astype(jnp.int32) << start
        total = field if total is None else total | field
        row, start = row + rows, start + bits
    return total - (1 << (width - 1))

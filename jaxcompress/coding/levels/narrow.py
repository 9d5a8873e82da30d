"""Levels as packed narrow integers, outputs in groups by the width that they need."""

import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.coding.packing import field_widths
from jaxcompress.tree.leaf import Arithmetic, Leaf, before_use, leaf, static
from jaxcompress.tree.products import wide_product

GROUPS = 2  # widths in one weight, at most
TOGETHER = 8  # outputs: sizes of groups are multiples of it, but for the narrowest


@leaf
class NarrowLevels(Leaf):
    """Integers `[..., inputs, outputs]`, each output in about as few bits as it needs.

    Invariant: `parts` hold outputs in the order of falling width; output `o` is at
    `where[..., o]` of them, and its integers are codes less half of their range, plus
    `shift[..., 0, o]`.

    Args:
      parts: uint32 words `[..., rows, *]` of the unsigned codes of each group: for each
        of `field_widths` of its width a plane, whose words hold neighbouring inputs.
      where: integers `[..., outputs]`.
      shift: integers `[..., 1, outputs]`.
      widths: bits of a code, for each part.
      rows: inputs of the weight.
      dtype: of the integers.

    Example:
      >>> levels = jc.rate_distortion(x, rate=3.0).levels.materialize()
      >>> narrow = narrow_levels(levels)
      >>> bool((narrow.materialize() == levels).all())
      True
    """

    parts: tuple[Any, ...]
    where: jax.Array
    shift: jax.Array
    widths: tuple[int, ...] = static()
    rows: int = static()
    dtype: np.dtype = static()

    lossless: ClassVar[bool] = True
    for_files: ClassVar[bool] = False
    integers: ClassVar[tuple[str, ...]] = ("parts", "where", "shift")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.where.shape[:-1], self.rows, self.where.shape[-1])

    def materialize(self) -> jax.Array:
        codes = [x.astype(jnp.int32) for x in self._centred()]
        where = self.where.astype(jnp.int32)[..., None, :]
        levels = jnp.take_along_axis(jnp.concatenate(codes, axis=-1), where, axis=-1)
        return (levels + self.shift.astype(jnp.int32)).astype(self.dtype)

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Multiply by each part, in floating point, and put the outputs in order."""
        prepare = before_use.get()
        held = self if prepare is None else prepare(self)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        products = [wide_product(wide, codes, how) for codes in held._centred()]
        y = jnp.concatenate(products, axis=-1)
        where = held.where.astype(jnp.int32)
        y = y.at[..., where].get(mode="promise_in_bounds")
        shift = held.shift[0].astype(wide.dtype)
        lead = (1,) * (wide.ndim - 1)
        return y + wide.sum(axis=-1, keepdims=True) * shift.reshape(*lead, -1)

    def _centred(self) -> list[jax.Array]:
        """Return codes less half of their range, int32."""
        parts = zip(self.parts, self.widths, strict=True)
        return [_unpacked(words, width, self.rows) for words, width in parts]


def narrow_levels(levels: Any) -> NarrowLevels:
    """Pack levels `[..., inputs, outputs]` in groups of outputs; on the host.

    Args:
      levels: integers of at most 16 bits.

    Raises:
      ValueError: levels that differ by more than 16 bits within one output.

    Example:
      >>> levels = jc.rate_distortion(x, rate=3.0).levels.materialize()
      >>> narrow_levels(levels).shape
      (64, 64)
    """
    levels = np.asarray(levels)
    wide = levels.astype(np.int32)
    inputs, outputs = wide.shape[-2:]
    low, high = wide.min(axis=-2), wide.max(axis=-2)
    need = np.ceil(np.log2(high - low + 1)).astype(np.int64).clip(1)
    if need.max(initial=1) > 16:
        raise ValueError(
            f"levels of one output span {int((high - low).max())}; 16 bits hold them "
            "only up to 65535: keep them as they are"
        )
    order = np.argsort(-need, axis=-1, kind="stable")
    need = np.take_along_axis(need, order, axis=-1).reshape(-1, outputs).max(axis=0)
    widths, sizes = _groups(need)
    per_output = np.concatenate(
        [np.full(size, width) for width, size in zip(widths, sizes, strict=True)]
    )
    halves = (1 << per_output) >> 1
    sorted_low = np.take_along_axis(low, order, axis=-1)
    shift = sorted_low + halves  # of sorted outputs: code = level - shift + half
    codes = np.take_along_axis(wide, order[..., None, :], axis=-1)
    codes = codes - sorted_low[..., None, :]
    where = np.argsort(order, axis=-1)
    ends = np.cumsum(sizes)
    parts = []
    for width, size, end in zip(widths, sizes, ends, strict=True):
        part = codes[..., end - size : end].astype(np.uint32)
        parts.append(jnp.asarray(_words(part, width)))
    shift = np.take_along_axis(shift, where, axis=-1)
    most = int(np.abs(shift).max(initial=0))
    dtype = np.int8 if most < 1 << 7 else np.int16 if most < 1 << 15 else np.int32
    return NarrowLevels(
        tuple(parts),
        jnp.asarray(where.astype(np.uint16 if outputs < 1 << 16 else np.int32)),
        jnp.asarray(shift[..., None, :].astype(dtype)),
        widths=tuple(map(int, widths)),
        rows=inputs,
        dtype=levels.dtype,
    )


def _groups(need: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return falling widths, and outputs of each, of fewest bits in all.

    `need` `[outputs]` falls.
    """
    different = sorted(set(need.tolist()), reverse=True)
    best: tuple[float, Any, Any] = (math.inf, (), ())
    for count in range(min(GROUPS, len(different))):
        for narrower in itertools.combinations(different[1:], count):
            widths = (different[0], *narrower)
            # A group takes all outputs that need more than the next width.
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

"""Levels as packed narrow integers, the few that need more bits apart."""

import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.tree import products
from jaxcompress.tree.leaf import Arithmetic, Leaf, before_use, leaf, static
from jaxcompress.tree.products import (
    cut_columns,
    product_in_tiles,
    tiles_pay,
    wide_product,
)

WIDTHS = (16, 10, 8, 6, 5, 4, 3, 2, 1, 0)  # bits of a code; a word holds 32 // bits
GROUPS = 3  # widths in one weight, at most
TOGETHER = 8  # inputs: sizes of groups are multiples of it, but for the narrowest
RARE = 192  # bits that a level outside of its range counts as: it takes 48, and time
SAMPLE = 512  # outputs that widths are chosen by


@leaf
class NarrowLevels(Leaf):
    """Integers `[..., inputs, outputs]`, each input in about as few bits as it needs.

    Levels of `rate_distortion` have long tails: where 4 bits hold all but one in a
    thousand, the rest are kept apart. Steps differ by input, and so do ranges.
    Invariant: `parts` hold inputs in the order of falling width; place `p` of them is
    input `order[..., p]`. A level is its code, plus `shift` of its input, plus an
    excess if it is among the `rare` ones.

    Args:
      parts: uint32 words `[..., *, outputs]` of each group: signed codes, neighbouring
        places in one word, the first in the lowest bits.
      order: integers `[..., inputs]`.
      shift: integers `[..., inputs, 1]`, by input.
      rare: inputs, outputs and excesses `[..., count]`, by rising output; an output
        that does not exist fills up.
      widths: bits of a code, for each part.
      sizes: inputs of each part.
      most: rare levels in one output, at most.
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
    rare: tuple[Any, Any, Any]
    widths: tuple[int, ...] = static()
    sizes: tuple[int, ...] = static()
    most: int = static()
    dtype: np.dtype = static()

    lossless: ClassVar[bool] = True
    for_files: ClassVar[bool] = False
    integers: ClassVar[tuple[str, ...]] = ("parts", "order", "shift", "rare")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.order.shape, self.parts[0].shape[-1])

    def materialize(self) -> jax.Array:
        if self.order.ndim > 1:
            return jax.vmap(NarrowLevels.materialize)(self)
        inputs, outputs, excess = (x.astype(jnp.int32) for x in self.rare)
        levels = self._in_range(self.parts)
        levels = levels.at[inputs, outputs].add(excess, mode="drop")
        return levels.astype(self.dtype)

    def take_columns(self, indices: jax.Array) -> jax.Array:
        """Return levels `[inputs, *indices.shape]` of these outputs."""
        flat = indices.reshape(-1)
        levels = self._in_range([jnp.take(x, flat, axis=1) for x in self.parts])
        if self.most:
            inputs, outputs, excess = (x.astype(jnp.int32) for x in self.rare)
            first = jnp.searchsorted(outputs, flat.astype(jnp.int32))
            at = first[:, None] + jnp.arange(self.most)[None, :]
            mine = jnp.take(outputs, at, mode="clip") == flat[:, None]
            mine &= at < outputs.size
            more = jnp.where(mine, jnp.take(excess, at, mode="clip"), 0)
            column = jnp.arange(flat.size)[:, None]
            rows = jnp.take(inputs, at, mode="clip")
            levels = levels.at[rows, column].add(more)
        return levels.astype(self.dtype).reshape(-1, *indices.shape)

    def _in_range(self, parts: Any) -> jax.Array:
        """Return levels without the excesses of rare ones, int32 `[inputs, *]`."""
        codes = [
            _unpacked(*part)
            for part in zip(parts, self.widths, self.sizes, strict=True)
        ]
        where = jnp.argsort(self.order.astype(jnp.int32))
        levels = jnp.take(jnp.concatenate(codes, axis=0), where, axis=0)
        return levels + self.shift.astype(jnp.int32)

    def contract(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Multiply the inputs of each part by it, in floating point, and add up."""
        prepare = before_use.get()
        held = self if prepare is None else prepare(self)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = wide_product(wide, held.shift, how)  # one column
        y = jnp.broadcast_to(y, (*y.shape[:-1], self.shape[-1]))
        order = held.order.astype(jnp.int32)
        sorted_x = wide.at[..., order].get(mode="promise_in_bounds")
        start = 0
        for words, width, size in zip(held.parts, self.widths, self.sizes, strict=True):
            own = sorted_x[..., start : start + size]
            start += size
            if width:
                y = y + _product(own, words, width, how)
        return y + _rare_product(wide, held.rare, y.shape[-1])


def _product(x: jax.Array, words: jax.Array, width: int, how: Arithmetic) -> jax.Array:
    """Multiply by the codes of one part, large ones tile by tile."""
    size, outputs = x.shape[-1], words.shape[-1]
    if not tiles_pay((size, outputs)):
        return wide_product(x, _unpacked(words, width, size), how)

    def columns(start: jax.Array, count: int) -> jax.Array:
        return _unpacked(cut_columns(words, start, count), width, size)

    return product_in_tiles(x, columns, (size, outputs), how)


def _rare_product(x: jax.Array, rare: Any, outputs: int) -> jax.Array:
    """Multiply `[..., inputs]` by excesses, `[..., outputs]`; some of them at a time.

    Temporary memory is about that of a tile.
    """
    *lead, inputs = x.shape
    rows, count = math.prod(lead), rare[0].size
    if not count:
        return jnp.zeros((), x.dtype)
    step = max(1, min(count, products.TILE // max(rows, 1)))
    fill = [(0, -count % step)]
    which = jnp.pad(rare[0].astype(jnp.int32), fill).reshape(-1, step)
    where = rare[1].astype(jnp.int32)
    where = jnp.pad(where, fill, constant_values=outputs).reshape(-1, step)
    excess = jnp.pad(rare[2].astype(x.dtype), fill).reshape(-1, step)
    columns = x.reshape(rows, inputs).T

    def add(y: jax.Array, some: Any) -> tuple[jax.Array, None]:
        which, where, excess = some
        terms = columns[which] * excess[:, None]
        y = y.at[where].add(terms, mode="drop", indices_are_sorted=True)
        return y, None

    y = jnp.zeros((outputs, rows), x.dtype)
    if len(which) == 1:
        y, _ = add(y, (which[0], where[0], excess[0]))
    else:
        y, _ = jax.lax.scan(add, y, (which, where, excess))
    return y.T.reshape(*lead, outputs)


def narrow_levels(levels: Any) -> NarrowLevels:
    """Pack levels `[..., inputs, outputs]` in groups of inputs; on the host.

    Args:
      levels: integers, of less than `2^30` in size.

    Raises:
      ValueError: a larger level.

    Example:
      >>> levels = jc.rate_distortion(x, rate=3.0).levels.materialize()
      >>> narrow_levels(levels).shape
      (64, 64)
    """
    levels = np.asarray(levels)
    *lead, inputs, outputs = levels.shape
    if levels.dtype.itemsize > 2 and np.abs(levels.astype(np.float64)).max() >= 2**30:
        raise ValueError(
            "levels of 2^30 and more are not packed: run the array as it is"
        )
    stack = levels.reshape(-1, inputs, outputs)
    low, cost = _choices(stack[..., :: -(-outputs // SAMPLE)])
    # Inputs of a like width, and of a like cost at it, are neighbours.
    order = np.lexsort((-cost.min(axis=0), cost.argmin(axis=0)), axis=-1)
    sorted_cost = np.take_along_axis(cost, order[None], axis=-1).sum(axis=1)
    widths, sizes = _groups(sorted_cost)
    # A level is its code and the middle of its range.
    place = np.argsort(order, axis=-1)
    group = np.repeat([WIDTHS.index(width) for width in widths], sizes)[place]
    shift = np.take_along_axis(low, group[None], axis=0)[0]
    shift += (1 << np.array(WIDTHS)[group]) >> 1
    layers = [
        _packed(*layer, widths, sizes)
        for layer in zip(stack, order, shift, strict=True)
    ]
    count = max(len(rare[0]) for _, rare in layers)
    fill = np.array([0, outputs, 0])
    rare = np.stack(
        [
            np.concatenate([x, np.repeat(fill[:, None], count - x.shape[1], axis=1)], 1)
            for _, x in layers
        ]
    )
    parts = [
        np.stack(words) for words in zip(*(words for words, _ in layers), strict=True)
    ]
    narrow = lambda x: jnp.asarray(x.astype(_narrowest(x)))  # noqa: E731
    return NarrowLevels(
        tuple(jnp.asarray(x.reshape(*lead, *x.shape[1:])) for x in parts),
        narrow(order.reshape(*lead, inputs)),
        narrow(shift.reshape(*lead, inputs, 1)),
        tuple(narrow(rare[:, i].reshape(*lead, count)) for i in range(3)),
        widths=widths,
        sizes=sizes,
        most=max(np.bincount(x[1], minlength=1).max() for _, x in layers),
        dtype=levels.dtype,
    )


def _narrowest(x: np.ndarray) -> type:
    """Return the narrowest integers that hold all of `x`."""
    low, high = int(x.min(initial=0)), int(x.max(initial=0))
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    return np.int32


def _choices(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest level that each width holds of each input, and what it costs.

    A range is centred on the median, and moved where an end is nearer.

    Args:
      sample: levels `[layers, inputs, outputs]`.

    Returns:
      Integers and bits of a level, `[WIDTHS, layers, inputs]`.
    """
    levels = np.sort(sample, axis=-1)
    ends = levels[..., 0].astype(np.int64), levels[..., -1].astype(np.int64)
    middle = levels[..., levels.shape[-1] // 2].astype(np.int64)
    lows, costs = [], []
    for width in WIDTHS:
        span = 1 << width
        low = np.minimum(middle - span // 2, ends[1] + 1 - span).clip(ends[0])
        rare = levels < low[..., None]
        rare |= levels > low[..., None] + (span - 1)
        bits = 32 / (32 // width) if width else 0
        costs.append(bits + RARE * rare.mean(axis=-1))
        lows.append(low)
    return np.stack(lows), np.stack(costs)


def _groups(cost: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return falling widths, and inputs of each, of least cost in all.

    `cost` `[WIDTHS, inputs]` is of inputs in their order.
    """
    inputs = cost.shape[1]
    ends = np.append(np.arange(0, inputs, TOGETHER), inputs)
    total = np.pad(np.cumsum(cost, axis=1), ((0, 0), (1, 0)))[:, ends]
    best: tuple[float, Any, Any] = (math.inf, (), ())
    for chosen in itertools.combinations(range(len(WIDTHS)), min(GROUPS, inputs)):
        # The least cost of the first groups up to each end, and where the last begins.
        least, begins = total[chosen[0]], []
        for after in chosen[1:]:
            gain = least - total[after]
            lowest = np.minimum.accumulate(gain)
            falls = np.append(True, gain[1:] < lowest[:-1])
            begin = np.maximum.accumulate(np.where(falls, np.arange(len(gain)), 0))
            begins.append(begin)
            least = lowest + total[after]
        if least[-1] < best[0]:
            end, cuts = len(ends) - 1, [inputs]
            for begin in reversed(begins):
                end = int(begin[end])
                cuts.append(int(ends[end]))
            sizes = np.diff([0, *reversed(cuts)])
            best = float(least[-1]), chosen, sizes
    groups = [(WIDTHS[i], int(n)) for i, n in zip(best[1], best[2], strict=True) if n]
    return tuple(width for width, _ in groups), tuple(size for _, size in groups)


def _packed(
    levels: np.ndarray,
    order: np.ndarray,
    shift: np.ndarray,
    widths: tuple[int, ...],
    sizes: tuple[int, ...],
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return words of each group, and rare levels `[inputs, outputs, excess]`.

    `levels` `[inputs, outputs]` of one layer.
    """
    words, rare, start = [], [], 0
    for width, size in zip(widths, sizes, strict=True):
        rows = order[start : start + size]
        start += size
        codes = levels[rows].astype(np.int32) - shift[rows, None].astype(np.int32)
        half = (1 << width) >> 1
        kept = np.clip(codes, -half, (1 << width) - 1 - half)
        row, output = np.nonzero(codes != kept)
        excess = codes[row, output] - kept[row, output]
        rare.append(np.stack([rows[row], output, excess]))
        words.append(_words(kept, width))
    apart = np.concatenate(rare, axis=1)
    return words, apart[:, np.argsort(apart[1], kind="stable")]


def _words(codes: np.ndarray, width: int) -> np.ndarray:
    """Pack signed codes `[inputs, outputs]` into words along inputs."""
    inputs, outputs = codes.shape
    if not width:
        return np.zeros((0, outputs), np.uint32)
    each = 32 // width
    words = np.zeros((-(-inputs // each), outputs), np.uint32)
    for place in range(each):
        field = codes[place::each].astype(np.uint32) & np.uint32((1 << width) - 1)
        words[: len(field)] |= field << np.uint32(place * width)
    return words


def _unpacked(words: jax.Array, width: int, inputs: int) -> jax.Array:
    """Return the codes of `_words`, int32 `[inputs, outputs]`.

    CPUs shift numbers of 32 bits, not bytes: once to the left, once back with the sign.
    """
    rows, outputs = words.shape
    if not width:
        return jnp.zeros((inputs, outputs), jnp.int32)
    each = 32 // width
    above = np.arange(32 - width, 32 - width - each * width, -width, dtype=np.int32)
    signed = jax.lax.bitcast_convert_type(words, jnp.int32)[:, None, :]
    codes = (signed << above[None, :, None]) >> np.int32(32 - width)
    return codes.reshape(rows * each, outputs)[:inputs]

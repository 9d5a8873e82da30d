"""Masks: the weights of highest score, among those they compete with."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.pruning.sparse import Sparse
from jaxcompress.tree import layouts
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import Leaf, Reshaped, dense, is_leaf
from jaxcompress.tree.paths import Entry, entries, map_entries
from jaxcompress.types import Masks, Params

Scope = Literal["leaf", "row", "global"]


class Choice(NamedTuple):
    """How many weights stay, and among which they compete; hashable.

    Args:
      among: "leaf": all of a matrix; "row": those of one output; "group": `size[0]`
        consecutive inputs of one output; "block": whole blocks of `size` in a matrix.
      size: of a group or block, inputs and outputs; (1, 1) otherwise.
      of: how many compete.
      kept: how many of them stay.
    """

    among: str
    size: tuple[int, int]
    of: int
    kept: int

    @property
    def by_output(self) -> bool:
        """Whether every output keeps the same number of weights."""
        return self.among in ("row", "group")

    def count(self, inputs: int) -> int:
        """Weights that stay, of each output if `by_output`, else of a matrix."""
        if self.among == "group":
            return self.kept * (inputs // self.size[0])
        return self.kept * (self.size[0] * self.size[1])


def choice(
    shape: tuple[int, ...],
    name: str,
    *,
    sparsity: float | None,
    pattern: str | None,
    scope: str = "leaf",
) -> Choice:
    """What the options of a method mean for weights of this shape.

    Raises ValueError where they are out of range, contradict each other, or do not
    divide the weights; the message calls the method by `name`.
    """
    inputs, outputs = shape[-2:]
    if scope not in ("leaf", "row"):
        raise ValueError(f"{name} takes scope='leaf' or 'row', not {scope!r}")
    parsed = None if pattern is None else _pattern(pattern, name)
    if parsed and parsed[0] == ":":
        _, keep, group = parsed
        if sparsity is not None and sparsity != 1 - keep / group:
            raise ValueError(
                f"{name}: the pattern {pattern} is a sparsity of {1 - keep / group:g}, "
                f"not {sparsity!r}; leave one out"
            )
        if inputs % group:
            raise ValueError(
                f"{name}: the pattern {pattern} needs a multiple of {group} inputs, "
                f"these weights have {inputs}; prune by sparsity instead"
            )
        return Choice("group", (group, 1), group, keep)
    number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity < 1:
        raise ValueError(
            f"{name} takes the fraction of weights to drop, at least 0 and below 1, "
            f"not {sparsity!r}"
        )
    if parsed:
        _, rows, columns = parsed
        if scope != "leaf":
            raise ValueError(f"{name}: blocks compete in the whole leaf, not per row")
        if inputs % rows or outputs % columns:
            raise ValueError(
                f"{name}: blocks of {pattern} do not divide {inputs} inputs and "
                f"{outputs} outputs; prune by sparsity instead"
            )
        among, size, of = "block", (rows, columns), inputs * outputs // (rows * columns)
    elif scope == "row":
        among, size, of = "row", (1, 1), inputs
    else:
        among, size, of = "leaf", (1, 1), inputs * outputs
    kept = round((1 - sparsity) * of)
    if not kept:
        raise ValueError(
            f"{name} would keep none of {of} (sparsity={sparsity!r}); lower it"
        )
    return Choice(among, size, of, kept)


def _pattern(pattern: str, name: str) -> tuple[str, int, int]:
    """Separator and the two numbers of "2:4" or "16x16"."""
    found = re.fullmatch(r"(\d+)([:x])(\d+)", str(pattern))
    first, separator, second = found.groups() if found else (0, "", 0)
    first, second = int(first), int(second)
    most = second if separator == ":" else first
    if not (1 <= first <= most and second >= 1):
        raise ValueError(
            f"{name} takes a pattern such as '2:4' (2 of 4 consecutive inputs stay) or "
            f"'16x16' (blocks of 16 inputs and 16 outputs), not {pattern!r}"
        )
    return separator, first, second


@functools.partial(jax.jit, static_argnames=("axis",))
def keep_largest(score: jax.Array, kept: Any, *, axis: int = -1) -> jax.Array:
    """Boolean: exactly the `kept` largest along an axis; of equal ones the first.

    The value of the last one to stay is found bit by bit: 31 passes over the scores,
    and no sort. `kept` may be traced. Scores are float32 and not negative; a negative
    one never stays.
    """
    # Non-negative floats are in the order of their bits.
    bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    total = functools.partial(jnp.sum, axis=axis, keepdims=True, dtype=jnp.int32)

    def next_bit(i: jax.Array, last: jax.Array) -> jax.Array:
        higher = last | (jnp.int32(1) << (30 - i))
        return jnp.where(total(bits >= higher) >= kept, higher, last)

    shape = list(score.shape)
    shape[axis] = 1
    last = jax.lax.fori_loop(0, 31, next_bit, jnp.zeros(shape, jnp.int32))
    above, tied = bits > last, bits == last
    room = kept - total(above)
    return above | (tied & (jnp.cumsum(tied, axis=axis, dtype=jnp.int32) <= room))


def select(score: jax.Array, chosen: Choice, kept: Any = None) -> jax.Array:
    """Where weights stay, boolean like the scores `[..., inputs, outputs]`; traceable.

    The score of a block is the root of its sum of squares. `kept`, possibly traced,
    overrules the choice's.
    """
    kept = chosen.kept if kept is None else kept
    *stack, inputs, outputs = score.shape
    rows, columns = chosen.size
    if chosen.among == "row":
        return keep_largest(score, kept, axis=-2)
    if chosen.among == "group":
        groups = score.reshape((*stack, inputs // rows, rows, outputs))
        return keep_largest(groups, kept, axis=-2).reshape(score.shape)
    if chosen.among == "block":
        shape = (*stack, inputs // rows, rows, outputs // columns, columns)
        score = jnp.linalg.norm(jnp.swapaxes(score.reshape(shape), -3, -2), axis=-1)
        score = jnp.linalg.norm(score, axis=-1)
    mask = keep_largest(score.reshape((*stack, -1)), kept).reshape(score.shape)
    mask = jnp.repeat(mask, rows, axis=-2) if rows > 1 else mask
    return jnp.repeat(mask, columns, axis=-1) if columns > 1 else mask


def make_masks(
    params: Params,
    scores: Any,
    sparsity: Any = None,
    *,
    scope: Scope = "leaf",
    pattern: str | None = None,
    layout: Mapping[str, Layout] | None = None,
) -> Masks:
    """Masks of the weights of highest score over a whole tree; traceable.

    Scores of different leaves must be comparable where they compete ("global"):
    magnitudes are not, if layers differ in scale. Equal scores: the first stays.

    Args:
      params: the tree the masks are for.
      scores: the same tree with arrays that are not negative, larger for weights worth
        more, and None where a leaf stays dense (`magnitude_scores` and others).
      sparsity: fraction of the scored weights to drop, at least 0 and below 1; may be
        traced, and is then rounded in float32.
      scope: weights compete within their leaf (each slice of a stack, where the layout
        names one), within their "row" (one output), or all together ("global").
      pattern: "2:4" or another N:M along the inputs, or blocks such as "16x16". A
        sparsity beside N:M says how many of each group go, until N are left.
      layout: `Layout` by leaf name; needed where rows or patterns are asked for in
        kernels of more than two axes.

    Returns:
      A tree of booleans, None where dense.

    Raises:
      ValueError: nothing scored, scores that do not fit, options out of range.
    """
    arrays = {e.name: e.value for e in entries(params) if not e.depth}
    scored = entries(scores)
    if not scored:
        raise ValueError("no leaf has scores; narrow or widen the names to be scored")
    for entry in scored:
        if entry.name not in arrays or arrays[entry.name].shape != entry.value.shape:
            found = getattr(arrays.get(entry.name), "shape", "no dense array")
            raise ValueError(
                f"{entry.name}: scores of shape {entry.value.shape}, and the tree has "
                f"{found} there; score the same parameters"
            )
    if scope == "global":
        if pattern is not None:
            raise ValueError("a pattern is chosen within a leaf, not scope='global'")
        masks = _pooled(scored, sparsity)
    else:
        masks = {
            entry.name: _one_mask(entry, sparsity, scope, pattern, layout or {})
            for entry in scored
        }
    return map_entries(lambda entry: masks[entry.name], scores)


def _pooled(scored: list[Entry], sparsity: Any) -> dict[str, jax.Array]:
    flat = jnp.concatenate([e.value.astype(jnp.float32).ravel() for e in scored])
    chosen = _choice((flat.size, 1), "make_masks", sparsity, None, "leaf")
    mask, start, masks = keep_largest(flat, _kept(chosen, sparsity)), 0, {}
    for entry in scored:
        part = mask[start : start + entry.value.size]
        masks[entry.name] = part.reshape(entry.value.shape)
        start += entry.value.size
    return masks


def _one_mask(
    entry: Entry,
    sparsity: Any,
    scope: str,
    pattern: str | None,
    layout: Mapping[str, Layout],
) -> jax.Array:
    score, kind = entry.value, layout.get(entry.name)
    if kind is None and score.ndim == 2:
        kind = layouts.ROWS if entry.embedding else layouts.DENSE
    if kind is None and (scope != "leaf" or pattern is not None):
        raise ValueError(
            f"{entry.name}: shape {score.shape} has {score.ndim} axes, and which are "
            "inputs is unknown; pass layout=layout(model, params, batch)"
        )
    if kind is None:
        matrix = score.reshape(-1, 1)
    else:
        layouts.check_layout(entry.name, score.shape, kind)
        matrix = layouts.matricize(score, kind)
    chosen = _choice(
        matrix.shape, f"{entry.name}: make_masks", sparsity, pattern, scope
    )
    mask = select(matrix, chosen, _kept(chosen, sparsity))
    if kind is None:
        return mask.reshape(score.shape)
    return dense(layouts.restore(mask, score.shape, kind))


def _choice(
    shape: tuple[int, ...], name: str, sparsity: Any, pattern: str | None, scope: str
) -> Choice:
    """The choice where the sparsity may be an array, whose value is not looked at."""
    grouped = pattern is not None and ":" in pattern
    if isinstance(sparsity, jax.Array):
        sparsity = None if grouped else 0.0
    elif grouped and sparsity is not None:
        choice(shape, name, sparsity=sparsity, pattern=None, scope=scope)
        sparsity = None
    return choice(shape, name, sparsity=sparsity, pattern=pattern, scope=scope)


def _kept(chosen: Choice, sparsity: Any) -> Any:
    """How many stay where the sparsity is an array, or goes towards a pattern."""
    if sparsity is None:
        return chosen.kept
    if isinstance(sparsity, jax.Array):
        kept = jnp.round((1 - sparsity) * chosen.of).astype(jnp.int32)
        least = chosen.kept if chosen.among == "group" else 0
        return jnp.clip(kept, least, chosen.of)
    if chosen.among == "group":
        return max(chosen.kept, round((1 - sparsity) * chosen.of))
    return chosen.kept


def masks_of(params: Params) -> Masks:
    """Where the `Sparse` leaves of a tree keep weights: booleans, None elsewhere.

    A dense array has no mask, zeros or not: a kernel that starts at zero is to train.

    Raises:
      ValueError: the tree has no `Sparse` leaf.
    """
    found = 0

    def mask(x: Any) -> jax.Array | None:
        nonlocal found
        inner = x.inner if isinstance(x, Reshaped) else x
        if not isinstance(inner, Sparse):
            return None
        found += 1
        if inner is x:
            return x.kept
        return dataclasses.replace(x, inner=inner.kept).materialize()

    masks = jax.tree.map(mask, params, is_leaf=is_leaf)
    if not found:
        raise ValueError(
            "the tree has no Sparse leaf; make masks with make_masks from scores"
        )
    return masks


def apply_masks(params: Params, masks: Masks) -> Params:
    """The tree with zeros where a mask is false; leaves without a mask untouched.

    Raises:
      ValueError: a mask of another shape, or on a compressed leaf.
    """

    def apply(mask: jax.Array | None, x: Any) -> Any:
        if mask is None:
            return x
        if isinstance(x, Leaf):
            raise ValueError(
                f"a mask on a {type(x).__name__}; materialize the tree first"
            )
        check_mask(mask, x)
        return jnp.where(mask, x, 0)

    return jax.tree.map(apply, masks, params, is_leaf=lambda x: x is None)


def check_mask(mask: jax.Array, x: Any) -> None:
    """Raises ValueError where a mask does not fit an array."""
    if mask.shape != jnp.shape(x):
        raise ValueError(
            f"a mask of shape {mask.shape} on an array of shape {jnp.shape(x)}; make "
            "masks from the same parameters"
        )

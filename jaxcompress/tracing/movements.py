"""Movements of a weight: from the tags of an operation's operands to its result's.

Followed are casts, transposes, reshapes, slices, gathers of whole slices, reversals,
concatenations, entries that are set, and arithmetic with what does not depend on the
batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing.provenance import (
    CONSTANT,
    ONE_HOT,
    SAME,
    Atom,
    Joined,
    OneHot,
    Picked,
    Scaled,
    Tag,
    Weight,
    held_size,
    is_weight,
    part,
    reshaped,
)

# Arithmetic, element by element: axes stay, and values for this purpose.
_ARITHMETIC = "mul div add add_any sub neg max min clamp abs sign pow integer_pow"
_FUNCTIONS = """
exp exp2 expm1 log log1p sqrt rsqrt cbrt square sin cos tanh logistic erf round floor
ceil select_n stop_gradient
"""
ELEMENTWISE = {*_ARITHMETIC.split(), *_FUNCTIONS.split()}


def moved(eqn: Any, values: Sequence, tags: Sequence[Tag], results: list) -> list[Tag]:
    """Return the tags of an operation's results."""
    name = eqn.primitive.name
    after: list[Tag] = []
    if any(isinstance(tag, Scaled) for tag in tags):
        return [tags[0] if name in SAME else None] * len(results)
    hot = any(isinstance(tag, OneHot) for tag in tags)
    if any(map(is_weight, tags)) and results:
        after = _of_weights(eqn, values, tags, results)
        after += [None] * (len(results) - len(after))
    elif (name == "eq" and _compares(values, tags)) or (name in SAME and hot):
        after = [ONE_HOT]
    rest = None if hot or any(tag is None for tag in tags) else CONSTANT
    return [tag or rest for tag in after or [None] * len(results)]


def _compares(values: Sequence, tags: Sequence[Tag]) -> bool:
    """Return whether integers of the batch are compared with a row of constants."""
    pairs = list(zip(tags, values, strict=True))
    constant = [tag is CONSTANT and jnp.ndim(x) > 1 for tag, x in pairs]
    whole = all(jnp.issubdtype(jnp.result_type(x), jnp.integer) for x in values)
    return whole and sorted(constant) == [False, True] and None in tags


def _of_weights(
    eqn: Any, values: Sequence, tags: Sequence[Tag], results: list
) -> list[Tag]:
    name, params = eqn.primitive.name, eqn.params
    if not jnp.issubdtype(results[0].dtype, jnp.inexact):
        return []
    if name == "mul" and None in tags:
        return [_scaled(values, tags, results[0])]
    if name.startswith("scatter") or name == "dynamic_update_slice":
        fixed = all(tag == CONSTANT for tag in tags[1:])
        return [tags[0] if fixed else None]
    if name in ELEMENTWISE:
        return [_combined(values, tags, results[0])]
    if name == "dot_general":
        return [_selected(params, values, tags, results[0])]
    if name == "concatenate":
        return [_joined(params["dimension"], values, tags)]
    if name == "stack":
        axis = params["axis"] % results[0].ndim
        spread = [_inserted(tag, axis) for tag in tags]
        shapes = [jnp.expand_dims(x, axis) for x in values]
        return [_joined(axis, shapes, spread)]
    tag = tags[0]
    if not is_weight(tag):
        return []
    if name == "gather" and is_rearranging(params, values, tags):
        return [_rearranged(params, values, tag)]
    if name == "unstack":
        return _unstacked(tag, params["axis"] % values[0].ndim, values[0].shape)
    if name == "split":
        sizes = [int(size) for size in params["sizes"]]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        zero, whole = [0] * values[0].ndim, list(values[0].shape)
        after: list[Tag] = []
        for start, size in zip(starts, sizes, strict=True):
            zero[params["axis"]], whole[params["axis"]] = start, size
            after.append(_sliced(tag, tuple(zero), tuple(whole), values[0].shape))
        return after
    if isinstance(tag, Joined):
        return [_of_joined(eqn, values, tag, results[0])]
    if name == "pad":
        return [_padded(params["padding_config"], tag, values[0].shape)]
    return [_of_one(eqn, values, tag, results[0])]


def _of_one(eqn: Any, values: Sequence, weight: Weight, result: jax.Array) -> Tag:
    name, params, shape = eqn.primitive.name, eqn.params, values[0].shape
    axes: tuple | None = None
    if name in SAME:
        return weight
    if name == "transpose":
        axes = tuple(weight.axes[axis] for axis in params["permutation"])
    elif name == "squeeze":
        dropped = {axis % len(shape) for axis in params["dimensions"]}
        axes = tuple(a for i, a in enumerate(weight.axes) if i not in dropped)
    elif name == "broadcast_in_dim":
        spread: list[tuple[Atom, ...]] = [()] * len(result.shape)
        for atoms, axis in zip(
            weight.axes, params["broadcast_dimensions"], strict=True
        ):
            spread[axis] = atoms if held_size(atoms) == result.shape[axis] else ()
        axes = tuple(spread)
    elif name == "reshape" and params.get("dimensions") is None:
        axes = reshaped(weight, result.shape)
    elif name == "rev":
        flip = lambda atom: atom._replace(flipped=not atom.flipped)  # noqa: E731
        axes = tuple(
            tuple(map(flip, atoms)) if i in params["dimensions"] else atoms
            for i, atoms in enumerate(weight.axes)
        )
    elif name == "slice":
        steps = params["strides"] or [1] * len(shape)
        starts = [
            start if step == 1 else None
            for start, step in zip(params["start_indices"], steps, strict=True)
        ]
        return _sliced(weight, starts, result.shape, shape)
    elif name == "dynamic_slice":
        return _sliced(weight, values[1 : 1 + len(shape)], result.shape, shape)
    elif name == "gather":
        return _gathered(params, values, weight, result)
    elif name == "all_gather":
        axis = params["all_gather_dimension"]
        if params["tiled"] and len(weight.axes[axis]) == 1:
            whole = Atom(weight.axes[axis][0].axis, 1, result.shape[axis])
            axes = (*weight.axes[:axis], (whole,), *weight.axes[axis + 1 :])
    return None if axes is None else dataclasses.replace(weight, axes=axes)


def _of_joined(eqn: Any, values: Sequence, tag: Joined, result: jax.Array) -> Tag:
    """Follow casts and transposes of joined weights, and slices that hold one."""
    name, params = eqn.primitive.name, eqn.params
    if name in SAME:
        return tag
    if name == "transpose":
        axis = None if tag.axis is None else params["permutation"].index(tag.axis)
        parts = tuple(
            (t and _of_one(eqn, values, t, result), start, size)
            for t, start, size in tag.parts
        )
        return Joined(axis, parts)
    if name == "slice" and params["strides"] is None:
        return _sliced(tag, params["start_indices"], result.shape, values[0].shape)
    return None


def _sliced(
    tag: Weight | Joined, starts: Sequence, sizes: Sequence[int], shape: Sequence[int]
) -> Tag:
    """Return the tag of a slice; `starts` may be traced, or None where it has steps."""
    if isinstance(tag, Joined):
        if tag.axis is None:
            return None
        first = int(starts[tag.axis])
        for inner, start, size in tag.parts:
            if inner and start <= first and first + sizes[tag.axis] <= start + size:
                starts = list(starts)
                starts[tag.axis] = first - start
                held = [*shape[: tag.axis], size, *shape[tag.axis + 1 :]]
                return _sliced(inner, starts, sizes, held)
        return None
    axes, picked = [], list(tag.picked)
    for atoms, start, size, whole in zip(tag.axes, starts, sizes, shape, strict=True):
        if size == whole:
            axes.append(atoms)
            continue
        fixed = int(start) if isinstance(start, int) else None
        if size == 1 and len(atoms) == 1 and start is not None and atoms[0].whole:
            index = jnp.clip(jnp.asarray(start, jnp.int32), 0, whole - 1)
            index = whole - 1 - index if atoms[0].flipped else index
            picked.append(Picked(atoms[0], index))
            axes.append(())
            continue
        kept = part(atoms, fixed, size)
        if kept is None:
            return None
        axes.append(kept)
    return dataclasses.replace(tag, axes=tuple(axes), picked=tuple(picked))


def _gathered(params: Any, values: Sequence, weight: Weight, result: jax.Array) -> Tag:
    """Return the tag of whole slices gathered along one axis of the weight."""
    numbers, (table, indices) = params["dimension_numbers"], values
    rows = tuple(numbers.start_index_map)
    if not is_slice_gather(params, values, weight):
        return None
    atom = weight.axes[rows[0]][0]
    batch = [i for i in range(result.ndim) if i not in numbers.offset_dims]
    index = jnp.clip(indices[..., 0].astype(jnp.int32), 0, table.shape[rows[0]] - 1)
    axes: list[tuple[Atom, ...]] = [()] * result.ndim
    for i, axis in enumerate(batch):
        axes[axis] = (Atom(-1 - i, 1, result.shape[axis]),)
    kept = [axis for axis in range(table.ndim) if axis != rows[0]]
    for axis, offset in zip(kept, numbers.offset_dims, strict=True):
        axes[offset] = weight.axes[axis]
    picked = (*weight.picked, Picked(atom, index))
    return dataclasses.replace(weight, axes=tuple(axes), picked=picked)


def _rearranged(params: Any, values: Sequence, weight: Any) -> Weight:
    """Return the tag of a weight with one axis in another order, or a part of it."""
    (row,), (table, indices) = params["dimension_numbers"].start_index_map, values
    order = jnp.clip(indices[..., 0].astype(jnp.int32), 0, table.shape[row] - 1)
    atom = weight.axes[row][0]._replace(size=order.size, start=None, whole=False)
    axes = list(weight.axes)
    del axes[row]
    kept = params["dimension_numbers"].offset_dims
    (at,) = {*range(table.ndim)} - {*kept}
    axes.insert(at, (atom._replace(order=order),))
    return dataclasses.replace(weight, axes=tuple(axes))


def is_rearranging(params: Any, values: Sequence, tags: Sequence[Tag]) -> bool:
    """Return whether a gather takes constant indices along one whole axis."""
    numbers, (table, indices) = params["dimension_numbers"], values
    rows = tuple(numbers.start_index_map)
    if len(rows) != 1 or numbers.operand_batching_dims or indices.ndim != 2:
        return False
    weight, sizes = tags[0], params["slice_sizes"]
    if not isinstance(weight, Weight) or tags[1] is not CONSTANT:
        return False
    whole = all(sizes[a] == table.shape[a] for a in range(table.ndim) if a != rows[0])
    one = tuple(numbers.collapsed_slice_dims) == rows
    atoms = weight.axes[rows[0]]
    plain = len(atoms) == 1 and atoms[0] == Atom(atoms[0].axis, 1, table.shape[rows[0]])
    return whole and one and plain and not is_slice_gather(params, values, weight)


def _selected(
    params: Any, values: Sequence, tags: Sequence[Tag], result: jax.Array
) -> Tag:
    """Return the tag of slices that a product with one-hot vectors picks."""
    if not is_slice_product(params, values, tags):
        return None
    side = 0 if isinstance(tags[0], Weight) else 1
    weight, hot = tags[side], values[1 - side]
    assert isinstance(weight, Weight)
    (mine,), (other,) = (params["dimension_numbers"][0][i] for i in (side, 1 - side))
    kept = [axes for a, axes in enumerate(weight.axes) if a != mine]
    rows = [size for b, size in enumerate(hot.shape) if b != other]
    indices = [(Atom(-1 - i, 1, size),) for i, size in enumerate(rows)]
    axes = (*kept, *indices) if side == 0 else (*indices, *kept)
    picked = Picked(weight.axes[mine][0], hot_index(jnp.moveaxis(hot, other, -1)))
    return dataclasses.replace(weight, axes=axes, picked=(*weight.picked, picked))


def hot_index(x: jax.Array) -> jax.Array:
    """Return where the last axis has its one; its size where it has none."""
    return jnp.where(x.max(-1) > 0, jnp.argmax(x, -1), x.shape[-1])


def is_slice_product(params: Any, values: Sequence, tags: Sequence[Tag]) -> bool:
    """Return whether a product with one-hot vectors picks whole slices, as
    `is_slice_gather` says of a gather.
    """
    if sorted(type(tag).__name__ for tag in tags) != ["OneHot", "Weight"]:
        return False
    side = 0 if isinstance(tags[0], Weight) else 1
    contracted, batched = params["dimension_numbers"]
    mine, weight = contracted[side], tags[side]
    if len(mine) != 1 or batched[0]:
        return False
    return _is_slicing(weight, mine[0], values[side].shape)


def _is_slicing(weight: Weight, axis: int, shape: Sequence[int]) -> bool:
    """Return whether slices along an axis are matrices of a whole, untouched axis."""
    others = [a for a in range(len(shape)) if a != axis]
    matrices = sum(held_size(weight.axes[a]) > 1 for a in others) > 1
    atoms = weight.axes[axis]
    plain = len(atoms) == 1 and atoms[0] == Atom(atoms[0].axis, 1, shape[axis])
    return matrices and plain and not any(jnp.ndim(p.index) for p in weight.picked)


def is_slice_gather(params: Any, values: Sequence, weight: Weight) -> bool:
    """Return whether a gather picks whole slices of two axes or more along one whole
    axis.
    """
    numbers, (table, indices) = params["dimension_numbers"], values
    rows = tuple(numbers.start_index_map)
    sizes, shape = params["slice_sizes"], table.shape
    if len(rows) != 1 or numbers.operand_batching_dims or indices.shape[-1] != 1:
        return False
    whole = all(sizes[a] == shape[a] for a in range(table.ndim) if a != rows[0])
    one = tuple(numbers.collapsed_slice_dims) == rows
    return whole and one and _is_slicing(weight, rows[0], shape)


def _scaled(values: Sequence, tags: Sequence[Tag], result: jax.Array) -> Tag:
    """Return the tag of a weight times a value of the batch."""
    side = list(tags).index(None)
    weight, by = tags[1 - side], values[side]
    if not isinstance(weight, Weight) or jnp.ndim(by) != result.ndim:
        return None
    return Scaled(weight, by)


def _combined(values: Sequence, tags: Sequence[Tag], result: jax.Array) -> Tag:
    """Return the tag of arithmetic on weights and what does not depend on the batch."""
    if any(tag is None or isinstance(tag, OneHot) for tag in tags):
        return None
    shaped = [
        tag
        for tag, x in zip(tags, values, strict=True)
        if is_weight(tag) and jnp.shape(x) == result.shape
    ]
    sizes = [
        sum(held_size(atoms) > 1 for atoms in tag.axes)
        if isinstance(tag, Weight)
        else result.ndim
        for tag in shaped
    ]
    largest = [t for t, size in zip(shaped, sizes, strict=True) if size == max(sizes)]
    largest = list({id(tag): tag for tag in largest}.values())
    if len(largest) < 2:
        return largest[0] if largest else None
    weights = [tag for tag in largest if isinstance(tag, Weight)]
    if len(weights) < len(largest):
        return None
    if len({tag.name for tag in weights}) == 1:
        return weights[0]
    return Joined(None, tuple((tag, 0, 0) for tag in weights))


def _padded(config: Sequence, weight: Weight, shape: Sequence[int]) -> Tag:
    """Return the tag of a weight padded along one axis, as if joined with constants."""
    around = [(axis, *pads) for axis, pads in enumerate(config) if any(pads)]
    if not around:
        return weight
    axis, before, after, inside = around[0]
    if len(around) > 1 or inside or min(before, after) < 0:
        return None
    end = before + shape[axis]
    parts = [(None, 0, before), (weight, before, shape[axis]), (None, end, after)]
    return Joined(axis, tuple(part for part in parts if part[2]))


def _inserted(tag: Tag, axis: int) -> Tag:
    """Return the tag with a new axis of size 1."""
    if not isinstance(tag, Weight):
        return None if isinstance(tag, Joined) else tag
    axes = (*tag.axes[:axis], (), *tag.axes[axis:])
    return dataclasses.replace(tag, axes=axes)


def _unstacked(tag: Any, axis: int, shape: Sequence[int]) -> list[Tag]:
    """Return the tags of all slices along an axis, which they lose."""
    after: list[Tag] = []
    for i in range(shape[axis]):
        starts = [i if a == axis else 0 for a in range(len(shape))]
        sizes = [1 if a == axis else size for a, size in enumerate(shape)]
        one = _sliced(tag, starts, sizes, shape)
        if isinstance(one, Weight):
            kept = one.axes[:axis] + one.axes[axis + 1 :]
            one = dataclasses.replace(one, axes=kept)
        after.append(one if isinstance(one, Weight) else None)
    return after


def _joined(axis: int, values: Sequence, tags: Sequence[Tag]) -> Tag:
    parts, start = [], 0
    for tag, value in zip(tags, values, strict=True):
        size = value.shape[axis]
        if tag is None or isinstance(tag, Joined | OneHot):
            return None
        parts.append((tag if isinstance(tag, Weight) else None, start, size))
        start += size
    return Joined(axis, tuple(parts))

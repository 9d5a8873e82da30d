"""The operations that consume a weight: products, convolutions and lookups."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing.movements import (
    hot_index,
    is_slice_gather,
    is_slice_product,
)
from jaxcompress.tracing.provenance import (
    Atom,
    OneHot,
    Picked,
    Tag,
    Weight,
    covers,
    held_size,
    is_weight,
    original_layout,
)
from jaxcompress.tree.layouts import Layout


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a weight is multiplied or looked up.

    `inputs` are the rows that meet the weight, `[stack, ..., inputs]`, the last axis in
    the order of the matricized weight; the first `stack` axes are stack axes. If
    `lookup`, they are row numbers `[stack, ...]`, and those outside are not read.
    `looped`: the place is inside a loop or a branch, whose values stay inside.

    The stack axes before those, in the order of the layout: `picked` are the places of
    single slices, `(size, index)`; `chosen` is `(size, indices)` where each row meets a
    slice of its own, indices of the shape of the rows; `shared` are the sizes of those
    whose slices all meet the same rows. `part`: what of the inputs this use sees.
    `real`: the rows that count, if not all; `ordered`: rows are in the batch's order.
    """

    name: str
    layout: Layout
    inputs: jax.Array
    stack: int
    lookup: bool
    looped: bool = False
    picked: tuple[tuple[int, Any], ...] = ()
    chosen: tuple[int, Any] | None = None
    shared: tuple[int, ...] = ()
    part: float = 1.0
    real: jax.Array | None = None
    ordered: bool = True


def uses_of(
    eqn: Any, values: list, tags: Sequence[Tag], *, mapped: bool, experts: set[str]
) -> list[Use]:
    """Return the uses of weights in one operation.

    `mapped`: `vmap` made it. `experts`: names of weights whose gathered slices are
    multiplied, which are stacks and no tables.
    """
    name, uses = eqn.primitive.name, []
    weights = [is_weight(tag) for tag in tags]
    if name == "dot_general" and weights[0] != weights[1]:
        side = weights.index(True)
        tag = tags[side]
        named = isinstance(tag, Weight) and tag.name in experts
        if named and is_slice_product(eqn.params, values, tags):
            return []
        for tag, w, x in _parts(eqn.params, values, tags[side], side):
            uses.append(_product(eqn.params, w, x, tag, side, tags[1 - side], mapped))
    elif name == "conv_general_dilated" and weights == [False, True]:
        for tag, kernel in _output_parts(eqn.params, values[1], tags[1]):
            uses.append(_convolution(eqn.params, [values[0], kernel], tag, mapped))
    elif name == "gather" and isinstance(tags[0], Weight):
        whole = is_slice_gather(eqn.params, values, tags[0])
        if not (whole and tags[0].name in experts):
            uses.append(_lookup(eqn.params, values, tags[0]))
    elif name in ("ragged_dot_general", "ragged_dot") and isinstance(tags[1], Weight):
        uses.append(_ragged(eqn.params, values, tags[1]))
    return [use for use in uses if use is not None]


def _parts(params: Mapping[str, Any], values: list, tag: Any, side: int) -> list:
    """Compute `(tag, weight, inputs)` of each weight among those joined in an
    operand.
    """
    w, x = values[side], values[1 - side]
    if isinstance(tag, Weight):
        return [(tag, w, x)]
    parts = []
    contracted, batched = params["dimension_numbers"]
    pairs = [
        *zip(contracted[side], contracted[1 - side], strict=True),
        *zip(batched[side], batched[1 - side], strict=True),
    ]
    for inner, start, size in tag.parts:
        if inner is None:
            continue
        if tag.axis is None:
            parts.append((inner, w, x))
            continue
        take = lambda a, axis, i=start, n=size: jax.lax.slice_in_dim(  # noqa: E731
            a, i, i + n, axis=axis
        )
        met = x
        for own, other in pairs:
            if own == tag.axis:
                met = take(x, other)
        parts.append((inner, take(w, tag.axis), met))
    return parts


def _output_parts(params: Mapping[str, Any], kernel: jax.Array, tag: Any) -> list:
    """Compute `(tag, kernel)` of each kernel among those joined along their outputs."""
    if isinstance(tag, Weight):
        return [(tag, kernel)]
    if tag.axis not in (None, params["dimension_numbers"].rhs_spec[0]):
        return []
    parts = []
    for inner, start, size in tag.parts:
        if inner is not None:
            whole = tag.axis is None
            sliced = kernel if whole else kernel[_only(tag.axis, start, size)]
            parts.append((inner, sliced))
    return parts


def _only(axis: int, start: int, size: int) -> tuple:
    return (*(slice(None),) * axis, slice(start, start + size))


def _stacks(weight: Weight, layout: Layout, before: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a `Use` that tell of stack axes; `before` are those of
    `stack`.
    """
    picked = tuple(
        (p.atom.size, p.index) for p in weight.picked if not jnp.ndim(p.index)
    )
    count = len(weight.stack) + len(weight.picked)
    own = layout.stack[count:]
    shared = tuple(weight.shape[a] for a in own if a not in before)
    return {"picked": picked, "shared": shared}


def _product(
    params: Mapping[str, Any],
    value: jax.Array,
    x: jax.Array,
    weight: Weight,
    side: int,
    other: Tag,
    mapped: bool,
) -> Use | None:
    contracted, batched = params["dimension_numbers"]
    mine, others = contracted[side], contracted[1 - side]
    # Along a batched axis on which the weight repeats, it meets further rows; along one
    # of gathered slices each row meets a slice of its own.
    pairs = list(zip(batched[side], batched[1 - side], strict=True))
    stacked = sorted(
        (min(atom.axis for atom in weight.axes[a]), a, b)
        for a, b in pairs
        if any(atom.axis >= 0 for atom in weight.axes[a])
    )
    stack = [a for _, a, _ in stacked]
    used = {*mine, *batched[side]}
    free = [a for a in range(len(weight.axes)) if a not in used]
    lead = [b for _, _, b in stacked]
    rows = [b for b in range(x.ndim) if b not in lead and b not in others]
    meets = {b: weight.axes[a] for a, b in pairs}
    if any(map(_of_indices, meets.values())):
        # Several slices for each row: it meets each of them.
        for a in [a for a in free if _of_indices(weight.axes[a])]:
            x = jnp.broadcast_to(x[..., None], (*x.shape, value.shape[a]))
            meets[x.ndim - 1] = weight.axes[a]
            rows.append(x.ndim - 1)
            free.remove(a)
    if any(_of_indices(weight.axes[a]) for a in (*mine, *free, *stack)):
        return None
    if isinstance(other, OneHot):
        return _one_hot(weight, x, stack, mine, free, lead, rows)
    layout = original_layout(weight, stack, mine, free, shared=mapped)
    if layout is None or not covers(weight, mine, value):
        return None
    x = x.transpose(*lead, *rows, *others)
    x = _in_order(
        x, len(lead) + len(rows), [weight.axes[axis] for axis in mine], weight
    )
    if x is None:
        return None
    x, part = x
    before = [atom.axis for a in stack for atom in weight.axes[a]]
    chosen = _chosen(weight, meets, rows)
    stacks = _stacks(weight, layout, before)
    return Use(
        weight.name, layout, x, len(lead), False, part=part, chosen=chosen, **stacks
    )


def _of_indices(atoms: Sequence[Atom]) -> bool:
    """Return whether an axis is one of the indices by which slices were gathered."""
    return any(atom.axis < 0 for atom in atoms)


def _chosen(
    weight: Weight, held: Mapping[int, Sequence[Atom]], rows: Sequence[int]
) -> tuple[int, jax.Array] | None:
    """Return the slice that each row meets: `(slices, indices that broadcast to the
    rows)`.
    """
    for picked in weight.picked:
        if jnp.ndim(picked.index):
            atoms = [atom for b in rows for atom in held.get(b, ()) if atom.axis < 0]
            axes = [-1 - atom.axis for atom in atoms]
            missing = [axis for axis in range(picked.index.ndim) if axis not in axes]
            index = picked.index.transpose(*missing, *axes)
            sizes = [held_size(held.get(b, ())) for b in rows]
            return picked.atom.size, index.reshape(sizes)
    return None


def _one_hot(
    weight: Weight, x: jax.Array, stack: list, mine: Any, free: list, lead: list, rows
) -> Use | None:
    """Return a product with one-hot vectors, which reads rows of a table."""
    layout = original_layout(weight, stack, free, mine)
    if layout is None or len(mine) != 1 or len(weight.axes[mine[0]]) != 1:
        return None
    x = x.transpose(
        *lead, *rows, *(b for b in range(x.ndim) if b not in (*lead, *rows))
    )
    hot = hot_index(x)
    if weight.axes[mine[0]][0].flipped or not weight.axes[mine[0]][0].whole:
        return None
    before = [atom.axis for a in stack for atom in weight.axes[a]]
    stacks = _stacks(weight, layout, before)
    return Use(weight.name, layout, hot, len(lead), lookup=True, **stacks)


def _in_order(
    x: jax.Array, start: int, held: Sequence[Sequence[Atom]], weight: Weight
) -> tuple[jax.Array, float] | None:
    """Return axes from `start` on as one, in the order of the original weight's axes.

    Where the weight's axes are held in part, zeros fill the rest up. The second result
    is the part that is held. None where it is unknown which.
    """
    atoms = [atom for axis in held for atom in axis]
    order = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].stride))
    lead = x.shape[:start]
    x = x.reshape(*lead, *(atom.size for atom in atoms))
    x = x.transpose(*range(start), *(start + i for i in order))
    part = 1.0
    for i, atom in enumerate(atoms[j] for j in order):
        if atom.flipped:
            x = jnp.flip(x, start + i)
        if atom.whole:
            continue
        whole = weight.shape[atom.axis]
        if atom.start is None or atom.flipped or atom.stride != 1:
            return None
        pads = [(0, 0)] * x.ndim
        pads[start + i] = (atom.start, whole - atom.start - atom.size)
        x, part = jnp.pad(x, pads), part * atom.size / whole
    return x.reshape(*lead, -1), part


def _convolution(
    params: Mapping[str, Any], values: list, weight: Weight, mapped: bool
) -> Use | None:
    numbers = params["dimension_numbers"]
    output, channels, *window = numbers.rhs_spec
    layout = original_layout(weight, (), [*window, channels], [output], shared=mapped)
    if layout is None or params["batch_group_count"] != 1:
        return None
    x, kernel = values
    axes = (channels, *window)
    if not covers(weight, axes, kernel):
        return None
    sizes = [kernel.shape[axis] for axis in axes]
    # [batch, channels * window, ...]: the window's positions vary fastest.
    patches = jax.lax.conv_general_dilated_patches(
        x.transpose(numbers.lhs_spec),
        filter_shape=sizes[1:],
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    groups = params["feature_group_count"]
    patches = patches.reshape(x.shape[numbers.lhs_spec[0]], groups, *sizes, -1)
    patches = jnp.moveaxis(patches, (-1, 1), (1, 2))  # [batch, places, groups, ...]
    rows = _in_order(patches, 3, [weight.axes[axis] for axis in axes], weight)
    if rows is None:
        return None
    stacks = _stacks(weight, layout, ())
    return Use(weight.name, layout, rows[0], 0, False, part=rows[1], **stacks)


def _lookup(params: Mapping[str, Any], values: list, weight: Weight) -> Use | None:
    numbers = params["dimension_numbers"]
    stack = numbers.operand_batching_dims
    rows = numbers.start_index_map
    table, indices = values
    inputs = [a for a in range(table.ndim) if a not in stack and a not in rows]
    whole = all(params["slice_sizes"][a] == table.shape[a] for a in inputs)
    one = len(rows) == 1 and tuple(numbers.collapsed_slice_dims) == tuple(rows)
    layout = original_layout(weight, stack, inputs, rows)
    if layout is None or not (whole and one) or len(weight.axes[rows[0]]) != 1:
        return None
    atom = weight.axes[rows[0]][0]
    if not atom.whole or atom.flipped:
        return None
    if params["mode"] == jax.lax.GatherScatterMode.CLIP:
        indices = jnp.clip(indices, 0, table.shape[rows[0]] - 1)
    lead = numbers.start_indices_batching_dims
    indices = jnp.moveaxis(indices[..., 0], lead, range(len(lead)))
    before = [atom.axis for a in stack for atom in weight.axes[a]]
    stacks = _stacks(weight, layout, before)
    return Use(weight.name, layout, indices, len(lead), lookup=True, **stacks)


def _ragged(params: Mapping[str, Any], values: list, weight: Weight) -> Use | None:
    """Return a product of sorted rows with one slice for each group of them."""
    numbers = params["ragged_dot_dimension_numbers"]
    contracted, batched = numbers.dot_dimension_numbers
    x, value, sizes = values[:3]
    groups, ragged = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    plain = not batched[0] and len(groups) == len(ragged) == 1 and x.ndim == 2
    if not plain or tuple(contracted[0]) != (1,) or len(weight.axes[groups[0]]) != 1:
        return None
    mine = list(contracted[1])
    free = [a for a in range(value.ndim) if a not in (*mine, *groups)]
    if not weight.axes[groups[0]][0].whole or not covers(weight, mine, value):
        return None
    atom = weight.axes[groups[0]][0]
    ends = jnp.cumsum(sizes)
    index = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")
    axes = tuple(() if a == groups[0] else held for a, held in enumerate(weight.axes))
    chosen = (*weight.picked, Picked(atom, index))
    weight = dataclasses.replace(weight, axes=axes, picked=chosen)
    layout = original_layout(weight, (), mine, free)
    rows = _in_order(x, 1, [weight.axes[axis] for axis in mine], weight)
    if layout is None or rows is None:
        return None
    return Use(
        weight.name,
        layout,
        rows[0],
        0,
        False,
        part=rows[1],
        chosen=(atom.size, index),
        ordered=False,
        **_stacks(weight, layout, ()),
    )

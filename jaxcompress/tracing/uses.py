"""The operations that consume a weight: products, convolutions and lookups."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing.movements import (
    hot_index,
    is_rearranging,
    is_slice_gather,
    is_slice_product,
)
from jaxcompress.tracing.provenance import (
    OneHot,
    Picked,
    Scaled,
    Tag,
    Weight,
    covers,
    held_size,
    is_weight,
    original_layout,
)
from jaxcompress.tracing.rows import (
    chosen_slices,
    in_order,
    of_indices,
    row_numbers,
    stack_fields,
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
    `rearranged`: an axis of the weight was gathered by constant indices.
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
    rearranged: bool = False


def uses_of(
    eqn: Any, values: list, tags: Sequence[Tag], *, mapped: bool, experts: set[str]
) -> list[Use]:
    """Return the uses of weights in one operation.

    `mapped`: `vmap` made it. `experts`: names of weights whose gathered slices are
    multiplied, which are stacks or matrices in another order, and no tables.
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
        kept = is_slice_gather(eqn.params, values, tags[0])
        kept = kept or is_rearranging(eqn.params, values, tags)
        if not (kept and tags[0].name in experts):
            uses.append(_lookup(eqn.params, values, tags[0]))
    elif name == "reduce_sum" and isinstance(tags[0], Scaled):
        uses.append(_summed(eqn.params["axes"], values[0].shape, tags[0], mapped))
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


def _product(
    params: Mapping[str, Any],
    value: Any,
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
    if any(map(of_indices, meets.values())):
        # Several slices for each row: it meets each of them.
        for a in [a for a in free if of_indices(weight.axes[a])]:
            x = jnp.broadcast_to(x[..., None], (*x.shape, value.shape[a]))
            meets[x.ndim - 1] = weight.axes[a]
            rows.append(x.ndim - 1)
            free.remove(a)
    if any(of_indices(weight.axes[a]) for a in (*mine, *free, *stack)):
        return None
    if isinstance(other, OneHot):
        return _one_hot(weight, x, stack, mine, free, lead, rows)
    layout = original_layout(weight, stack, mine, free, shared=mapped)
    if layout is None or not covers(weight, mine, value):
        return None
    x = x.transpose(*lead, *rows, *others)
    x = in_order(x, len(lead) + len(rows), [weight.axes[axis] for axis in mine], weight)
    if x is None:
        return None
    x, part = x
    before = [atom.axis for a in stack for atom in weight.axes[a]]
    chosen = chosen_slices(weight, meets, rows)
    stacks = stack_fields(weight, layout, before)
    stacks["rearranged"] = any(
        a.order is not None for axis in weight.axes for a in axis
    )
    return Use(
        weight.name, layout, x, len(lead), False, part=part, chosen=chosen, **stacks
    )


def _summed(
    axes: Sequence[int], shape: Sequence[int], tag: Scaled, mapped: bool
) -> Use | None:
    """Return a product that is written as a sum of the weight times its inputs."""
    weight, x = tag.weight, tag.by
    held = [a for a, atoms in enumerate(weight.axes) if held_size(atoms) > 1]
    mine = [a for a in held if a in axes]
    free = [a for a in held if a not in axes and x.shape[a] == 1]
    batched = [a for a in held if a not in (*mine, *free)]
    kept = [a for a in range(x.ndim) if a not in free]
    if not mine:
        return None
    sizes = [n if a in mine else x.shape[a] for a, n in enumerate(shape)]
    x = jnp.broadcast_to(x, sizes)
    numbers = [
        tuple(tuple(map(side.index, of)) for side in (held, kept))
        for of in (mine, batched)
    ]
    params = {"dimension_numbers": numbers}
    value = jax.ShapeDtypeStruct([shape[a] for a in held], x.dtype)
    weight = dataclasses.replace(weight, axes=tuple(weight.axes[a] for a in held))
    return _product(params, value, x.squeeze(free), weight, 0, None, mapped)


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
    stacks = stack_fields(weight, layout, before)
    return Use(weight.name, layout, hot, len(lead), lookup=True, **stacks)


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
    rows = in_order(patches, 3, [weight.axes[axis] for axis in axes], weight)
    if rows is None:
        return None
    stacks = stack_fields(weight, layout, ())
    return Use(weight.name, layout, rows[0], 0, False, part=rows[1], **stacks)


def _lookup(params: Mapping[str, Any], values: list, weight: Weight) -> Use | None:
    numbers = params["dimension_numbers"]
    stack = numbers.operand_batching_dims
    rows = numbers.start_index_map
    table, indices = values
    inputs = [a for a in range(table.ndim) if a not in stack and a not in rows]
    whole = all(params["slice_sizes"][a] == table.shape[a] for a in inputs)
    one = sorted(numbers.collapsed_slice_dims) == sorted(rows)
    if len(rows) > 1:  # slices that are matrices are no rows of a table
        one = one and sum(table.shape[a] > 1 for a in inputs) == 1
    layout = original_layout(weight, stack, inputs, rows)
    if layout is None or not (whole and one):
        return None
    for axis in rows:
        atoms = weight.axes[axis]
        if len(atoms) != 1 or not atoms[0].whole or atoms[0].flipped:
            return None
    indices = row_numbers(indices, table.shape, rows, weight, params["mode"])
    lead = numbers.start_indices_batching_dims
    indices = jnp.moveaxis(indices, lead, range(len(lead)))
    before = [atom.axis for a in stack for atom in weight.axes[a]]
    stacks = stack_fields(weight, layout, before)
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
    rows = in_order(x, 1, [weight.axes[axis] for axis in mine], weight)
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
        **stack_fields(weight, layout, ()),
    )

"""The operations that consume a weight: products, convolutions and lookups."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing.provenance import Atom, Weight, held_size, original_layout
from jaxcompress.tree.layouts import Layout


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a weight is multiplied or looked up.

    `inputs` are the rows that meet the weight, `[stack, ..., inputs]`, the last axis in
    the order of the matricized weight; the first `stack` axes are stack axes. If
    `lookup`, they are row numbers `[stack, ...]`, and those outside are not read.
    `looped`: the place is inside a loop or a branch, whose values stay inside.
    """

    name: str
    layout: Layout
    inputs: jax.Array
    stack: int
    lookup: bool
    looped: bool = False


def uses_of(eqn: Any, values: list, tags: list) -> list[Use]:
    name = eqn.primitive.name
    found: list[Use | None] = []
    if name == "dot_general" and (tags[0] is None) != (tags[1] is None):
        found.append(_product(eqn.params, values, tags))
    elif name == "conv_general_dilated" and tags[0] is None:
        found.append(_convolution(eqn.params, values, tags[1]))
    elif name == "gather" and tags[0] is not None:
        found.append(_lookup(eqn.params, values, tags[0]))
    return [use for use in found if use is not None]


def _product(params: Mapping[str, Any], values: list, tags: list) -> Use | None:
    side = 0 if tags[0] is not None else 1
    weight, x = tags[side], values[1 - side]
    contracted, batched = params["dimension_numbers"]
    mine, theirs = contracted[side], contracted[1 - side]
    # Along a batched axis on which the weight repeats, it meets further rows.
    pairs = zip(batched[side], batched[1 - side], strict=True)
    stacked = sorted((weight.axes[a], a, b) for a, b in pairs if weight.axes[a])
    stack = [a for _, a, _ in stacked]
    used = {*mine, *batched[side]}
    free = [a for a in range(len(weight.axes)) if a not in used]
    layout = original_layout(weight, stack, mine, free)
    held = [weight.axes[axis] for axis in mine]
    sizes = [values[side].shape[axis] for axis in mine]
    if layout is None or [held_size(atoms) for atoms in held] != sizes:
        return None
    lead = [b for _, _, b in stacked]
    rows = [b for b in range(x.ndim) if b not in lead and b not in theirs]
    x = x.transpose(*lead, *rows, *theirs)
    x = _in_order(x, len(lead) + len(rows), held)
    return Use(weight.name, layout, x, len(lead), lookup=False)


def _in_order(x: jax.Array, start: int, held: Sequence[Sequence[Atom]]) -> jax.Array:
    """Axes from `start` on as one, in the order of the original weight's axes."""
    atoms = [atom for axis in held for atom in axis]
    order = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].stride))
    lead = x.shape[:start]
    x = x.reshape(*lead, *(atom.size for atom in atoms))
    x = x.transpose(*range(start), *(start + i for i in order))
    return x.reshape(*lead, held_size(atoms))


def _convolution(params: Mapping[str, Any], values: list, weight: Any) -> Use | None:
    numbers = params["dimension_numbers"]
    output, channels, *window = numbers.rhs_spec
    layout = original_layout(weight, (), [*window, channels], [output])
    if layout is None or params["batch_group_count"] != 1:
        return None
    x, kernel = values
    held = [weight.axes[axis] for axis in (channels, *window)]
    sizes = [kernel.shape[axis] for axis in (channels, *window)]
    if [held_size(atoms) for atoms in held] != sizes:
        return None
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
    return Use(weight.name, layout, _in_order(patches, 3, held), 0, lookup=False)


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
    if params["mode"] == jax.lax.GatherScatterMode.CLIP:
        indices = jnp.clip(indices, 0, table.shape[rows[0]] - 1)
    lead = numbers.start_indices_batching_dims
    indices = jnp.moveaxis(indices[..., 0], lead, range(len(lead)))
    return Use(weight.name, layout, indices, len(lead), lookup=True)

"""Inputs in the order of the original weight's axes, and which slices they meet."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing.provenance import Atom, Weight, held_size
from jaxcompress.tree.layouts import Layout


def stack_fields(
    weight: Weight, layout: Layout, before: Sequence[int]
) -> dict[str, Any]:
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


def of_indices(atoms: Sequence[Atom]) -> bool:
    """Return whether an axis is one of the indices by which slices were gathered."""
    return any(atom.axis < 0 for atom in atoms)


def chosen_slices(
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


def in_order(
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
        if atom.order is not None:
            x = jnp.moveaxis(x, start + i, -1)
            spread = jnp.zeros((*x.shape[:-1], whole), x.dtype)
            x = jnp.moveaxis(spread.at[..., atom.order].add(x), -1, start + i)
            part *= atom.size / whole
            continue
        if atom.start is None or atom.flipped or atom.stride != 1:
            return None
        pads = [(0, 0)] * x.ndim
        pads[start + i] = (atom.start, whole - atom.start - atom.size)
        x, part = jnp.pad(x, pads), part * atom.size / whole
    return x.reshape(*lead, -1), part


def row_numbers(
    indices: jax.Array, shape: Sequence[int], rows: Sequence[int], weight: Weight, mode
) -> jax.Array:
    """Return the numbers of rows of a table that has several axes of them."""
    sizes = [shape[axis] for axis in rows]
    columns = [indices[..., i] for i in range(len(rows))]
    if mode == jax.lax.GatherScatterMode.CLIP:
        pairs = zip(columns, sizes, strict=True)
        columns = [jnp.clip(index, 0, size - 1) for index, size in pairs]
    if len(rows) == 1:
        return columns[0]
    order = sorted(range(len(rows)), key=lambda i: weight.axes[rows[i]][0].axis)
    number, inside = jnp.zeros_like(columns[0]), columns[0] == columns[0]
    for i in order:
        number = number * sizes[i] + columns[i]
        inside &= (columns[i] >= 0) & (columns[i] < sizes[i])
    return jnp.where(inside, number, math.prod(sizes))

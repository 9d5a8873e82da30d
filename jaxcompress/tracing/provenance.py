"""Tags that follow a weight through a traced program, and know its axes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.tree.layouts import Layout

# Operations on one operand that leave its axes, and for this purpose its values.
SAME = {
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "reduce_precision",
    "sharding_constraint",
    "reshard",
    "pvary",
    "pcast",
}


class Atom(NamedTuple):
    """A stretch of one axis of the original weight: indices `stride * (0 .. size)`."""

    axis: int
    stride: int
    size: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """The tag of a value that is a weight with its axes cast, moved, split or merged.

    `axes` has, for each axis of the value, the atoms it holds, slowest first; none for
    an axis along which the weight repeats. `stack` holds axes sliced off by scans.
    """

    name: str
    shape: tuple[int, ...]  # of the original
    axes: tuple[tuple[Atom, ...], ...]
    stack: tuple[Atom, ...] = ()


def tag(name: str, shape: Sequence[int]) -> Weight:
    """The tag of an untouched weight."""
    axes = tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape))
    return Weight(name, tuple(shape), axes)


def sliced(weight: Weight | None) -> Weight | None:
    """The tag of one slice along axis 0."""
    if weight is None or len(weight.axes[0]) != 1:
        return None
    stack = weight.stack + weight.axes[0]
    return dataclasses.replace(weight, axes=weight.axes[1:], stack=stack)


def moved(eqn: Any, weight: Weight | None, result: jax.Array) -> Weight | None:
    """The tag of an operation's result, None where it is no longer the weight."""
    name, params = eqn.primitive.name, eqn.params
    if weight is None:
        return None
    if name in SAME:
        return weight if jnp.issubdtype(result.dtype, jnp.floating) else None
    if name == "transpose":
        axes = tuple(weight.axes[axis] for axis in params["permutation"])
    elif name == "squeeze":
        dropped = params["dimensions"]
        axes = tuple(a for i, a in enumerate(weight.axes) if i not in dropped)
    elif name == "broadcast_in_dim":
        spread: list[tuple[Atom, ...]] = [()] * len(result.shape)
        for atoms, axis in zip(
            weight.axes, params["broadcast_dimensions"], strict=True
        ):
            spread[axis] = atoms if held_size(atoms) == result.shape[axis] else ()
        axes = tuple(spread)
    elif name == "reshape" and params.get("dimensions") is None:
        axes = _reshaped(weight, result.shape)
    else:
        return None
    return None if axes is None else dataclasses.replace(weight, axes=axes)


def held_size(atoms: Sequence[Atom]) -> int:
    return math.prod(atom.size for atom in atoms)


def _reshaped(weight: Weight, shape: Sequence[int]) -> tuple | None:
    """What the axes hold after a reshape; None where it cuts across an axis."""
    left = [atom for atoms in weight.axes for atom in atoms if atom.size > 1]
    if held_size(left) != math.prod(shape):
        return None  # repeated along some axis
    axes = []
    for size in shape:
        held: list[Atom] = []
        while (missing := size // held_size(held)) > 1:
            atom = left.pop(0)
            inner, rest = divmod(atom.size, missing)
            if atom.size > missing:
                if rest:
                    return None
                left.insert(0, Atom(atom.axis, atom.stride, inner))
                atom = Atom(atom.axis, atom.stride * inner, missing)
            elif missing % atom.size:
                return None
            held.append(atom)
        axes.append(tuple(held))
    return tuple(axes)


def original_layout(
    weight: Weight, stack: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]
) -> Layout | None:
    """The original axes of those of a value; None where one has two roles."""
    role: dict[int, str] = {}
    order = [atom.axis for atom in weight.stack]
    role.update(dict.fromkeys(order, "stack"))
    for name, axes in (("stack", stack), ("inputs", inputs), ("outputs", outputs)):
        for axis in axes:
            for atom in weight.axes[axis]:
                if name == "stack" and atom.axis not in role:
                    order.append(atom.axis)
                if role.setdefault(atom.axis, name) != name:
                    return None
    for axis in reversed(range(len(weight.shape))):  # of size 1, lost in a reshape
        if axis not in role:
            role[axis] = role.get(axis + 1, "inputs")
            order += [axis] * (role[axis] == "stack")
    named = {n: tuple(a for a in sorted(role) if role[a] == n) for n in role.values()}
    if "inputs" not in named or "outputs" not in named:
        return None
    return Layout(tuple(order), named["inputs"], named["outputs"])

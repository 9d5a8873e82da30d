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
    """Indices `start + stride * (0 .. size)` of one axis of the original weight.

    `whole`: the atoms of the axis cover all of it. A part whose start is unknown
    (sharded, or sliced at a computed place) has `start` None. `flipped`: backwards.
    `order`: constant indices that took the place of all others, of a gather.
    A negative axis `-1 - i` is axis i of the indices by which slices were gathered.
    """

    axis: int
    stride: int
    size: int
    start: int | None = 0
    whole: bool = True
    flipped: bool = False
    order: Any = None


class Picked(NamedTuple):
    """One slice of the weight along the axis of `atom`: `index` is a scalar.

    An array of indices where slices were gathered, one for each row of the inputs.
    """

    atom: Atom
    index: Any


@dataclasses.dataclass(frozen=True)
class Weight:
    """The tag of a value that is a weight with its axes cast, moved, split or merged.

    `axes` has, for each axis of the value, the atoms it holds, slowest first; none for
    an axis along which the weight repeats. `stack` holds axes sliced off by scans,
    `picked` those of which one slice was taken. `mapped` are original axes along which
    a lifted transform maps its module.
    """

    name: str
    shape: tuple[int, ...]  # of the original
    axes: tuple[tuple[Atom, ...], ...]
    stack: tuple[Atom, ...] = ()
    picked: tuple[Picked, ...] = ()
    mapped: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Joined:
    """The tag of weights side by side along `axis`; None: of their sum.

    `parts` have a tag (None: no weight), and the first index and size along the axis.
    """

    axis: int | None
    parts: tuple[tuple[Weight | None, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The tag of a weight times a value `by` of the batch, before it is summed.

    `by` has as many axes, of size 1 where it repeats.
    """

    weight: Weight
    by: Any


@dataclasses.dataclass(frozen=True)
class Constant:
    """The tag of a value that follows from weights and constants alone."""


@dataclasses.dataclass(frozen=True)
class OneHot:
    """The tag of integers compared with constants, as `jax.nn.one_hot` makes them."""


CONSTANT, ONE_HOT = Constant(), OneHot()
# None: depends on the batch.
Tag = Weight | Joined | Scaled | Constant | OneHot | None


def is_weight(tag: Tag) -> bool:
    return isinstance(tag, Weight | Joined)


def is_followed(tag: Tag) -> bool:
    return isinstance(tag, Weight | Joined | Scaled)


def tag(name: str, shape: Sequence[int], mapped: Sequence[int] = ()) -> Weight:
    """Return the tag of an untouched weight."""
    axes = tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape))
    return Weight(name, tuple(shape), axes, mapped=tuple(mapped))


def sliced(tag: Tag) -> Tag:
    """Return the tag of one slice along axis 0."""
    if isinstance(tag, Joined):
        if not tag.axis:
            return None
        parts = tuple((sliced(t), start, size) for t, start, size in tag.parts)
        return Joined(tag.axis - 1, parts)
    if not isinstance(tag, Weight):
        return None if isinstance(tag, Scaled) else tag
    if len(tag.axes[0]) != 1:
        return None
    stack = tag.stack + tag.axes[0]
    return dataclasses.replace(tag, axes=tag.axes[1:], stack=stack)


def held_size(atoms: Sequence[Atom]) -> int:
    return math.prod(atom.size for atom in atoms)


def reshaped(weight: Weight, shape: Sequence[int]) -> tuple | None:
    """Return what the axes hold after a reshape; None where it cuts across an axis."""
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
                if not atom.whole or atom.flipped:
                    atom = atom._replace(start=None, order=None)
                left.insert(0, atom._replace(size=inner))
                atom = atom._replace(stride=atom.stride * inner, size=missing)
            elif missing % atom.size:
                return None
            held.append(atom)
        axes.append(tuple(held))
    return tuple(axes)


def part(atoms: Sequence[Atom], start: int | None, size: int) -> tuple | None:
    """Return what an axis holds after a slice; None where the slice cuts across
    atoms.
    """
    atoms = [atom for atom in atoms if atom.size > 1]
    if size == held_size(atoms):
        return tuple(atoms)
    if not atoms:
        return None
    first, inner = atoms[0], held_size(atoms[1:])
    if size % inner or (start or 0) % inner:
        return None
    starts_known = start is not None and first.start is not None and not first.flipped
    place = first.start + first.stride * (start // inner) if starts_known else None
    kept = first._replace(size=size // inner, start=place, whole=False, order=None)
    return (kept, *atoms[1:])


def original_layout(
    weight: Weight,
    stack: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    *,
    shared: bool = False,
) -> Layout | None:
    """Return the original axes of those of a value; None where one has two roles.

    `shared`: the product was mapped over slices of the weight with one input for all,
    so that the axes of outputs before the inputs' are stack axes.
    """
    role: dict[int, str] = {}
    order = [atom.axis for atom in weight.stack]
    chosen = sorted(weight.picked, key=lambda picked: jnp.ndim(picked.index))
    order += [picked.atom.axis for picked in chosen]
    if len(set(order)) < len(order):
        return None  # layers in groups, sliced twice along one axis
    role.update(dict.fromkeys(order, "stack"))
    batched: list[int] = []
    for name, axes in (("stack", stack), ("inputs", inputs), ("outputs", outputs)):
        for axis in axes:
            for atom in weight.axes[axis]:
                if name == "stack" and atom.axis not in role:
                    batched.append(atom.axis)
                if role.setdefault(atom.axis, name) != name:
                    return None
    for axis in reversed(range(len(weight.shape))):  # of size 1, lost in a reshape
        if axis not in role:
            role[axis] = role.get(axis + 1, "inputs")
            if role[axis] == "stack":
                order.append(axis)
    named = {n: tuple(a for a in sorted(role) if role[a] == n) for n in role.values()}
    if "inputs" not in named or "outputs" not in named:
        return None
    ahead = [
        a
        for a in named["outputs"]
        if a in weight.mapped or (shared and a < named["inputs"][0])
    ]
    if len(ahead) < len(named["outputs"]):
        order += ahead
        named["outputs"] = tuple(a for a in named["outputs"] if a not in ahead)
    return Layout((*order, *batched), named["inputs"], named["outputs"])


def covers(weight: Weight, axes: Sequence[int], value: jax.Array) -> bool:
    """Return whether these axes of a value hold nothing but what their atoms say."""
    sizes = [value.shape[axis] for axis in axes]
    return [held_size(weight.axes[axis]) for axis in axes] == sizes

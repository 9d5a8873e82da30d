"""Shardings of compressed weights, derived from those of the dense ones."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcompress.coding.packing import Packed, field_widths
from jaxcompress.factorization.low_rank import LowRank
from jaxcompress.quantization.awq import Scaled
from jaxcompress.quantization.grids import Quantized
from jaxcompress.tree.generic_leaves import Reshaped, Sum
from jaxcompress.tree.layouts import leaf_layout
from jaxcompress.tree.leaf import Leaf, is_box, is_leaf
from jaxcompress.tree.paths import join, key_name
from jaxcompress.types import Params

Axes = tuple[Any, ...]  # mesh axes (a name, several, or None) of each array axis


def shardings(small: Params, mesh: Mesh, specs: Any) -> Params:
    """Derive how the arrays of compressed weights are laid over devices.

    Codes, scales and factors of a weight are cut where the dense weight would be, so
    that an unmodified model runs under `jit` in data and tensor parallel.

        placed = jax.device_put(small, jc.shardings(small, mesh, specs))

    Args:
      small: a tree of arrays and leaves.
      mesh: with axes of type `AxisType.Auto`.
      specs: a tree of `PartitionSpec` of the dense weights; weights that it lacks, or
        has None for, are copied to each device. `flax.linen.get_partition_spec` gives
        it for models with partitioning metadata, of `small` too.

    Returns:
      The tree with a `NamedSharding` for each array, for `jax.device_put` or `jit`.

    Raises:
      ValueError: a cut would split a block of inputs that share a scale, through
        packed bytes, or is uneven; a leaf type that cannot be cut; a spec of no weight.
        Names the leaf, and where it would be cut.

    Example:
      >>> kernel = {"kernel": jax.sharding.PartitionSpec(None, "data")}
      >>> specs = {"layer_0": {"mlp": {"up_proj": kernel}}}
      >>> placed = jax.device_put(small, jc.shardings(small, mesh, specs))
    """
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec)  # noqa: E731
    flat, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    wanted = {_name(path): spec for path, spec in flat}

    def place(path: Any, x: Any) -> Any:
        if is_box(x):  # Flax's, around a weight of this name
            return x.replace_boxed(place(path, x.value))
        name = _name(path)
        spec = wanted.pop(name, None)
        axes = tuple(spec or ())
        if len(axes) > x.ndim:
            raise ValueError(f"{name}: {spec} for a weight of shape {x.shape}")
        axes += (None,) * (x.ndim - len(axes))
        return _place(x, axes, mesh, name)

    outer = lambda x: is_leaf(x) or is_box(x)  # noqa: E731
    placed = jax.tree_util.tree_map_with_path(place, small, is_leaf=outer)
    if wanted:
        raise ValueError(
            f"specs for no weight of the tree: {', '.join(sorted(wanted)[:4])}; they "
            "have the structure of the dense parameters"
        )
    return placed


def _place(x: Any, axes: Axes, mesh: Mesh, name: str) -> Any:
    """Return `x` with shardings for its arrays; `axes` are of the dense weight."""
    if x is None:
        return None
    if not isinstance(x, Leaf):
        return _array(x, axes, mesh, name)
    if not any(axes):
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda _: everywhere, x)
    if isinstance(x, Reshaped):
        return dataclasses.replace(
            x, inner=_place(x.inner, _matrix_axes(x, axes, name), mesh, name)
        )
    *stack, inputs, outputs = axes
    parts: dict[str, Any] = {}
    if isinstance(x, Quantized):
        parts = {"codes": axes} | {
            field: (*stack, inputs, outputs)
            for field in ("scale", "zero_point", "negative_scale")
        }
        _check_blocks(x, inputs, mesh, name)
    elif isinstance(x, Packed):
        _check_bytes(x, axes[x.axis], mesh, name)
        parts = {"packed": axes}
    elif isinstance(x, LowRank):
        parts = {"left": (*stack, inputs, None), "right": (*stack, None, outputs)}
    elif isinstance(x, Scaled):
        parts = {"weight": axes, "factors": (*stack, inputs)}
    elif isinstance(x, Sum):
        terms = tuple(_place(term, axes, mesh, name) for term in x.terms)
        return dataclasses.replace(x, terms=terms)
    else:
        raise ValueError(
            f"{name}: a {type(x).__name__} cannot be cut along {PartitionSpec(*axes)}; "
            "leave its spec out, so that each device holds all of it, or store it "
            "otherwise (running.decode_once decodes entropy-coded arrays)"
        )
    placed = {}
    for field, part in parts.items():
        inner = getattr(x, field)
        placed[field] = _place(inner, _where_wide(inner, part), mesh, name)
    return dataclasses.replace(x, **placed)


def _where_wide(x: Any, axes: Axes) -> Axes:
    """Return the axes without those along which one number serves all."""
    if x is None:
        return axes
    return tuple(None if n == 1 else a for n, a in zip(x.shape, axes, strict=True))


def _array(x: Any, axes: Axes, mesh: Mesh, name: str) -> NamedSharding:
    for size, axis in zip(x.shape, axes, strict=True):
        count = _count(axis, mesh)
        if size % count:
            raise ValueError(
                f"{name}: an array {x.shape} of it is not cut evenly into {count} "
                f"along {axis!r}; choose another axis or mesh"
            )
    return NamedSharding(mesh, PartitionSpec(*axes))


def _count(axis: Any, mesh: Mesh) -> int:
    """Return the number of parts that mesh axes cut into."""
    count = 1
    for each in axis if isinstance(axis, tuple) else (axis,):
        count *= 1 if each is None else mesh.shape[each]
    return count


def _check_blocks(x: Quantized, inputs: Any, mesh: Mesh, name: str) -> None:
    count, blocks = _count(inputs, mesh), x.scale.shape[-2]
    if count == 1 or blocks == 1:
        return
    each = x.shape[-2] / count
    if each % x.block:
        raise ValueError(
            f"{name}: {x.shape[-2]} inputs over {count} devices are cut after input "
            f"{each:g}, inside a block of {x.block} that shares a scale; compress it "
            "with a block that divides this, or cut its outputs"
        )


def _check_bytes(x: Packed, axis: Any, mesh: Mesh, name: str) -> None:
    count, widths = _count(axis, mesh), field_widths(x.bits)
    if count == 1:
        return
    together = 8 // widths[0] if widths[0] < 8 else 1
    if len(widths) > 1 or x.length % (count * together):
        raise ValueError(
            f"{name}: {x.length} codes of {x.bits} bits over {count} devices would be "
            "cut inside packed bytes; cut the other axis, or use 1, 2, 4 or 8 bits and "
            f"a multiple of {count * together} codes"
        )


def _matrix_axes(x: Reshaped, axes: Axes, name: str) -> Axes:
    """Return the axes of the matrix `[..., inputs, outputs]` that a weight holds."""
    layout = leaf_layout(x)
    used = [a % x.ndim for a in (*layout.inputs, *layout.outputs)]
    stack = [axes[i] for i in range(x.ndim) if i not in used]
    folded = []
    for group in (layout.inputs, layout.outputs):
        first, *rest = (axes[a] for a in group)
        if any(rest):
            raise ValueError(
                f"{name}: {PartitionSpec(*axes)} cuts an axis that is stored folded "
                f"into another; of the axes {group}, cut the first"
            )
        folded.append(first)
    return (*stack, *folded)


def _name(path: Any) -> str:
    name = ""
    for step in path:
        name = join(name, key_name(step))
    return name

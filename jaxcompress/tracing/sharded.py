"""Reading what a model does inside `shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxcompress.tracing.jaxpr_compat import closed_of
from jaxcompress.tracing.provenance import Scaled, Tag, Weight


def run_sharded(
    run: Callable[..., tuple], eqn: Any, values: list, tags: Sequence[Tag]
) -> tuple[list, list[Tag], dict]:
    """Return results, their tags, and sums over all devices of a program inside
    `shard_map`.

    Averages are exact; counts are multiplied by the devices that hold equal rows. A
    weight whose inputs are sharded has a layout, and no sums.
    """
    params, inner = eqn.params, closed_of(eqn.params["jaxpr"])
    mesh, specs = params["mesh"], tuple(params["in_specs"])
    manual = params.get("manual_axes", params.get("newly_manual_axes"))
    axes = tuple(mesh.axis_names) if manual is None else tuple(manual)
    below = [_local(t, spec, mesh) for t, spec in zip(tags, specs, strict=True)]

    def body(*values: Any) -> tuple[tuple, dict]:
        results, _, sums = run(inner, list(values), below)
        return tuple(results), jax.lax.psum(sums, axes)

    results, sums = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=specs,
        out_specs=(tuple(params["out_specs"]), PartitionSpec()),
        axis_names=set(axes),
        check_vma=False,
    )(*values)
    return list(results), [None] * len(results), sums


def _local(tag: Tag, spec: PartitionSpec, mesh: Any) -> Tag:
    """Return the tag of the part of a weight that one device holds."""
    if not isinstance(tag, Weight):
        return None if any(spec) or isinstance(tag, Scaled) else tag
    axes = list(tag.axes)
    for axis, names in enumerate(spec):
        names = () if names is None else names if isinstance(names, tuple) else (names,)
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        if parts == 1 or not axes[axis]:
            continue
        first, *rest = axes[axis]
        if first.size % parts:
            return None
        local = first._replace(size=first.size // parts, start=None, whole=False)
        axes[axis] = (local, *rest)
    return Weight(tag.name, tag.shape, tuple(axes), tag.stack, tag.picked)

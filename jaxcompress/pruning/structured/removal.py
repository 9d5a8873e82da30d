"""Neurons, heads, filters and layers leave a model, whose arrays really shrink."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import damped, float64
from jaxcompress.calibration.moments import Moments
from jaxcompress.pruning.structured.groups import (
    Groups,
    Place,
    check_keep,
    find_places,
    named_groups,
)
from jaxcompress.pruning.structured.readers import (
    DAMPING,
    beside,
    bias_of,
    dense_arrays,
    find_reader,
    statistic,
)
from jaxcompress.tree.layouts import Layout, matricize
from jaxcompress.tree.leaf import is_leaf
from jaxcompress.tree.paths import is_float
from jaxcompress.types import Params


def remove_units(
    params: Params,
    groups: Groups,
    indices: Any,
    moments: Mapping[str, Moments] | None = None,
    *,
    layouts: Mapping[str, Layout] | None = None,
    damping: float = DAMPING,
) -> Params:
    """Remove all but the units `indices` of each group; arrays become smaller.

    With moments, kernels that read a group's units compensate for removed ones: the
    rows that stay become the least-squares fit of the layer's old output, and so does
    its bias (the leaf next to the kernel) where it has one. The model must be made anew
    with the new sizes.

    Args:
      params: dense arrays; compress afterwards. Anything that is a tree with names: for
        a network with batch norm the variables, so that its statistics shrink too.
      groups: a group, `[(pattern, axis), ...]` or `Group`, or a mapping of names to
        groups.
      indices: sorted indices of the units that stay, or a mapping of names of groups to
        such (`choose_units`); a group that is not in it stays whole.
      moments: of the inputs of the kernels that read the units, by kernel name, from
        `collect_moments` on the same parameters; None: nothing is compensated.
      layouts: `Layout` by name; by default the moments'.
      damping: added to the diagonal of the second moment of the units that stay, as a
        fraction of its mean; the fit is drawn to the weights as they were.

    Returns:
      A tree like `params`. Arrays in no group are the same objects.

    Raises:
      ValueError: leaves of a group whose dimensions disagree (both are named), units
        out of range, a compressed leaf, moments that are missing or do not fit.

    Example:
      >>> pattern = "layer_0/mlp/(gate|up)_proj/kernel"
      >>> neurons = [(pattern, 1), ("layer_0/mlp/down_proj/kernel", 0)]
      >>> smaller = jc.structured.remove_units(params, neurons, jnp.arange(48))

    Source: Frantar and Alistarh 2022, "Optimal brain compression" (arXiv 2208.11580),
    for groups; the bias as in An et al. 2023, "FLAP" (arXiv 2312.11983).
    """
    checks.fraction("remove_units", "damping", damping)
    arrays = dense_arrays(params)
    layouts, kernel_moments = layouts or {}, None if moments is None else dict(moments)
    named = named_groups(groups)
    indices = indices if isinstance(groups, Mapping) else {"": indices}
    if not isinstance(indices, Mapping):
        raise TypeError(
            "groups are a mapping, so indices must be one too, of names of groups to "
            f"sorted indices, not a {type(indices).__name__}"
        )
    if unknown := sorted(set(indices) - set(named)):
        raise ValueError(f"indices name {unknown}, and the groups are {sorted(named)}")
    shapes = {name: x.shape for name, x in arrays.items()}
    plan, owner = [], {}
    for label in indices:
        places = find_places(shapes, named[label], label)
        for place in places:
            first = owner.setdefault((place.name, place.axis), label)
            if first != label:
                raise ValueError(
                    f"groups {first!r} and {label!r} both hold axis {place.axis} of "
                    f"{place.name}; merge them"
                )
        plan.append((places, check_keep(indices[label], places[0].units, label)))
    made_up = 0
    for places, kept in plan:
        done = set()
        for place in places if kernel_moments is not None else ():
            if _make_up(arrays, place, kept, kernel_moments, layouts, damping):
                done.add(place)
        made_up += len(done)
        for place in places:
            if place not in done:
                x = jnp.asarray(arrays[place.name])
                index = place.indices(kept)
                arrays[place.name] = jnp.take(x, index, axis=place.axis)
    if kernel_moments is not None and plan and not made_up:
        raise ValueError(
            "no kernel of these groups reads their units, so there is nothing that "
            "moments could compensate; leave them out, or list the reading kernels "
            "with their input axis"
        )
    treedef = jax.tree.structure(params, is_leaf=is_leaf)
    return jax.tree.unflatten(treedef, list(arrays.values()))


def _make_up(
    arrays: dict[str, Any],
    place: Place,
    kept: np.ndarray,
    moments: dict[str, Moments],
    layout: Mapping[str, Layout],
    damping: float,
) -> bool:
    """Shrink a kernel that reads the units and compensate in its rows; return whether
    it was one.
    """
    name = place.name
    reader = find_reader(place, {name: arrays[name].shape}, layout, moments)
    if reader is None:
        return False
    if name not in moments:
        raise ValueError(
            f"{name} reads removed units, and has no moments; collect them with the "
            "same model and parameters, and name it in where="
        )
    x, kind = jnp.asarray(arrays[name]), reader.layout
    if not is_float(x):
        raise TypeError(
            f"{name}: remove_units fits floating-point kernels, not {x.dtype}"
        )
    matrix = matricize(x, kind)
    bias = bias_of(arrays, name, matrix)
    second = statistic(moments[name], matrix, name, "remove_units", bias)
    index = np.sort(reader.table[kept].ravel())
    gone = np.setdiff1d(np.arange(len(matrix), dtype=np.int32), index)
    with float64(True):
        fitted = _least_squares(matrix, second, index, gone, damping=damping)
    if bias is not None:
        mean = moments[name].mean.astype(jnp.float32)
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        constant = product(mean, matrix.astype(jnp.float32))
        constant = constant - product(mean[index], fitted)
        moved = bias.astype(jnp.float32) + constant.reshape(bias.shape)
        arrays[beside(name)] = moved.astype(bias.dtype)
    shape = list(x.shape)
    shape[place.axis] = len(place.indices(kept))
    order = kind.inputs + kind.outputs
    fitted = fitted.astype(x.dtype).reshape([shape[axis] for axis in order])
    arrays[name] = fitted.transpose(np.argsort(order))
    moments[name] = Moments(
        moments[name].count,
        None if moments[name].mean is None else moments[name].mean[index],
        moments[name].second[index][:, index],
        layout=moments[name].layout,
    )
    return True


@functools.partial(jax.jit, static_argnames=("damping",))
def _least_squares(
    x: jax.Array, second: jax.Array, kept: Any, gone: Any, *, damping: float
) -> jax.Array:
    """Return rows `[kept, outputs]`, float32, that give the output of all best; in
    float64.
    """
    wide, rows = second.astype(jnp.float64), x.astype(jnp.float64)
    normal = damped(wide[kept][:, kept], damping)
    pull = wide[kept][:, gone] @ rows[gone]
    factor = jax.scipy.linalg.cho_factor(normal)
    moved = rows[kept] + jax.scipy.linalg.cho_solve(factor, pull)
    return moved.astype(jnp.float32)

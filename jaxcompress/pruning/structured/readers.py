"""Kernels that read a group's units: on which inputs, with what moments and bias."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.calibration.moments import Moments, require
from jaxcompress.pruning.structured.groups import Place
from jaxcompress.tree.layouts import Layout, choose_layout
from jaxcompress.tree.leaf import Leaf
from jaxcompress.tree.paths import KERNEL, roots
from jaxcompress.types import Params

DAMPING = 1e-3


class Reader(NamedTuple):
    """A kernel that reads the units of a group: which of its inputs each unit owns."""

    name: str
    layout: Layout
    table: np.ndarray  # int32 [units, inputs of one unit]


def find_reader(
    place: Place,
    shapes: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, Layout],
    moments: Mapping[str, Moments],
) -> Reader | None:
    """Return the kernel of a place if the group is on its inputs, else None."""
    name, shape = place.name, shapes[place.name]
    if name.rsplit("/", 1)[-1] != KERNEL or len(shape) < 2:
        return None
    kind = choose_layout(name, shape, layouts.get(name), moments.get(name))
    if place.axis not in kind.inputs:
        return None
    if kind.stack:
        raise ValueError(
            f"{name}: stacked layers keep different units; take them apart first "
            "(models.unstack_layers), or leave the moments out"
        )
    sizes = [shape[axis] for axis in kind.inputs]
    at = kind.inputs.index(place.axis)
    numbers = np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)
    numbers = np.moveaxis(numbers, at, 0)[place.table]
    return Reader(name, kind, numbers.reshape(place.units, -1))


def dense_arrays(params: Params) -> dict[str, Any]:
    arrays = dict(roots(params))
    for name, x in arrays.items():
        if isinstance(x, Leaf):
            raise ValueError(
                f"{name} is a {type(x).__name__}; remove units from dense parameters "
                "(materialize(params)) and compress afterwards"
            )
    return arrays


def beside(name: str) -> str:
    """Return the name of the bias next to a kernel."""
    return name.removesuffix(KERNEL) + "bias"


def bias_of(arrays: Mapping[str, Any], name: str, matrix: jax.Array) -> Any:
    """Return the bias next to a kernel `[inputs, outputs]`, or None."""
    bias = arrays.get(beside(name))
    return bias if bias is not None and bias.size == matrix.shape[-1] else None


def statistic(
    kernel_moments: Moments, matrix: jax.Array, name: str, method: str, bias: Any
) -> jax.Array:
    """Return second moment of a kernel's inputs; about their mean where a bias carries
    it.
    """
    fields = ("second",) if bias is None else ("second", "mean")
    checked = require(kernel_moments, matrix, f"{name}: {method}", fields=fields)
    return checked.second if bias is None else checked.covariance

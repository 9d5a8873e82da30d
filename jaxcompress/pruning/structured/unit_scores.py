"""Scores of units by what they contribute to the kernels that read them."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import damped, float64
from jaxcompress.calibration.moments import Moments
from jaxcompress.pruning.structured.groups import (
    Group,
    Groups,
    find_places,
    named_groups,
)
from jaxcompress.pruning.structured.readers import (
    DAMPING,
    bias_of,
    dense_arrays,
    find_reader,
    statistic,
)
from jaxcompress.tree.layouts import Layout, matricize
from jaxcompress.types import Params


def score_units(
    moments: Mapping[str, Moments],
    groups: Groups,
    *,
    params: Params | None = None,
    layouts: Mapping[str, Layout] | None = None,
    by: Literal["auto", "activation", "loss"] = "auto",
    damping: float = DAMPING,
) -> Any:
    """Score what each unit of a group contributes to the kernels that read it.

    These are the group's kernels that have it as input axis (`down_proj`, `o_proj`,
    the next convolution), as far as they have moments.

    Args:
      moments: of the inputs, by kernel name, from `collect_moments`.
      groups: a group, `[(pattern, axis), ...]` or `Group`, or a mapping of names to
        groups.
      params: the tree; needed for kernels of more than two axes and for "loss".
      layouts: `Layout` by name; by default the moments'.
      by: "activation": root mean square of what the unit sends, over that of the mean
        unit of its group. "loss": units are taken out one by one, each time the one
        that costs least while all other inputs, and the bias, compensate; a unit's
        score is the share of the readers' output (of its expected square) that is lost
        by then, 1 for the last. `units * inputs**2` operations and more. "auto": by
        loss where `params` are given, else by activation. By loss costs a model less
        once the readers compensate for removed ones, several times less for heads
        (`experiments/pruning`).
      damping: added to the diagonal of the second moment, as a fraction of its mean.

    Returns:
      `[units]`, float32, or a dict of such where `groups` is a mapping; larger for
      units that matter more. Of groups that are not alike, "loss" compares better.

    Raises:
      ValueError: no moments of any kernel that reads the group, moments of other
        shapes, options out of range, groups that disagree with the parameters.

    Example:
      >>> pattern = "layer_0/mlp/(gate|up)_proj/kernel"
      >>> neurons = [(pattern, 1), ("layer_0/mlp/down_proj/kernel", 0)]
      >>> jc.structured.score_units(moments, neurons).shape
      (64,)

    Source: Kurtic et al. 2023, "ZipLM" (arXiv 2302.04089, section 3), the structured
    optimal brain surgeon; Muralidharan et al. 2024, "Compact language models via
    pruning and knowledge distillation" (arXiv 2407.14679, section 2), activations.
    """
    if by not in ("auto", "activation", "loss"):
        raise ValueError(
            f"score_units takes by='auto', 'activation' or 'loss', not {by!r}"
        )
    if by == "auto":
        by = "activation" if params is None else "loss"
    if by == "loss" and params is None:
        raise ValueError("score_units by='loss' looks at weights; pass params=params")
    checks.fraction("score_units", "damping", damping)
    arrays = None if params is None else dense_arrays(params)
    layouts = layouts or {}
    named = named_groups(groups)
    scores = {}
    for label, group in named.items():
        if arrays is None:
            shapes, group = _readers_only(moments, group)
        else:
            shapes = {name: x.shape for name, x in arrays.items()}
        places = find_places(shapes, group, label) if group.members else []
        readers = [
            reader
            for place in places
            if (reader := find_reader(place, shapes, layouts, moments))
            and reader.name in moments
        ]
        if not readers:
            raise ValueError(
                f"no kernel that reads the units of group {label!r} has moments; "
                "collect them with the same model and parameters, and name it in "
                "where=; kernels of more than two axes need params and layouts too"
            )
        seconds, matrices = [], []
        for reader in readers:
            kernel_moments = moments[reader.name]
            second = kernel_moments.second
            if arrays is not None:
                matrix = matricize(arrays[reader.name], reader.layout)
                bias = bias_of(arrays, reader.name, matrix)
                second = statistic(
                    kernel_moments, matrix, reader.name, "score_units", bias
                )
                matrices.append(matrix)
            # What is sent counts whole, even where a bias could carry its mean.
            seconds.append(second if by == "loss" else kernel_moments.second)
        tables = [reader.table for reader in readers]
        if by == "loss":
            with float64(True):
                scores[label] = _losses(matrices, seconds, tables, damping=damping)
        else:
            scores[label] = _activations(seconds, tables)
    return scores if isinstance(groups, Mapping) else scores[""]


def _readers_only(
    moments: Mapping[str, Moments], group: Group
) -> tuple[dict[str, tuple[int, ...]], Group]:
    """Return shapes of kernels of two axes, as moments tell; the group's members on
    inputs.
    """
    shapes = {
        name: (kernel_moments.second.shape[-1], 1)  # outputs are not looked at
        for name, kernel_moments in moments.items()
        if kernel_moments.second is not None and kernel_moments.second.ndim == 2
    }
    members = [
        (pattern, axis, *rest)
        for pattern, axis, *rest in group.members
        if axis in (0, -2) and any(re.fullmatch(pattern, name) for name in shapes)
    ]
    return shapes, dataclasses.replace(group, members=tuple(members))


@jax.jit
def _activations(seconds: list[jax.Array], tables: list[Any]) -> jax.Array:
    """Return root mean square of what each unit sends, over that of the mean unit."""
    square = sum(
        jnp.sum(jnp.diagonal(second).astype(jnp.float32)[table], axis=-1)
        for second, table in zip(seconds, tables, strict=True)
    )
    square = jnp.maximum(square, 0)
    mean = jnp.mean(square)
    return jnp.sqrt(square / jnp.where(mean > 0, mean, 1))  # all units silent


@functools.partial(jax.jit, static_argnames=("damping",))
def _losses(
    matrices: list[jax.Array],
    seconds: list[jax.Array],
    tables: list[Any],
    *,
    damping: float,
) -> jax.Array:
    """Take out the unit that costs least until none is left; `[units]`, float32.

    The score of a unit is the error of the readers' outputs once it is removed too, as
    a share of their energy. To be called in float64.
    """
    energy, inverses, weights = 0.0, [], []
    for x, second in zip(matrices, seconds, strict=True):
        wide = second.astype(jnp.float64)
        # What is always zero scores zero, whatever `damped` puts in its place.
        live = (jnp.diagonal(wide) > 0)[:, None]
        rows = jnp.where(live, x.astype(jnp.float64), 0)
        wide = damped(wide, damping)
        factor = jax.scipy.linalg.cho_factor(wide)
        eye = jnp.eye(len(wide), dtype=jnp.float64)
        inverses.append(jax.scipy.linalg.cho_solve(factor, eye))
        weights.append(rows)
        energy += jnp.sum(rows * (wide @ rows))
    tables = [jnp.asarray(table) for table in tables]

    def take_out(_: Any, state: tuple) -> tuple:
        inverses, weights, present, spent, scores = state
        costs = sum(
            _costs(*reader, present)
            for reader in zip(inverses, weights, tables, strict=True)
        )
        unit = jnp.argmin(jnp.where(present, costs, jnp.inf))
        spent = spent + jnp.maximum(costs[unit], 0)
        after = [
            _without(inverse, rows, table[unit])
            for inverse, rows, table in zip(inverses, weights, tables, strict=True)
        ]
        inverses, weights = ([pair[i] for pair in after] for i in (0, 1))
        present, scores = present.at[unit].set(False), scores.at[unit].set(spent)
        return inverses, weights, present, spent, scores

    count = len(tables[0])
    start = (inverses, weights, jnp.ones(count, bool), jnp.float64(0))
    start += (jnp.zeros(count, jnp.float64),)
    scores = jax.lax.fori_loop(0, count, take_out, start)[-1]
    return (scores / jnp.where(energy > 0, energy, 1)).astype(jnp.float32)


def _costs(
    inverse: jax.Array, rows: jax.Array, table: jax.Array, present: jax.Array
) -> jax.Array:
    """Compute the cost of removing each unit next, `[units]`; 0 where it is removed
    already.
    """
    if table.shape[-1] == 1:
        diagonal = jnp.where(present, jnp.diagonal(inverse)[table[:, 0]], 1)
        costs = jnp.sum(rows[table[:, 0]] ** 2, axis=-1) / diagonal
    else:
        blocks = inverse[table[:, :, None], table[:, None, :]]
        eye = jnp.eye(table.shape[-1], dtype=inverse.dtype)[None]
        blocks = jnp.where(present[:, None, None], blocks, eye)
        owned = rows[table]
        costs = jnp.sum(owned * jnp.linalg.solve(blocks, owned), axis=(-2, -1))
    return jnp.where(present, costs, 0)


def _without(
    inverse: jax.Array, rows: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the inverse moment and the rows once those at `index` are compensated."""
    block, across = inverse[index][:, index], inverse[:, index]
    inverse = inverse - across @ jnp.linalg.solve(block, across.T)
    return inverse, rows - across @ jnp.linalg.solve(block, rows[index])

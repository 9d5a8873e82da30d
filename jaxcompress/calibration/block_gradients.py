"""Gradients of one stretch of a program: of its weights, and of what it reads."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.calibration.curvature_sums import column_products
from jaxcompress.tracing.blocks import Segment
from jaxcompress.tracing.metric_gradients import run_in_metric
from jaxcompress.tree.layouts import Layout, matricize


def is_float(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def backward_products(
    weights: dict[str, jax.Array],
    factors: dict[str, jax.Array],
    read: list[jax.Array],
    above: list[jax.Array],
    *,
    segment: Segment,
    layouts: Mapping[str, Layout],
    leaders: Mapping[str, str],
    plain: frozenset[str],
    pairs: Mapping[str, bool],
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """Return products of the gradients of weights, and cotangents of what is read.

    `factors` are by leader: one array, and one product with it, for all weights that
    meet the same rows.
    """
    by_name = {n: factors[lead] for n, lead in leaders.items() if lead in factors}
    metric = {name: by_name[name][0] for name in plain if name in by_name}

    def run(own: dict[str, jax.Array], floats: list[jax.Array]) -> list[jax.Array]:
        held = weights | own
        results = run_in_metric(segment, held, _merged(segment, read, floats), metric)
        return [x for v, x in zip(segment.writes, results, strict=True) if is_float(v)]

    floats = [x for v, x in zip(segment.reads, read, strict=True) if is_float(v)]
    _, back = jax.vjp(run, {name: weights[name] for name in layouts}, floats)
    gradients, below = back(above)
    products = {}
    for name, layout in layouts.items():
        factor = None if name in metric else by_name.get(name)
        matrix = matricize(gradients[name], layout)
        products[name] = column_products(matrix, factor, pairs=pairs[name])
    return products, below


def weight_gradient(
    weights: dict[str, jax.Array],
    read: list[jax.Array],
    above: list[jax.Array],
    *,
    segment: Segment,
    name: str,
) -> jax.Array:
    """Return the gradient of one weight."""

    def run(weight: jax.Array) -> list[jax.Array]:
        results = segment(weights | {name: weight}, read)
        return [x for v, x in zip(segment.writes, results, strict=True) if is_float(v)]

    return jax.vjp(run, weights[name])[1](above)[0]


def _merged(segment: Segment, read: list, floats: list) -> list:
    """Return the values that are read, those that are floating point from `floats`."""
    left = iter(floats)
    return [
        next(left) if is_float(v) else x
        for v, x in zip(segment.reads, read, strict=True)
    ]

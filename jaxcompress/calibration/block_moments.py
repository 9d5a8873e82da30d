"""Moments of the weights of one block: merged, grouped, interpolated."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from jaxcompress.calibration.moments import Moments, common_layout


def interpolate_drift(moments: Moments, drift: float) -> Moments:
    """Interpolate the drift: a part of it is compensated, targets in proportion."""
    if moments.cross is None or drift == 1:
        return moments
    cross = (1 - drift) * moments.drifted + drift * moments.cross
    return dataclasses.replace(moments, cross=cross)


def merge_tied(a: Moments | None, b: Moments) -> Moments:
    """Return the moments of one weight used in two ways: looked up, and as a head."""
    if a is None:
        return b
    if (a.second is None) != (b.second is None):
        looked_up, head = (a, b) if a.second is None else (b, a)
        layout = common_layout(a, b)
        return dataclasses.replace(head, tokens=looked_up.tokens, layout=layout)
    return a + b


def group_by_input(
    moments: Mapping[str, Moments], order: Iterable[str]
) -> list[set[str]]:
    """Group names that follow each other on one input, in the order given."""
    groups: list[set[str]] = []
    last = None
    for name in order:
        if name not in moments:
            continue
        second = moments[name].second
        alike = last is not None and second is not None and last.shape == second.shape
        if alike and bool(jnp.array_equal(last, second)):
            groups[-1].add(name)
        else:
            groups.append({name})
        last = second
    return groups

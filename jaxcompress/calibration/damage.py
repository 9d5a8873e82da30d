"""Damage: the cost of an error of one leaf, in squared outputs or in nats by
curvatures.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.moments import require
from jaxcompress.tree.layouts import Layout, matricize
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.paths import Entry


def relative_square(entry: Entry, value: Any) -> float:
    """Return squared error over squared size, of the layer's outputs where moments are
    known.

    Measured in float64 sums of float32 products; 0 for an all-zero leaf.
    """
    error, size = (x.sum() for x in _output_squares(entry, value))
    return float(error / size) if size > 0 else 0.0


def divergence(entry: Entry, value: Any) -> float:
    """Return nats per token that an error costs, by the curvatures of its outputs."""
    error, _ = _output_squares(entry, value)
    return float(np.sum(error * np.asarray(entry.moments.curvatures, np.float64)))


def _output_squares(entry: Entry, value: Any) -> list[np.ndarray]:
    """Return squares of error and weights, `[..., outputs]`, as `_squares` has them."""
    second = getattr(entry.moments, "second", None)
    if second is None and getattr(entry.moments, "curvatures", None) is None:
        last = entry.value.ndim - 1
        kind = Layout((), tuple(range(last)), (last,))
        parts = [matricize(dense(x), kind) for x in (entry.value, value)]
    else:
        parts = [entry.matrix(), entry.matrix(value)]
    if getattr(entry.moments, "curvatures", None) is not None:
        require(entry.moments, parts[0], entry.name, fields=("curvatures",))
    return [np.asarray(x, np.float64) for x in _squares(*parts, second)]


@jax.jit
def _squares(
    x: jax.Array, value: jax.Array, second: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    squares = []
    for part in (value.astype(jnp.float32) - wide, wide):
        moved = part
        if second is not None:
            moved = jnp.matmul(second, part, precision=jax.lax.Precision.HIGHEST)
        squares.append(jnp.sum(part * moved, axis=-2))
    return squares[0], squares[1]

"""Target weights under drift, and second moments of inputs that were never seen."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.error_feedback import damped, each_slice, float64


def corrected_target(
    x: jax.Array, drifted: jax.Array, cross: jax.Array, *, damping: float
) -> jax.Array:
    """Return weights that, on the drifted inputs, best give the original layer's
    outputs.

    `(drifted + D)^-1 (cross^T + D) x`, D being the damping, so that without drift the
    target is `x` itself. All `[inputs, *]`; float64 inside, float32 out.
    """
    with float64(True):
        wide, seen = x.astype(jnp.float64), cross.astype(jnp.float64)
        safe = damped(drifted.astype(jnp.float64), damping)
        extra = safe - drifted.astype(jnp.float64)
        factor = jax.scipy.linalg.cho_factor(safe)
        right = jnp.matmul(seen.T + extra, wide)
        return jax.scipy.linalg.cho_solve(factor, right).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="damping")
def corrected_targets(
    x: jax.Array, drifted: jax.Array, cross: jax.Array, *, damping: float
) -> jax.Array:
    """Compute `corrected_target` of every slice of a stack, one at a time."""
    one = functools.partial(corrected_target, damping=damping)
    return each_slice(one, x, drifted, cross)


@jax.jit
def _count_not_finite(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    """Return how many entries of each array are NaN or infinite."""
    count = lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)  # noqa: E731
    return jax.tree.map(count, arrays)


@jax.jit
def _unseen(second: jax.Array) -> jax.Array:
    """Return which slices of `[..., inputs, inputs]` are all zero: no token reached
    them.
    """
    return jnp.trace(second, axis1=-2, axis2=-1) <= 0


@jax.jit
def fill_unseen(matrices: dict[str, Any]) -> dict[str, Any]:
    """Return second moments with a multiple of the identity for slices that are all
    zero.

    All inputs of such a slice count alike, as much as the mean input of the others: a
    method that uses them does what it would do without data. The cross moment of a
    slice without one becomes the drifted moment: its target is the weight itself.
    """
    filled = dict(matrices)
    for name in ("second", "drifted"):
        matrix = matrices.get(name)
        if matrix is None:
            continue
        size = jnp.trace(matrix, axis1=-2, axis2=-1) / matrix.shape[-1]
        seen = size > 0
        mean = jnp.sum(jnp.where(seen, size, 0)) / jnp.maximum(jnp.sum(seen), 1)
        mean = jnp.where(mean > 0, mean, 1).astype(matrix.dtype)
        identity = mean * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
        identity = jnp.broadcast_to(identity, matrix.shape)
        filled[name] = jnp.where(seen[..., None, None], matrix, identity)
    if matrices.get("cross") is not None and filled.get("drifted") is not None:
        cross = matrices["cross"]
        has_cross = jnp.any(cross != 0, axis=(-2, -1), keepdims=True)
        filled["cross"] = jnp.where(has_cross, cross, filled["drifted"])
    return filled


def has_zero_slice(matrices: jax.Array) -> bool:
    """Return whether a slice of `[..., inputs, inputs]` is all zero."""
    with jax.ensure_compile_time_eval():
        return not bool(jnp.all(jnp.any(matrices != 0, axis=(-2, -1))))


_AGAIN = {
    "inputs": "collect them again with collect_moments, which names the first leaf "
    "whose inputs are not finite",
    "curvatures": "measure them again with measure_curvatures, on batches and weights "
    "without NaN",
}


def refuse_not_finite(name: str, arrays: dict[str, Any]) -> None:
    """Raise ValueError where a field of the moments of `name` is not finite."""
    with jax.ensure_compile_time_eval():  # the weights may be traced
        counts = {key: int(bad) for key, bad in _count_not_finite(arrays).items()}
    for key, bad in counts.items():
        if bad:
            cure = _AGAIN["curvatures" if key.endswith("curvatures") else "inputs"]
            raise ValueError(
                f"{name}: {bad} of {arrays[key].size} entries of the moments' "
                f"{key!r} are NaN or infinite; {cure}, or keep this leaf with a rule "
                "(pattern, None)"
            )


def warn_unseen(name: str, second: jax.Array) -> bool:
    """Warn with the slices that no token reached; whether there are any."""
    with jax.ensure_compile_time_eval():
        empty = np.asarray(_unseen(second))
    if not empty.any():
        return False
    which = "it"
    if empty.ndim:
        slices = np.flatnonzero(empty).tolist()
        more = ", ..." if len(slices) > 8 else ""
        numbers = ", ".join(map(str, slices[:8])) + more
        which = f"{len(slices)} of {empty.size} slices ({numbers})"
    warnings.warn(
        f"{name}: no calibration token reached {which}, or only zeros: the second "
        "moment is zero. Weights there are compressed without data, all inputs "
        "counting alike; pass batches that reach them",
        stacklevel=2,
    )
    return True

"""The order in which inputs are coded; target and factor in that order."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg.lapack

from jaxcompress.calibration.error_feedback import damped, inverse_factor, shrunk

ORDERS = ("pivoted", "activation", "natural")


def prepare(
    x: jax.Array,
    second: jax.Array | None,
    *,
    order: str,
    damping: float,
    shrinkage: float = 0.0,
    ridge: float = 0.0,
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Return target `[inputs, outputs]` and factor in the order of work, and that
    order.

    Correlations are weakened by `shrinkage`. With a ridge, in units of `second`, the
    target is the ridge regression of the weights' outputs.
    """
    first = np.arange(x.shape[0])
    if second is not None:
        second = shrunk(second, shrinkage)
    if second is None and not ridge:  # of the identity, damped
        return x, jnp.eye(x.shape[0]) / math.sqrt(1 + damping), first
    if second is None:
        second = jnp.eye(x.shape[0])
    elif order == "pivoted":
        first = pivots(np.asarray(second, np.float64))[::-1]
    elif order == "activation":
        first = np.argsort(-np.diagonal(np.asarray(second)), kind="stable")
    target, factor = _ordered(
        x, second, jnp.asarray(first), jnp.float32(ridge), damping=damping
    )
    if not (jnp.isfinite(target).all() and jnp.isfinite(factor).all()):
        raise ValueError(
            f"the second moment with damping={damping} is not positive definite, or "
            "not finite; raise damping, or calibrate on more tokens"
        )
    return target, factor, first


@functools.partial(jax.jit, static_argnames=("damping",))
def _ordered(
    x: jax.Array,
    second: jax.Array,
    first: jax.Array,
    ridge: jax.Array,
    *,
    damping: float,
) -> tuple[jax.Array, jax.Array]:
    x, second = x[first], second[first][:, first]
    wide = damped(second, damping) + ridge * jnp.eye(second.shape[0])
    factor = inverse_factor(wide, damping=0)
    high = jax.lax.Precision.HIGHEST
    away = jnp.matmul(factor.T, jnp.matmul(factor, x, precision=high), precision=high)
    return jnp.where(ridge > 0, x - ridge * away, x), factor


def pivots(second: np.ndarray) -> np.ndarray:
    """Return inputs in the order of pivoted Cholesky: always the one least explained so
    far.

    Those that earlier ones explain but for rounding are last, in their order.

    Args:
      second: float64 `[inputs, inputs]`.
    """
    if not second.size:
        return np.zeros(0, np.int64)
    least = 1e-6 * np.diagonal(second).max()
    _, order, rank, _ = scipy.linalg.lapack.dpstrf(second, lower=1, tol=max(least, 0))
    order = order.astype(np.int64) - 1  # LAPACK counts from one
    return np.concatenate([order[:rank], np.sort(order[rank:])])

"""Error feedback: rows of a kernel are replaced one by one, the others compensate.

One machine for quantizing and pruning with second moments. With `x` `[inputs, outputs]`
and the second moment S of its inputs, replacing row j by something else changes the
layer's output; the rows not yet replaced move so that the expected squared change is
least. The optimal moves are read from the Cholesky factor of S^-1: Frantar et al. 2022,
"GPTQ" (arXiv 2210.17323, section 3.3), and "SparseGPT" (arXiv 2301.00774); the same as
Babai's nearest-plane algorithm run from the last row (arXiv 2507.18553).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32  # rows fed back within, in the cache, before later ones are updated

float64: Callable[[bool], Any]
if hasattr(jax, "enable_x64"):
    float64 = jax.enable_x64
else:
    # Before jax 0.8 the context lived here.
    from jax.experimental import enable_x64 as float64


def damped(second: jax.Array, damping: float) -> jax.Array:
    """Return the second moment made safe to factor: `[inputs, inputs]`, any dtype.

    Adds `damping` times the mean of its diagonal to the diagonal. An input that is
    always zero (a dead one) gets that mean instead: its row costs nothing, and must
    neither move the others nor make the matrix singular. All-zero moments become the
    identity.
    """
    diagonal = jnp.diagonal(second)
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean > 0, mean, 1)
    extra = jnp.where(diagonal > 0, damping * mean, mean)
    return second + jnp.diag(extra)


def shrunk(matrices: Any, shrinkage: float) -> Any:
    """Return matrices shrunk toward their diagonal: `[..., n, n]`, JAX or NumPy.

    Errors are then not fed along correlations that other texts do not have. Ledoit and
    Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices",
    with the diagonal as the target.
    """
    alone = np.eye(matrices.shape[-1], dtype=matrices.dtype)
    alone = alone.reshape(*[1] * (matrices.ndim - 2), *alone.shape)
    return matrices * (1 - shrinkage * (1 - alone))


def inverse_factor(second: jax.Array, *, damping: float = 0.01) -> jax.Array:
    """Return upper triangular U, float32: `U^T U` is the inverse of the damped second
    moment.

    Computed in float64 without forming the inverse: the reversed Cholesky factor R of
    the damped moment, `R R^T` with R upper triangular, has `R^-1 = U`. NaN where the
    matrix is not positive definite even so. `[inputs, inputs]`; traceable.
    """
    with float64(True):
        wide = damped(second.astype(jnp.float64), damping)
        lower = jnp.linalg.cholesky(wide[::-1, ::-1])
        reverse = lower[::-1, ::-1]
        identity = jnp.eye(wide.shape[0], dtype=jnp.float64)
        upper = jax.scipy.linalg.solve_triangular(reverse, identity, lower=False)
        return upper.astype(jnp.float32)


def feed_back(
    x: jax.Array,
    factor: jax.Array,
    replace: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]],
    *,
    prepare: Callable[[jax.Array, jax.Array, jax.Array], Any] | None = None,
    block: int = BLOCK,
) -> Any:
    """Replace row after row, feeding each row's error into the rows after it.

    Args:
      x: float32 weights `[inputs, outputs]`, in the order of replacement.
      factor: `[inputs, inputs]` of `inverse_factor` in the same order.
      replace: `(aux, j, row) -> (value, out)`: the current row `j`, `[outputs]`, to
        the value that takes its place and whatever is to be kept of it (a pytree).
      prepare: `(start, rows, diagonal) -> aux`, called as a block is reached, with its
        current rows `[block, outputs]` and the factor's diagonal there; for
        choices made over several rows, such as a mask. Rows past the end are zero.
      block: rows per block; the result does not depend on it but for rounding.

    Returns:
      What `replace` kept, stacked along a leading `[inputs]`.
    """
    inputs, outputs = x.shape
    block = min(block, inputs)
    gap = -inputs % block
    x = jnp.pad(x, ((0, gap), (0, 0)))
    factor = jnp.pad(factor, ((0, gap), (0, gap)))
    padding = jnp.arange(inputs + gap) >= inputs
    factor = factor + jnp.diag(padding.astype(factor.dtype))
    behind = jnp.arange(inputs + gap)

    def one_block(x: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        rows = jax.lax.dynamic_slice(x, (start, 0), (block, outputs))
        wide = jax.lax.dynamic_slice(factor, (start, 0), (block, inputs + gap))
        local = jax.lax.dynamic_slice(wide, (0, start), (block, block))
        diagonal = jnp.diagonal(local)
        aux = prepare(start, rows, diagonal) if prepare else None

        def one_row(rows: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
            row = rows[i]
            value, out = replace(aux, start + i, row)
            error = (row - value) / diagonal[i]
            # `local` is upper triangular: rows already replaced do not move, and
            # neither matters to `replace` that this one now holds its value.
            return rows - local[i][:, None] * error[None, :], (error, out)

        _, (errors, outs) = jax.lax.scan(one_row, rows, jnp.arange(block))
        later = jnp.where(behind[None, :] >= start + block, wide, 0)
        moved = jnp.matmul(later.T, errors, precision=jax.lax.Precision.HIGHEST)
        return x - moved, outs

    starts = jnp.arange(0, inputs + gap, block)
    _, outs = jax.lax.scan(one_block, x, starts)

    def flat(out: jax.Array) -> jax.Array:
        return out.reshape((-1, *out.shape[2:]))[:inputs]

    return jax.tree.map(flat, outs)


def descend(
    x: jax.Array,
    value: jax.Array,
    second: jax.Array,
    replace: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    block: int = BLOCK,
) -> jax.Array:
    """Return one sweep of cyclic coordinate descent on the layer's expected squared
    error.

    Row after row moves to `replace(j, row)`, `row` `[outputs]` being what would be best
    for row `j` with all others fixed. Where `replace` takes the nearest of the
    values allowed, the error never grows: each coordinate's error is a parabola.

    Args:
      x: original weights, float32 `[inputs, outputs]`.
      value: their current replacement, same shape.
      second: `[inputs, inputs]`, with a positive diagonal (`damped`).
      replace: `(j, row) -> row`.
      block: rows updated before the others are; the result does not depend on it.

    Returns:
      The new values, `[inputs, outputs]`.
    """
    inputs, outputs = x.shape
    block = min(block, inputs)
    gap = -inputs % block
    pad = ((0, gap), (0, 0))
    x, value = jnp.pad(x, pad), jnp.pad(value, pad)
    padding = jnp.arange(inputs + gap) >= inputs
    second = jnp.pad(second, ((0, gap), (0, gap))) + jnp.diag(
        padding.astype(second.dtype)
    )

    def one_block(value: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        wide = jax.lax.dynamic_slice(second, (start, 0), (block, inputs + gap))
        local = jax.lax.dynamic_slice(wide, (0, start), (block, block))
        pull = jnp.matmul(wide, value - x, precision=jax.lax.Precision.HIGHEST)

        def one_row(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
            rows, pull = carry
            new = replace(start + i, rows[i] - pull[i] / local[i, i])
            new = jnp.where(start + i < inputs, new, rows[i])
            pull = pull + local[:, i][:, None] * (new - rows[i])[None, :]
            return (rows.at[i].set(new), pull), None

        rows = jax.lax.dynamic_slice(value, (start, 0), (block, outputs))
        (rows, _), _ = jax.lax.scan(one_row, (rows, pull), jnp.arange(block))
        return jax.lax.dynamic_update_slice(value, rows, (start, 0)), None

    starts = jnp.arange(0, inputs + gap, block)
    value, _ = jax.lax.scan(one_block, value, starts)
    return value[:inputs]


def layer_loss(x: jax.Array, value: jax.Array, second: jax.Array) -> jax.Array:
    """Return expected squared change of the layer's output, summed over outputs: tr(D^T
    S D).

    Args:
      x: weights `[..., inputs, outputs]`.
      value: their replacement, same shape.
      second: `[..., inputs, inputs]`.

    Returns:
      `[...]`, float32.
    """
    change = value.astype(jnp.float32) - x.astype(jnp.float32)
    moved = jnp.matmul(second, change, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(change * moved, axis=(-2, -1))


def each_slice(function: Callable[..., Any], *arrays: Any, trailing: int = 2) -> Any:
    """Apply `function` to every slice over the stack axes, one at a time; traceable.

    Every array is `[..., a, b]` with the same stack axes; so is every array returned.
    One at a time, because a factor of a whole stack at once would fill the memory; also
    under `vmap`, which would batch float64 products outside the context that allows
    them, and so round them to float32.
    """
    function = jax.custom_batching.sequential_vmap(function)
    stack = arrays[0].shape[:-trailing]
    if not stack:
        return function(*arrays)
    flat = jax.tree.map(lambda a: a.reshape((-1, *a.shape[len(stack) :])), arrays)
    out = jax.lax.map(lambda slices: function(*slices), flat)
    return jax.tree.map(lambda a: a.reshape((*stack, *a.shape[1:])), out)

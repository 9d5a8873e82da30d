"""Pruning with reconstruction: the weights that stay compensate for those dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import (
    damped,
    each_slice,
    feed_back,
    float64,
    inverse_factor,
    shrunk,
)
from jaxcompress.calibration.moments import Moments
from jaxcompress.pruning.choices import Choice, choice, keep_largest, select
from jaxcompress.pruning.scores import (
    kept_weights,
    magnitude_instead,
    second_of,
)
from jaxcompress.pruning.sparse import Sparse
from jaxcompress.tree.methods import method

ROUNDS = 100  # of three ADMM iterations each; the support settles long before
CONJUGATE_STEPS = 30


@method(data=True, without_data=magnitude_instead)
def sparsegpt(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    sparsity: float | None = None,
    nm: str | None = None,
    damping: float = 0.01,
    shrinkage: float = 0.1,
    block: int = 128,
) -> Sparse:
    """SparseGPT: prune input rows in sequence and propagate each row's error to the
    rest.

    What to drop is decided as a block of rows is reached, on the current weights: those
    that cost the layer's output least once later rows compensate, the same fraction
    in every block. An N:M pattern is decided group by group.
    Drifted moments, if known, are the inputs; the target stays `x`.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs; `second`, or `drifted`.
      sparsity: fraction of the weights to drop, at least 0 and below 1.
      nm: N:M, as in `magnitude`, instead of a sparsity; not blocks.
      damping: added to the diagonal of the second moment, as a fraction of its mean.
      shrinkage: as in `gptq`.
      block: input rows decided on together; a pattern has its own.

    Raises:
      ValueError: no moments, moments that do not fit, an option out of range.

    Example:
      >>> small = jc.sparsegpt(x, of_x, sparsity=0.5)

    Source: Frantar and Alistarh 2023, "SparseGPT" (arXiv 2301.00774, sections 3.2 to
    3.4 and appendix A). Here inputs that are always zero score zero.
    """
    checks.weights("sparsegpt", x)
    checks.integer("sparsegpt", "block (of rows)", block)
    checks.fraction("sparsegpt", "a shrinkage", shrinkage, zero=True)
    chosen, second = _problem(x, moments, "sparsegpt", sparsity, nm, damping)
    if chosen.among == "block":
        raise ValueError(
            f"sparsegpt takes a sparsity or an N:M pattern, not blocks ({nm}); "
            "alps and magnitude take blocks"
        )
    one = functools.partial(
        _prune_rows,
        chosen=chosen,
        damping=damping,
        shrinkage=shrinkage,
        block=min(block if chosen.among == "leaf" else chosen.of, x.shape[-2]),
    )
    value, mask = each_slice(one, x.astype(jnp.float32), second)
    return kept_weights(value.astype(x.dtype), mask, chosen)


@method(data=True, without_data=magnitude_instead)
def alps(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    sparsity: float | None = None,
    nm: str | None = None,
    damping: float = 0.01,
    shrinkage: float = 0.1,
) -> Sparse:
    """ALPS: find the support by ADMM, then the best weights on it by conjugate
    gradients.

    Every weight competes with all others of the matrix, in the scale of its input.
    Slower than `sparsegpt`: some hundred products of the second moment's size with the
    weights. Drifted moments, if known, are the inputs; the target stays `x`.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs; `second`, or `drifted`.
      sparsity: fraction of the weights to drop, at least 0 and below 1.
      nm: N:M or blocks, as in `magnitude`.
      damping: added to the diagonal of the second moment, as a fraction of its mean.
      shrinkage: as in `gptq`.

    Raises:
      ValueError: no moments, moments that do not fit, an option out of range.

    Example:
      >>> small = jc.alps(x, of_x, nm="2:4")

    Source: Meng et al. 2024, "ALPS" (arXiv 2406.07831, section 3 and its penalty
    schedule); here each output takes conjugate gradient steps of its own length.
    """
    checks.weights("alps", x)
    checks.fraction("alps", "a shrinkage", shrinkage, zero=True)
    chosen, second = _problem(x, moments, "alps", sparsity, nm, damping)
    one = functools.partial(
        _alternate, chosen=chosen, damping=damping, shrinkage=shrinkage
    )
    value, mask = each_slice(one, x.astype(jnp.float32), second)
    return kept_weights(value.astype(x.dtype), mask, chosen)


def _problem(
    x: jax.Array,
    moments: Moments | None,
    name: str,
    sparsity: float | None,
    nm: str | None,
    damping: float,
) -> tuple[Choice, jax.Array]:
    checks.fraction(name, "damping", damping)
    chosen = choice(x.shape, name, sparsity=sparsity, nm=nm)
    return chosen, second_of(x, moments, name)


@functools.partial(jax.jit, static_argnames=("chosen", "damping", "shrinkage", "block"))
def _prune_rows(
    x: jax.Array,
    second: jax.Array,
    *,
    chosen: Choice,
    damping: float,
    shrinkage: float,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Return new weights, float32, and their mask, of one slice `[inputs, outputs]`."""
    inputs = x.shape[0]
    factor = inverse_factor(shrunk(second, shrinkage), damping=damping)
    seen = jnp.pad(jnp.diagonal(second) > 0, (0, -inputs % block))
    ends = np.minimum(np.arange(0, inputs + block, block), inputs)
    # Rounded in total, so that the counts of the blocks add up to the choice's.
    counts = jnp.asarray(np.diff(np.rint(ends * (chosen.kept / inputs))), jnp.int32)

    def prepare(
        start: jax.Array, rows: jax.Array, diagonal: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        row_indices = start + jnp.arange(block)
        score = jnp.square(rows / diagonal[:, None])
        score = jnp.where(
            jax.lax.dynamic_slice(seen, (start,), (block,))[:, None], score, 0
        )
        if chosen.among == "group":
            return start, keep_largest(score, chosen.kept, axis=0)
        score = jnp.where(row_indices[:, None] < inputs, score, -1)
        mask = keep_largest(score.ravel(), counts[start // block])
        return start, mask.reshape(rows.shape)

    def replace(
        aux: tuple[jax.Array, jax.Array], j: jax.Array, row: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start, mask = aux
        value = jnp.where(mask[j - start], row, 0)
        return value, (value, mask[j - start])

    return feed_back(x, factor, replace, prepare=prepare, block=block)


@functools.partial(jax.jit, static_argnames=("chosen", "damping", "shrinkage"))
def _alternate(
    x: jax.Array,
    second: jax.Array,
    *,
    chosen: Choice,
    damping: float,
    shrinkage: float,
) -> tuple[jax.Array, jax.Array]:
    """Return new weights, float32, and their mask, of one slice `[inputs, outputs]`."""
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    with float64(True):
        wide = damped(shrunk(second, shrinkage).astype(jnp.float64), damping)
        scale = jnp.sqrt(jnp.diagonal(wide))
        wide = wide / (scale[:, None] * scale[None, :])
        spectrum, basis = jnp.linalg.eigh(wide)
        spectrum, basis = spectrum.astype(jnp.float32), basis.astype(jnp.float32)
        normal, scale = wide.astype(jnp.float32), scale.astype(jnp.float32)
    target = x * scale[:, None]
    pull = matmul(normal, target)
    competing = chosen.count(x.shape[0]) * (x.shape[1] if chosen.by_output else 1)

    def go_on(state: tuple) -> jax.Array:
        turn, changed = state[0], state[1]
        return (turn < ROUNDS) & (changed > 0)

    def three_iterations(state: tuple) -> tuple:
        turn, _, rho, value, dual, mask = state
        before = mask
        inverse = matmul(basis / (spectrum + rho)[None, :], basis.T)
        for _ in range(3):
            free = matmul(inverse, pull - dual + rho * value)
            wanted = free + dual / rho
            mask = select(jnp.abs(wanted), chosen)
            value = jnp.where(mask, wanted, 0)
            dual = dual + rho * (free - value)
        changed = jnp.sum(mask != before, dtype=jnp.int32)
        share = changed / competing
        growth = jnp.where(share >= 0.1, 1.3, jnp.where(share >= 0.005, 1.2, 1.1))
        return turn + 1, changed, rho * growth, value, dual, mask

    mask = select(jnp.abs(target), chosen)
    start = (0, jnp.int32(1), jnp.float32(0.1), target, jnp.zeros_like(x), mask)
    *_, value, _, mask = jax.lax.while_loop(go_on, three_iterations, start)
    value = _conjugate_gradients(normal, pull, value, mask)
    return value / scale[:, None], mask


def _conjugate_gradients(
    normal: jax.Array, pull: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """Improve the solution of `normal @ value = pull` on the mask, each output by
    itself.

    No step raises the layer's error. `normal` has a diagonal of ones: the
    preconditioner is in its scale already.
    """

    def apply(v: jax.Array) -> jax.Array:
        product = jnp.matmul(normal, v, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(mask, product, 0)

    total = functools.partial(jnp.sum, axis=0, keepdims=True)  # per output

    def safe(top: jax.Array, bottom: jax.Array) -> jax.Array:
        """Return the quotient; 0 where an output has arrived and nothing is left."""
        return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), 0)

    def step(_: int, state: tuple) -> tuple:
        value, left, way, size = state
        image = apply(way)
        length = safe(size, total(way * image))
        value, left = value + length * way, left - length * image
        new = total(left * left)
        return value, left, left + safe(new, size) * way, new

    left = jnp.where(mask, pull, 0) - apply(value)
    state = (value, left, left, total(left * left))
    return jax.lax.fori_loop(0, CONJUGATE_STEPS, step, state)[0]

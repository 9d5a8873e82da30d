"""A kernel as the product of two thin ones: plain and activation-weighted SVD."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import damped, each_slice, float64
from jaxcompress.calibration.moments import Moments, require
from jaxcompress.coding.levels.shrinkage import shrink_to_mean
from jaxcompress.factorization.low_rank import LowRank
from jaxcompress.tree.methods import method

LARGE = 2048  # smaller sides get the exact decomposition unless told otherwise

Weighted = Literal["auto"] | bool


class Statistics(NamedTuple):
    """Second moment and output weights that the loss of a factorization weighs by."""

    second: jax.Array | None = None  # [..., inputs, inputs], or the drifted moment
    target: jax.Array | None = None  # [..., inputs, outputs], where it is not x
    counts: jax.Array | None = None  # [..., 1, outputs]: how often errors of each count


class Sketch(NamedTuple):
    """Options of the randomized range finder."""

    oversampling: int
    power_iterations: int
    seed: int


def _rank_known(options: Mapping[str, Any]) -> bool:
    return options.get("energy") is None


@method(traceable=_rank_known, data=True)
def svd(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    rank: int | None = None,
    fraction: float | None = None,
    energy: float | None = None,
    weighted: Weighted = "auto",
    damping: float = 1e-3,
    randomized: Weighted = "auto",
    oversampling: int = 16,
    power_iterations: int = 4,
    seed: int = 0,
) -> LowRank:
    """Factorize weights into the product of two thin matrices nearest to them.

    Nearest in squared weights, or, weighted, in the layer's expected squared output
    `tr(D^T S D)`, `D` the change and `S` the damped second moment of the inputs; with
    drifted moments, to the outputs of the original layer on the original inputs. Both
    are optimal, and the loss is the sum of the squared singular values left out, up to
    the rounding of the factors to the dtype of `x`. The singular values are shared
    evenly between the factors. With curvatures (`measure_curvatures`) the squared error
    of an output counts as often as it does the model harm.

    A rank of `inputs * outputs / (inputs + outputs)` or more saves nothing; it is
    allowed, because what follows may (a coarser grid for the factors).

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs, where weighted.
      rank: 1 to `min(inputs, outputs)`; give exactly one of rank, fraction and energy.
      fraction: of the number of weights that the factors may have, above 0 and at most
        1; rounded down, to a rank of one at least.
      energy: the least rank that keeps this fraction of the sum of squared singular
        values (in every matrix of a stack), above 0 and at most 1. It depends on
        values, so it can't be traced; see also `plan_ranks`.
      weighted: "auto": where there are moments with a second moment.
      damping: added to the diagonal of the second moment, as a fraction of its mean;
        0 to 1. Moments of fewer tokens than inputs need it. Where the matrix is not
        positive definite even so, the factors are NaN.
      randomized: look for the leading singular vectors in a random subspace, faster
        and nearly optimal. "auto": where both sides are 2048 or more and the subspace
        is at most a sixteenth of that. Never with `energy`.
      oversampling: dimensions of that subspace beyond the rank.
      power_iterations: passes that turn it towards the leading vectors.
      seed: of the random subspace.

    Raises:
      ValueError: an option out of range, moments missing where `weighted=True` or of
        another shape.
      TypeError: weights that are not floating point; `energy` under a trace.

    Example:
      >>> small = jc.svd(x, of_x, rank=8)
      >>> halved = jc.compress(params, "svd(fraction=0.5)", moments)

    Source: Eckart and Young 1936; whitening as in SVD-LLM (arXiv 2403.07378); the
    Fisher information as a weight: FWSVD (arXiv 2207.00112), there by rows; Halko,
    Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4.
    """
    checks.weights("svd", x)
    checks.fraction("svd", "damping", damping, zero=True)
    weighting = statistics("svd", x, moments, weighted, damping)
    inputs, outputs = x.shape[-2:]
    if sum(option is not None for option in (rank, fraction, energy)) != 1:
        raise ValueError(
            "svd takes exactly one of rank, fraction and energy, not "
            f"rank={rank!r}, fraction={fraction!r}, energy={energy!r}"
        )
    if energy is not None:
        rank = _rank_of_energy(x, weighting, energy=energy, damping=damping)
    elif fraction is not None:
        checks.fraction("svd", "fraction", fraction, one=True)
        share = fraction * inputs * outputs / (inputs + outputs)
        rank = max(1, int(share + 1e-9))  # 0.3 times ten is not three
    checks.integer("svd", "rank", rank, most=min(inputs, outputs))
    sketch = None
    if _is_randomized(randomized, rank + oversampling, x.shape) and energy is None:
        checks.integer(
            "svd", "oversampling", oversampling, most=inputs + outputs, least=0
        )
        checks.integer("svd", "power_iterations", power_iterations, most=100, least=0)
        sketch = Sketch(oversampling, power_iterations, seed)
    return nearest(x, None, weighting, rank=rank, damping=damping, sketch=sketch)


def energies(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    weighted: Weighted = "auto",
    damping: float = 1e-3,
) -> jax.Array:
    """Return energy of each rank: squared singular values, largest first; traceable.

    The sum of the last ones is the loss of `svd` without them: in squared weights, in
    the layer's expected squared output or, with curvatures, in nats per token of
    divergence from the model, to second order. Arguments and errors are those of `svd`.

    Returns:
      `[..., min(inputs, outputs)]`, float32.
    """
    checks.weights("energies", x)
    checks.fraction("energies", "damping", damping, zero=True)
    second_moment = statistics("energies", x, moments, weighted, damping)
    return _energies(x, *second_moment, damping=damping)


def nearest(
    x: jax.Array,
    base: jax.Array | None,
    weighting: Statistics,
    *,
    rank: int,
    damping: float,
    sketch: Sketch | None = None,
) -> LowRank:
    """Compute the product that, added to `base`, is nearest to the weights; traceable.

    Args:
      x: `[..., inputs, outputs]`.
      base: what is there already, same shape; None for nothing.
      weighting: of `statistics`, which decide what nearest means.
      rank, damping, sketch: as in `svd`; None is the exact decomposition.
    """
    one = functools.partial(_factors, rank=rank, damping=damping, sketch=sketch)
    return LowRank(*each_slice(one, x, base, *weighting))


def statistics(
    name: str,
    x: jax.Array,
    moments: Moments | None,
    weighted: Weighted,
    damping: float,
) -> Statistics:
    """Return second moment to weight by, None where the loss is that of the weights.

    Raises ValueError where the moments do not fit or are needed and missing.
    """
    if weighted not in (True, False, "auto"):
        raise ValueError(
            f"{name} takes weighted=True, False or 'auto', not {weighted!r}"
        )
    looked_up = isinstance(moments, Moments) and moments.looked_up
    if not weighted or (weighted == "auto" and (moments is None or looked_up)):
        return Statistics()
    counts = None
    if getattr(moments, "curvatures", None) is not None:
        checked = require(moments, x, name, fields=("curvatures",))
        counts = shrink_to_mean(checked.curvatures)[..., None, :]
    checked = require(moments, x, name, fields=())
    target, second = checked.target_problem(x, name, damping=damping)
    return Statistics(second, None if target is x else target, counts)


def whiten(
    x: jax.Array, second: jax.Array, damping: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return coordinates in which the layer's loss is a sum of squares; float64
    throughout.

    Returns:
      `(target, factor, unit)`: weights W lose `unit * |factor^T W - target|^2` plus
      what no W can change. `factor` is lower triangular `[inputs, inputs]`, of mean
      square one per row, so that targets are of the size of the weights.
    """
    safe = damped(second, damping)
    unit = jnp.mean(jnp.diagonal(safe))
    factor = jnp.linalg.cholesky(safe / unit)
    return jnp.matmul(factor.T, x), factor, unit


def unwhiten(factor: jax.Array, x: jax.Array) -> jax.Array:
    """Compute `factor^-T x`: the inverse of `whiten`, `[inputs, *]`."""
    return jax.scipy.linalg.solve_triangular(factor, x, lower=True, trans=1)


@functools.partial(jax.jit, static_argnames=("rank", "damping", "sketch"))
def _factors(
    x: jax.Array,
    base: jax.Array | None,
    second: jax.Array | None,
    target: jax.Array | None,
    counts: jax.Array | None,
    *,
    rank: int,
    damping: float,
    sketch: Sketch | None,
) -> tuple[jax.Array, jax.Array]:
    """Return left and right factors of one slice."""
    probes = None
    if sketch is not None:
        # Drawn out here: inside, the keys would be lowered outside the context.
        dimensions = min(rank + sketch.oversampling, *x.shape)
        key = jax.random.key(sketch.seed)
        probes = jax.random.normal(key, (x.shape[1], dimensions), jnp.float32)
    with float64(True):
        aim = x if target is None else target
        wide, start, seen, counts = _widen(aim, base, second, counts)
        if seen is not None:
            wide, factor, _ = whiten(wide, seen, damping)
            start = None if start is None else jnp.matmul(factor.T, start)
        wide = wide if start is None else wide - start
        if counts is not None:  # their size does not matter, and must not unbalance
            counts = jnp.sqrt(counts / jnp.mean(counts))
            wide = wide * counts
        if probes is None:
            u, values, vt = _triples(wide)
        else:
            u, values, vt = _sketched(
                wide, probes.astype(jnp.float64), sketch.power_iterations
            )
        root = jnp.sqrt(values[:rank])
        left, right = u[:, :rank] * root[None, :], root[:, None] * vt[:rank]
        if seen is not None:
            left = unwhiten(factor, left)
        right = right if counts is None else right / counts
        return left.astype(x.dtype), right.astype(x.dtype)


def _widen(*arrays: jax.Array | None) -> list[jax.Array | None]:
    return [None if a is None else a.astype(jnp.float64) for a in arrays]


def _triples(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return singular vectors and values in float64, by the Gram matrix of the smaller
    side.

    Vectors of values below 1e-8 of the largest are a basis of what is left, no more;
    their products are exact all the same, which is what a factorization needs. Unlike
    `jnp.linalg.svd` it is lowered in float64 for every platform.
    """
    if x.shape[0] > x.shape[1]:
        v, values, ut = _triples(x.T)
        return ut.T, values, v.T
    _, vectors = jnp.linalg.eigh(x @ x.T)
    u = vectors[:, ::-1]
    right = u.T @ x
    values = jnp.linalg.norm(right, axis=1)
    return u, values, right / jnp.where(values > 0, values, 1)[:, None]


def _sketched(
    x: jax.Array, probes: jax.Array, power_iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return singular triples of `x` within the images of random `probes` `[outputs,
    *]`.
    """
    basis, _ = jnp.linalg.qr(x @ probes)

    def towards_the_leading(_: int, basis: jax.Array) -> jax.Array:
        back, _ = jnp.linalg.qr(x.T @ basis)
        return jnp.linalg.qr(x @ back)[0]

    basis = jax.lax.fori_loop(0, power_iterations, towards_the_leading, basis)
    u, values, vt = _triples(basis.T @ x)
    return basis @ u, values, vt


@functools.partial(jax.jit, static_argnames=("damping",))
def _energies(
    x: jax.Array,
    second: jax.Array | None,
    target: jax.Array | None,
    counts: jax.Array | None,
    *,
    damping: float,
) -> jax.Array:
    def one(x: jax.Array, second: Any, counts: Any) -> jax.Array:
        with float64(True):
            wide, seen, counts = _widen(x, second, counts)
            unit = jnp.ones((), jnp.float64)
            if seen is not None:
                wide, _, unit = whiten(wide, seen, damping)
            wide = wide if counts is None else wide * jnp.sqrt(counts)
            if wide.shape[0] > wide.shape[1]:
                wide = wide.T
            # Squares are wanted, so the Gram matrix loses nothing and is small.
            values = jnp.linalg.eigvalsh(wide @ wide.T)[::-1]
            return (jnp.maximum(values, 0) * unit).astype(jnp.float32)

    return each_slice(one, x if target is None else target, second, counts)


def _rank_of_energy(
    x: jax.Array, weighting: Statistics, *, energy: float, damping: float
) -> int:
    checks.fraction("svd", "energy", energy, one=True)
    if any(isinstance(a, Tracer) for a in (x, *weighting)):
        raise TypeError(
            "svd with energy is a host method: the rank it finds depends on values, so "
            "it can't run under jit, vmap or scan. Give rank or fraction, or use it "
            "outside"
        )
    values = np.asarray(_energies(x, *weighting, damping=damping), np.float64)
    kept = np.cumsum(values, axis=-1)
    enough = kept >= energy * kept[..., -1:]
    return 1 + int(np.max(np.argmax(enough, axis=-1)))


def _is_randomized(option: Weighted, dimensions: int, shape: tuple[int, ...]) -> bool:
    if option not in (True, False, "auto"):
        raise ValueError(f"svd takes randomized=True, False or 'auto', not {option!r}")
    if option == "auto":
        side = min(shape[-2:])
        return side >= LARGE and 16 * dimensions <= side
    return bool(option)

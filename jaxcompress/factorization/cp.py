"""A kernel of three axes or more as a sum of products of vectors, one per axis."""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import each_slice, float64
from jaxcompress.calibration.moments import Moments
from jaxcompress.factorization.low_rank import FactoredLeaf, LowRank, multiply
from jaxcompress.factorization.svd import (
    Weighted,
    unwhiten,
)
from jaxcompress.factorization.tucker import (
    Sizes,
    axis_statistics,
    axis_whiten,
    leading_vectors,
    unfold,
    unfolded,
)
from jaxcompress.tree.leaf import (
    Arithmetic,
    Convolution,
    contract,
    dense,
    leaf,
    static,
    unboxed,
)
from jaxcompress.tree.methods import method


class Start(NamedTuple):
    """The start of alternating least squares."""

    rank: int
    init: str
    seed: int


@leaf
class CP(FactoredLeaf):
    """A weight `[..., inputs, outputs]` whose inputs or outputs unfold into axes.

    Invariant: `factors[i]` is `[..., size, rank]` of axis i; the unfolded weight is the
    sum over the rank of the outer products of their columns. The first `inputs` axes
    fold into the inputs of the weight, the others into its outputs. The dtype is that
    of the first factor.

    Example:
      >>> [f.shape for f in jc.cp(x, rank=8, sizes=(8, 8, 64)).factors]
      [(8, 8), (8, 8), (64, 8)]
    """

    factors: tuple[Any, ...]
    inputs: int = static()  # how many of the axes

    weights: ClassVar[tuple[str, ...]] = ("factors",)

    @property
    def sizes(self) -> Sizes:
        """Sizes of the unfolded axes."""
        return tuple(factor.shape[-2] for factor in self.factors)

    @property
    def shape(self) -> tuple[int, ...]:
        stack = self.factors[0].shape[:-2]
        inputs, outputs = self.sizes[: self.inputs], self.sizes[self.inputs :]
        return (*stack, math.prod(inputs), math.prod(outputs))

    @property
    def dtype(self) -> np.dtype:
        return self.factors[0].dtype

    @property
    def rank(self) -> int:
        return self.factors[0].shape[-1]

    def inner_moments(self, field: str, moments: Moments | None) -> None:
        """Return None: no factor meets the layer's inputs by itself."""
        del field, moments

    def contract_factors(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Return two thin products, with the products of the columns of either side."""
        left, right = self.factors[: self.inputs], self.factors[self.inputs :]
        first = left[0] if self.inputs == 1 else self._columns(left)
        pair = LowRank(first, jnp.swapaxes(self._columns(right), -1, -2))
        return pair.contract(x, how)

    def convolve(
        self, x: jax.Array, convolution: Convolution, window: Sizes, how: Arithmetic
    ) -> jax.Array:
        """Return convolution of each term by itself, between products at each place."""
        if self.sizes[: self.inputs] != window or len(window) < 2:
            return super().convolve(x, convolution, window, how)
        *places, channels = self.factors[: self.inputs]
        inner = contract(x, channels, how).astype(x.dtype)
        inner = convolution(inner, self._columns(places), groups=self.rank)
        outputs = jnp.swapaxes(self._columns(self.factors[self.inputs :]), -1, -2)
        return contract(inner, outputs, how).astype(x.dtype)

    def _columns(self, factors: Sequence[Any]) -> jax.Array:
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return column_products([unboxed(factor).astype(wide) for factor in factors])

    def factored_cost(self, rows: int) -> int:
        return rows * self.rank * sum(self.shape[-2:])

    def dense_cost(self) -> int:
        return self.rank * math.prod(self.shape[-2:])

    def materialize(self) -> jax.Array:
        arrays = [dense(factor) for factor in self.factors]
        wide = jnp.promote_types(self.dtype, jnp.float32)
        arrays = [array.astype(wide) for array in arrays]
        left = column_products(arrays[: self.inputs])
        right = column_products(arrays[self.inputs :])
        return multiply(left, jnp.swapaxes(right, -1, -2)).astype(self.dtype)


@method(data=True)
def cp(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    rank: int,
    sizes: Sizes | None = None,
    sweeps: int = 100,
    tolerance: float = 1e-10,
    ridge: float = 1e-8,
    init: Literal["svd", "random"] = "svd",
    weighted: Weighted = "auto",
    damping: float = 1e-3,
    seed: int = 0,
) -> CP:
    """CP: a sum of `rank` outer products, fitted by alternating least squares.

    A tensor may have no best approximation of its rank: terms then grow without bound
    and cancel. The ridge bounds them, by at most `1 / sqrt(ridge)` times the norm of
    the weights; where factors are large all the same, and above all where they
    are to be quantized or trained, use `tucker`. The result is a local optimum.

    Args:
      x: floating-point weights `[..., inputs, outputs]`; stacked layers are factorized
        one by one.
      moments: of the inputs, where weighted.
      rank: 1 to the product of all sizes but the largest, enough for any tensor.
      sizes: of the axes into which inputs and outputs unfold, as in `tucker`.
      sweeps: over all axes, at most.
      tolerance: ends when a sweep lowers the squared error by less than this fraction
        of the squared norm of the weights.
      ridge: weight of the squared size of a factor's terms relative to the squared
        error, above 0.
      init: "svd": leading singular vectors of each unfolding, filled up by random
        ones beyond the size of an axis; "random": all random.
      weighted: as in `tucker`.
      damping: of the second moment, as in `svd`.
      seed: of the random vectors.

    Raises:
      ValueError: no sizes, or sizes that do not multiply to the inputs and outputs, an
        option out of range, moments missing where `weighted=True`.
      TypeError: weights that are not floating point.

    Example:
      >>> small = jc.cp(x, rank=8, sizes=(8, 8, 64), sweeps=3)

    Source: Carroll and Chang 1970; Kolda and Bader 2009, "Tensor decompositions and
    applications", section 3.4; degeneracy: de Silva and Lim 2008 (math/0607647). The
    ridge is a deviation from plain alternating least squares.
    """
    checks.weights("cp", x)
    checks.fraction("cp", "damping", damping, zero=True)
    sizes, inputs = unfolded("cp", x, sizes)
    checks.integer("cp", "rank", rank, most=math.prod(sizes) // max(sizes))
    checks.integer("cp", "sweeps", sweeps, most=10**6)
    checks.fraction("cp", "ridge", ridge)
    checks.fraction("cp", "tolerance", tolerance, zero=True)
    checks.one_of("cp", "init", init, ("svd", "random"))
    second, target, _ = axis_statistics("cp", x, moments, weighted, inputs, damping)
    one = functools.partial(
        _fit,
        sizes=sizes,
        damping=damping,
        start=Start(rank, init, seed),
        sweeps=sweeps,
        tolerance=tolerance,
        ridge=ridge,
    )
    return CP(each_slice(one, x, second, target), inputs)


def column_products(factors: list[jax.Array]) -> jax.Array:
    """Return products of matching columns over all rows of `[..., size, rank]` factors.

    Returns:
      `[..., product of the sizes, rank]`, the last factor's rows varying fastest.
    """
    product = factors[0]
    for factor in factors[1:]:
        pairs = product[..., :, None, :] * factor[..., None, :, :]
        product = pairs.reshape((*pairs.shape[:-3], -1, pairs.shape[-1]))
    return product


@functools.partial(jax.jit, static_argnames=("sizes", "damping", "start"))
def _fit(
    x: jax.Array,
    second: jax.Array | None,
    target: jax.Array | None,
    *,
    sizes: Sizes,
    damping: float,
    start: Start,
    sweeps: int,
    tolerance: float,
    ridge: float,
) -> tuple[jax.Array, ...]:
    """Return factors of one slice, every term shared evenly among them."""
    # Drawn out here: inside, the keys would be lowered outside the context.
    random = _random_columns(sizes, start.rank, start.seed)
    with float64(True):
        tensor, root = axis_whiten(
            x if target is None else target, second, sizes, damping
        )
        norm = jnp.sum(jnp.square(tensor))
        matrices = [unfold(tensor, axis) for axis in range(len(sizes))]

        def sweep(state: tuple) -> tuple:
            factors, _, error, _, count = state
            for axis, matrix in enumerate(matrices):
                others = [f for i, f in enumerate(factors) if i != axis]
                gram = _product([f.T @ f for f in others])
                seen = matrix @ column_products(others)
                # Columns have norm 1, so the diagonal is 1 and the ridge is relative.
                safe = gram + ridge * jnp.eye(start.rank, dtype=gram.dtype)
                solved = jax.scipy.linalg.cho_solve(
                    jax.scipy.linalg.cho_factor(safe), seen.T
                ).T
                fit = jnp.sum(solved * (2 * seen - solved @ gram))
                scale = jnp.linalg.norm(solved, axis=0)
                unit = solved / jnp.where(scale > 0, scale, 1)[None, :]
                factors = (*factors[:axis], unit, *factors[axis + 1 :])
            return factors, scale, norm - fit, error, count + 1

        def goes_on(state: tuple) -> jax.Array:
            *_, error, before, count = state
            done = before - error <= tolerance * norm  # not if they are NaN
            return (count < sweeps) & ~done

        columns = []
        for axis, drawn in enumerate(random):
            filled = min(start.rank, sizes[axis]) if start.init == "svd" else 0
            leading = leading_vectors(tensor, axis, filled)
            drawn = drawn.astype(tensor.dtype)[:, filled:]
            columns.append(jnp.concatenate([leading, drawn], axis=1))
        first = (
            tuple(columns),
            jnp.zeros(start.rank, tensor.dtype),
            norm,
            jnp.asarray(jnp.inf, tensor.dtype),
            jnp.zeros((), jnp.int32),
        )
        factors, scale, *_ = jax.lax.while_loop(goes_on, sweep, first)
        share = scale ** (1 / len(sizes))
        factors = [factor * share[None, :] for factor in factors]
        if root is not None:
            factors[0] = unwhiten(root, factors[0])
        return tuple(factor.astype(x.dtype) for factor in factors)


def _product(grams: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.multiply, grams)


def _random_columns(sizes: Sizes, rank: int, seed: int) -> list[jax.Array]:
    """Draw float32 `[size, rank]` for each axis, columns of norm one."""
    key = jax.random.key(seed)
    columns = []
    for axis, size in enumerate(sizes):
        normal = jax.random.normal(jax.random.fold_in(key, axis), (size, rank))
        norms = jnp.linalg.norm(normal, axis=0, keepdims=True)
        columns.append(normal / norms)
    return columns

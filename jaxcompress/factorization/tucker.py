"""A kernel of three axes or more as a small core, each axis multiplied out of it."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import each_slice, float64
from jaxcompress.calibration.moments import Moments
from jaxcompress.factorization.low_rank import FactoredLeaf
from jaxcompress.factorization.svd import (
    Statistics,
    Weighted,
    statistics,
    unwhiten,
    whiten,
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
from jaxcompress.types import DType

Sizes = tuple[int, ...]


@leaf
class Tucker(FactoredLeaf):
    """A weight `[..., inputs, outputs]` whose inputs or outputs unfold into axes.

    Invariant: `core` is `[..., *ranks]`, one axis per entry of `factors`; `factors[i]`
    is `[..., size, rank]` of axis i, or None where that axis is not reduced. The first
    `inputs` axes fold into the inputs of the weight, the others into its outputs. The
    dtype is that of the core.

    Example:
      >>> jc.tucker(x, ranks=(4, 4, None), sizes=(8, 8, 64)).core.shape
      (4, 4, 64)
    """

    core: Any
    factors: tuple[Any, ...]
    inputs: int = static()  # how many of the axes

    weights: ClassVar[tuple[str, ...]] = ("core", "factors")

    @property
    def sizes(self) -> Sizes:
        """Sizes of the unfolded axes."""
        pairs = zip(self.factors, self.ranks, strict=True)
        return tuple(size if f is None else f.shape[-2] for f, size in pairs)

    @property
    def shape(self) -> tuple[int, ...]:
        stack = self.core.shape[: -len(self.factors)]
        inputs, outputs = self.sizes[: self.inputs], self.sizes[self.inputs :]
        return (*stack, math.prod(inputs), math.prod(outputs))

    @property
    def dtype(self) -> np.dtype:
        return self.core.dtype

    def inner_moments(self, field: str, moments: Moments | None) -> None:
        """Return None: neither the core nor a factor meets the layer's inputs by
        itself.
        """
        del field, moments

    @property
    def ranks(self) -> Sizes:
        """Sizes of the core's axes."""
        return self.core.shape[-len(self.factors) :]

    def contract_factors(self, x: jax.Array, how: Arithmetic) -> jax.Array:
        """Multiply by the input factors axis by axis, the core, and the output
        factors.
        """
        inwards = self.factors[: self.inputs]
        y = multiply_axes(x, self.sizes[: self.inputs], inwards, how).astype(x.dtype)
        core = unboxed(self.core).reshape((y.shape[-1], -1))
        return self._outwards(contract(y, core, how), x.dtype, how)

    def convolve(
        self, x: jax.Array, convolution: Convolution, window: Sizes, how: Arithmetic
    ) -> jax.Array:
        """Return convolution by the core, between products at each place (Tucker-2)."""
        if self.sizes[: self.inputs] != window:
            return super().convolve(x, convolution, window, how)
        *places, channels = self.factors[: self.inputs]
        if channels is not None:
            x = contract(x, channels, how).astype(x.dtype)
        core = unboxed(self.core)
        for axis, factor in enumerate(places):
            if factor is not None:
                core = multiply_axis(core, unboxed(factor), axis - core.ndim)
        kernel = core.reshape((math.prod(core.shape[: self.inputs]), -1))
        return self._outwards(convolution(x, kernel), x.dtype, how).astype(x.dtype)

    def _outwards(self, y: jax.Array, dtype: DType, how: Arithmetic) -> jax.Array:
        """Multiply coordinates of the outputs, `[..., ranks]`, by the output
        factors.
        """
        factors = [
            None if f is None else unboxed(f).T for f in self.factors[self.inputs :]
        ]
        return multiply_axes(y.astype(dtype), self.ranks[self.inputs :], factors, how)

    def factored_cost(self, rows: int) -> int:
        cut, ranks = self.inputs, self.ranks
        inwards = axes_cost(self.sizes[:cut], ranks[:cut], self.factors[:cut])
        outwards = axes_cost(ranks[cut:], self.sizes[cut:], self.factors[cut:])
        return rows * (inwards + math.prod(ranks) + outwards)

    def dense_cost(self) -> int:
        return axes_cost(self.ranks, self.sizes, self.factors)

    def materialize(self) -> jax.Array:
        core = dense(self.core)
        value = core.astype(jnp.promote_types(core.dtype, jnp.float32))
        for axis, factor in enumerate(self.factors):
            if factor is not None:
                matrix = dense(factor).astype(value.dtype)
                value = multiply_axis(value, matrix, axis - len(self.factors))
        return value.reshape(self.shape).astype(core.dtype)


@method(data=True)
def tucker(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    ranks: tuple[int | None, ...],
    sizes: Sizes | None = None,
    sweeps: int = 5,
    weighted: Weighted = "auto",
    damping: float = 1e-3,
) -> Tucker:
    """Factorize weights into a core of given ranks and an orthonormal factor per axis.

    Starts from the leading singular vectors of each unfolding (the higher-order SVD,
    whose squared error is at most the sum over axes of the squared singular values left
    out) and improves one axis after the other with the others fixed; the error never
    grows. With the ranks None at a window's axes it is the Tucker-2 form of a
    convolution. A leaf with more weights than the kernel is allowed, and saves nothing.

    Args:
      x: floating-point weights `[..., inputs, outputs]`; stacked layers are factorized
        one by one.
      moments: of the inputs, where weighted.
      ranks: per axis, 1 to its size, or None: the axis is kept as it is.
      sizes: of three axes or more into which the inputs, then the outputs unfold:
        (width, heads, head size) of a query kernel, (heads, head size, width) of an
        output projection, (height, width, channels, features) of a convolution.
      sweeps: over all axes after the start; 0 is the higher-order SVD.
      weighted: the loss is the layer's expected squared output instead of squared
        weights, as in `svd`; only where the inputs are a single axis. "auto": where
        they are and there are moments.
      damping: of the second moment, as in `svd`.

    Raises:
      ValueError: no sizes, or sizes that do not multiply to the inputs and outputs, a
        rank out of range, moments missing where `weighted=True`.
      TypeError: weights that are not floating point.

    Example:
      >>> small = jc.tucker(x, ranks=(4, 4, None), sizes=(8, 8, 64))

    Source: De Lathauwer, De Moor, Vandewalle 2000, "A multilinear singular value
    decomposition" and "On the best rank-1 and rank-(R1, ..., RN) approximation";
    Tucker-2 for convolutions as in Kim et al. 2016 (arXiv 1511.06530).
    """
    checks.weights("tucker", x)
    checks.fraction("tucker", "damping", damping, zero=True)
    checks.integer("tucker", "sweeps", sweeps, most=10**6, least=0)
    sizes, inputs = unfolded("tucker", x, sizes)
    if not isinstance(ranks, tuple | list) or len(ranks) != len(sizes):
        raise ValueError(
            f"tucker takes a rank or None for each of the {len(sizes)} axes {sizes}, "
            f"not {ranks!r}"
        )
    for axis, (rank, size) in enumerate(zip(ranks, sizes, strict=True)):
        if rank is not None:
            checks.integer("tucker", f"ranks[{axis}]", rank, most=size)
    second, target, _ = axis_statistics("tucker", x, moments, weighted, inputs, damping)
    one = functools.partial(
        _core_and_factors,
        ranks=tuple(ranks),
        sizes=sizes,
        sweeps=sweeps,
        damping=damping,
    )
    core, factors = each_slice(one, x, second, target)
    return Tucker(core, factors, inputs)


def unfolded(name: str, x: jax.Array, sizes: Any) -> tuple[Sizes, int]:
    """Return the sizes, checked, and how many of the axes are inputs.

    Raises ValueError where there are none or they do not fit `x`, saying what would.
    """
    inputs, outputs = x.shape[-2:]
    wanted = (
        f"pass sizes=(...), three or more whose products are the {inputs} inputs and "
        f"then the {outputs} outputs, for instance (inputs, heads, head size)"
    )
    if sizes is None:
        raise ValueError(
            f"{name} needs to know how the matrix unfolds into axes; {wanted}. For a "
            "matrix that does not unfold use svd"
        )
    whole = isinstance(sizes, tuple | list) and all(
        isinstance(size, int | np.integer) and size >= 1 for size in sizes
    )
    if whole and len(sizes) >= 3:
        for count in range(1, len(sizes)):
            folded = math.prod(sizes[:count]), math.prod(sizes[count:])
            if folded == (inputs, outputs):
                return tuple(int(size) for size in sizes), count
    raise ValueError(f"{name} can't use sizes={sizes!r}; {wanted}")


def axis_statistics(
    name: str,
    x: jax.Array,
    moments: Moments | None,
    weighted: Weighted,
    inputs: int,
    damping: float,
) -> Statistics:
    """Return `statistics` for a weight whose inputs unfold into `inputs` axes."""
    if inputs > 1 and weighted == "auto":
        weighted = False
    if inputs > 1 and weighted:
        raise ValueError(
            f"{name} can be weighted only where the inputs are a single axis, here "
            f"they are {inputs}; pass weighted=False, or use svd"
        )
    if getattr(moments, "curvatures", None) is not None:  # no use here
        moments = dataclasses.replace(moments, curvatures=None)
    return statistics(name, x, moments, weighted, damping)


@functools.partial(jax.jit, static_argnames=("ranks", "sizes", "damping"))
def _core_and_factors(
    x: jax.Array,
    second: jax.Array | None,
    target: jax.Array | None,
    *,
    ranks: tuple[int | None, ...],
    sizes: Sizes,
    sweeps: int,
    damping: float,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    with float64(True):
        tensor, root = axis_whiten(
            x if target is None else target, second, sizes, damping
        )
        reduced = [axis for axis, rank in enumerate(ranks) if rank is not None]
        factors = {i: leading_vectors(tensor, i, ranks[i]) for i in reduced}

        def sweep(_: int, factors: dict[int, jax.Array]) -> dict[int, jax.Array]:
            for i in reduced:
                others = {j: factors[j] for j in reduced if j != i}
                part = _project(tensor, others)
                factors = {**factors, i: leading_vectors(part, i, ranks[i])}
            return factors

        ends = jnp.zeros((), jnp.int32), jnp.asarray(sweeps, jnp.int32)
        factors = jax.lax.fori_loop(*ends, sweep, factors)
        core = _project(tensor, factors)
        if root is not None and 0 in factors:
            factors = {**factors, 0: unwhiten(root, factors[0])}
        elif root is not None:
            flat = unwhiten(root, core.reshape((core.shape[0], -1)))
            core = flat.reshape(core.shape)
        kept = (factors.get(axis) for axis in range(len(sizes)))
        kept = tuple(None if f is None else f.astype(x.dtype) for f in kept)
        return core.astype(x.dtype), kept


def axis_whiten(
    x: jax.Array,
    second: jax.Array | None,
    sizes: Sizes,
    damping: float,
) -> tuple[jax.Array, jax.Array | None]:
    """Return unfolded weight in float64, and the factor by which axis 0 is whitened."""
    wide, root = x.astype(jnp.float64), None
    if second is not None:
        wide, root, _ = whiten(wide, second.astype(jnp.float64), damping)
    return wide.reshape(sizes), root


def unfold(tensor: jax.Array, axis: int) -> jax.Array:
    """Unfold an array along one axis: `[size of the axis, all others in order]`."""
    return jnp.moveaxis(tensor, axis, 0).reshape((tensor.shape[axis], -1))


def leading_vectors(tensor: jax.Array, axis: int, rank: int) -> jax.Array:
    """Return leading left singular vectors of an unfolding, `[size, rank]`,
    orthonormal.
    """
    matrix = unfold(tensor, axis)
    _, vectors = jnp.linalg.eigh(matrix @ matrix.T)
    return vectors[:, ::-1][:, :rank]


def multiply_axis(tensor: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """Apply `matrix` `[..., new, old]` along a negative axis of `[..., *axes]`.

    The leading axes of both are the same stack.
    """
    lead = matrix.ndim - 2
    moved = jnp.moveaxis(tensor, axis, lead)
    flat = moved.reshape((*moved.shape[: lead + 1], -1))
    product = jnp.matmul(matrix, flat, precision=jax.lax.Precision.HIGHEST)
    unfolded = product.reshape((*product.shape[:-1], *moved.shape[lead + 1 :]))
    return jnp.moveaxis(unfolded, lead, axis)


def multiply_axes(
    x: jax.Array, sizes: Sizes, factors: Sequence[Any], how: Arithmetic
) -> jax.Array:
    """Multiply each axis of a folded `x` `[..., *sizes]` by its `[size, new]`.

    An axis whose factor is None stays. Every product is rounded to the dtype of `x`
    but for the last. Returns `[..., product of the new sizes]`.
    """
    lead, dtype = x.shape[:-1], x.dtype
    y = x.reshape(lead + sizes)
    for axis, factor in enumerate(factors):
        if factor is not None:
            moved = jnp.moveaxis(y.astype(dtype), len(lead) + axis, -1)
            y = jnp.moveaxis(contract(moved, factor, how), -1, len(lead) + axis)
    return y.reshape((*lead, -1))


def axes_cost(before: Sizes, after: Sizes, factors: Sequence[Any]) -> int:
    """Return multiplications that taking one `[*before]` to `[*after]` by factors
    needs.
    """
    total, sizes = 0, list(before)
    for axis, factor in enumerate(factors):
        if factor is not None:
            total += math.prod(sizes) * after[axis]
            sizes[axis] = after[axis]
    return total


def _project(tensor: jax.Array, factors: dict[int, jax.Array]) -> jax.Array:
    """Return the tensor in the coordinates of orthonormal factors, by axis."""
    for axis, factor in factors.items():
        tensor = multiply_axis(tensor, factor.T, axis - tensor.ndim)
    return tensor

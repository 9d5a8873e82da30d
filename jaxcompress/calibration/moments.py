"""`Moments`: what a method may know about the inputs of a kernel."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress.calibration.targets import (
    corrected_targets,
    fill_unseen,
    has_zero_slice,
    refuse_not_finite,
    warn_unseen,
)
from jaxcompress.tree.layouts import Layout, trailing
from jaxcompress.types import DType


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Averages over tokens of a kernel's inputs `x`, and the number of tokens.

    A commutative monoid under `+`, which weighs by `count`; `empty_moments` is its
    identity. A pytree of float32 or wider arrays; leading axes `...` are the stack axes
    of the kernel. `mean` and `second` are None for an embedding that is only looked up;
    the other fields are None where they are not known. Not centred: the covariance is
    `covariance`, the sum of `x x^T` is `count * second`.

    `layout` names the axes of the kernel that are inputs and outputs, as `trailing`
    does: without the stack, axes counted from the last, so that slices of a stack keep
    it. None: unknown, `compress` then uses `layouts=` or the name.

    Example:
      >>> both = of_x + of_x
      >>> both.count == 2 * of_x.count
      Array(True, dtype=bool)
    """

    count: jax.Array  # [...] tokens seen; padding does not count
    mean: jax.Array | None = None  # [..., inputs] average of x
    second: jax.Array | None = None  # [..., inputs, inputs] average of x x^T
    drifted: jax.Array | None = None  # same of x', the compressed prefix's inputs
    cross: jax.Array | None = None  # [..., inputs, inputs] average of x x'^T
    tokens: jax.Array | None = None  # [..., rows] times each embedding row was read
    curvatures: jax.Array | None = None  # [..., outputs] of `measure_curvatures`
    joint_curvatures: jax.Array | None = None  # [..., outputs, outputs] likewise
    layout: Layout | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def looked_up(self) -> bool:
        """Whether no inputs are known: an embedding that is only looked up."""
        return self.second is None and self.drifted is None

    @property
    def norms(self) -> jax.Array:
        """Root mean square of each input, `[..., inputs]`."""
        diagonal = jnp.diagonal(self.second, axis1=-2, axis2=-1)
        return jnp.sqrt(jnp.maximum(diagonal, 0))

    @property
    def covariance(self) -> jax.Array:
        """Central second moment, `[..., inputs, inputs]`."""
        return self.second - self.mean[..., :, None] * self.mean[..., None, :]

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of tokens; traceable.

        A side without a layout takes that of the other. Raises ValueError where one
        side knows another field that the other does not, or where layouts differ.
        """
        if not isinstance(other, Moments):
            return NotImplemented
        total = self.count + other.count
        share = other.count / jnp.where(total > 0, total, 1)  # both may be empty
        merged: dict[str, Any] = {"count": total}
        merged["layout"] = common_layout(self, other)
        for field in AVERAGED:
            a, b = getattr(self, field), getattr(other, field)
            if field == "joint_curvatures" and (a is None or b is None):
                a = b = None  # one side's tokens said too little
            if (a is None) != (b is None):
                raise ValueError(
                    f"only one side of the sum of moments has {field!r}; add "
                    "moments collected in the same way"
                )
            if a is not None and a.shape != b.shape:
                raise ValueError(
                    f"moments of different kernels: {field!r} has shape {a.shape} "
                    f"and {b.shape}"
                )
            if a is None:
                merged[field] = None
            elif field == "tokens":
                merged[field] = a + b
            else:
                weight = jnp.expand_dims(share, tuple(range(share.ndim, a.ndim)))
                merged[field] = a + (b - a) * weight.astype(a.dtype)
        return Moments(**merged)

    def target_problem(
        self, x: jax.Array, method: str, *, damping: float | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the least-squares problem of data-driven methods: target and second
        moment.

        The error of weights W is `tr((W - target)^T second (W - target))`. `second` is
        that of the inputs which the compressed layer will see: those after the
        compressed prefix, where they are known. With a damping, the target then
        compensates the prefix, the weights of least squares `drifted^-1 cross^T x`;
        else it is `x` itself. Traceable.

        Args:
          x: weights `[..., inputs, outputs]`.
          method: its name, for messages.
          damping: added to the diagonal of the drifted moment, as a fraction of its
            mean; None where a method only chooses among the weights of `x`.

        Returns:
          `(target, second)`: `x`, or float32 of its shape; `[..., inputs, inputs]`.

        Raises:
          ValueError: a moment that is missing, does not fit or is not finite.
        """
        if self.drifted is None:
            return x, require(self, x, method).second
        fields = ("drifted",) if damping is None else ("drifted", "cross")
        checked = require(self, x, method, fields=fields)
        if damping is None:
            return x, checked.drifted
        target = corrected_targets(x, checked.drifted, checked.cross, damping=damping)
        return target, checked.drifted

    def checked(self, name: str) -> "Moments":
        """Return the moments, finite, with slices that saw no token as `fill_unseen`
        has them.

        Traced moments are not looked at, only filled.

        Args:
          name: of the leaf or the method, for messages.

        Warns with the slices of a stack that no token reached.

        Raises:
          ValueError: NaN or infinite entries.
        """
        named = {key: getattr(self, key) for key in ("count", *AVERAGED)}
        named = {key: x for key, x in named.items() if x is not None}
        moments = {key: named[key] for key in _SECONDS if key in named}
        if any(isinstance(x, Tracer) for x in named.values()):
            return dataclasses.replace(self, **fill_unseen(moments))
        refuse_not_finite(name, named)
        key = "second" if self.drifted is None else "drifted"
        gaps = key in moments and warn_unseen(name, moments[key])
        gaps = gaps or ("cross" in moments and has_zero_slice(moments["cross"]))
        if not gaps:
            return self
        return dataclasses.replace(self, **fill_unseen(moments))

    def psum(self, axis_name: Any) -> "Moments":
        """Sum the moments over a mapped axis (`shard_map`, `pmap`, `vmap`)."""
        total = jax.lax.psum(self.count, axis_name)
        share = self.count / jnp.where(total > 0, total, 1)  # all may be empty
        merged: dict[str, Any] = {"count": total, "layout": self.layout}
        for field in AVERAGED:
            x = getattr(self, field)
            if x is not None and field != "tokens":
                weight = jnp.expand_dims(share, tuple(range(share.ndim, x.ndim)))
                x = x * weight.astype(x.dtype)
            merged[field] = None if x is None else jax.lax.psum(x, axis_name)
        return Moments(**merged)

    def project(self, weight: jax.Array) -> "Moments":
        """Return the moments of `x @ weight`, for a `weight` `[..., inputs, outputs]`.

        They have no layout: their inputs are no axis of the kernel any more.
        """
        wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
        changed: dict[str, Any] = dict.fromkeys(
            ("tokens", "curvatures", "joint_curvatures", "layout")
        )
        if self.mean is not None:
            mean = _matmul(self.mean[..., None, :], wide)
            changed["mean"] = mean.squeeze(-2)
        for name in ("second", "drifted", "cross"):
            matrix = getattr(self, name)
            if matrix is not None:
                left = _matmul(jnp.swapaxes(wide, -1, -2), matrix)
                changed[name] = _matmul(left, wide)
        return dataclasses.replace(self, **changed)

    def stretch(self, factors: jax.Array) -> "Moments":
        """Return the moments of `x * factors`, for factors `[..., inputs]`."""
        wide = factors.astype(jnp.promote_types(factors.dtype, jnp.float32))
        changed: dict[str, Any] = {}
        if self.mean is not None:
            changed["mean"] = self.mean * wide
        for name in ("second", "drifted", "cross"):
            matrix = getattr(self, name)
            if matrix is not None:
                changed[name] = matrix * wide[..., :, None] * wide[..., None, :]
        return dataclasses.replace(self, **changed)


_SECONDS = ("second", "drifted", "cross")
AVERAGED = (
    "mean",
    "second",
    "drifted",
    "cross",
    "tokens",
    "curvatures",
    "joint_curvatures",
)


def common_layout(a: Moments, b: Moments) -> Layout | None:
    """Return the layout of both; raises ValueError where they know different ones."""
    if a.layout is None or b.layout is None:
        return a.layout or b.layout
    if trailing(a.layout) != trailing(b.layout):
        raise ValueError(
            f"moments of one kernel with two layouts, {a.layout} and {b.layout}; add "
            "moments collected with models that store it in the same way"
        )
    return a.layout


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def empty_moments(
    inputs: int, *, stack: tuple[int, ...] = (), dtype: DType = jnp.float32
) -> Moments:
    """Return the moments of no tokens: the identity of `+` for those of one kernel."""
    return Moments(
        count=jnp.zeros(stack, dtype),
        mean=jnp.zeros((*stack, inputs), dtype),
        second=jnp.zeros((*stack, inputs, inputs), dtype),
    )


def moments_from_covariance(covariance: jax.Array, *, count: float = 1.0) -> Moments:
    """Return moments of inputs of mean zero and this covariance; for synthetic studies.

    Args:
      covariance: `[..., inputs, inputs]`, symmetric; kept in float32 or wider.
      count: its tokens when it is added to other moments.

    Raises:
      ValueError: not square, not symmetric, or not finite.

    Example:
      >>> jc.moments_from_covariance(jnp.eye(64), count=1000).second.shape
      (64, 64)
    """
    covariance = jnp.asarray(covariance)
    wide = jnp.promote_types(covariance.dtype, jnp.float32)
    covariance = covariance.astype(wide)
    if covariance.ndim < 2 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(
            f"a covariance is [..., inputs, inputs], this has shape {covariance.shape}"
        )
    if not isinstance(covariance, Tracer):
        gap = jnp.max(jnp.abs(covariance - jnp.swapaxes(covariance, -1, -2)))
        largest = jnp.max(jnp.abs(covariance))
        if not math.isfinite(largest):
            raise ValueError("the covariance has NaN or infinite entries")
        if gap > 1e-4 * largest:
            raise ValueError(
                f"the covariance is not symmetric: entries differ by {float(gap):.3g} "
                f"where the largest is {float(largest):.3g}; pass (c + c.T) / 2"
            )
    return Moments(
        count=jnp.full(covariance.shape[:-2], count, wide),
        mean=jnp.zeros(covariance.shape[:-1], wide),
        second=covariance,
    )


def check_curvatures(moments: Mapping[str, Any]) -> bool:
    """Return whether leaves have curvatures that they can be weighed by, one against
    another.

    Raises ValueError, naming a leaf, where only some have them, or where those of a
    slice are all zero or not finite.
    """
    curvatures = {name: getattr(x, "curvatures", None) for name, x in moments.items()}
    if all(counts is None for counts in curvatures.values()):
        return False
    again = "measure them with the same pattern, on batches that reach this leaf"
    for name, counts in curvatures.items():
        if counts is None:
            raise ValueError(f"{name}: no curvatures, and others have them; {again}")
        if not (np.isfinite(counts).all() and (np.mean(counts, axis=-1) > 0).all()):
            raise ValueError(
                f"{name}: curvatures that are all zero, or not finite; {again}"
            )
    return True


def require(
    moments: Moments | None,
    x: jax.Array,
    method: str,
    *,
    fields: tuple[str, ...] = ("second",),
) -> Moments:
    """Return the moments, `checked`, once they are known to be there and to fit `x`.

    Args:
      moments: what the method was given.
      x: the weight, `[..., inputs, outputs]`.
      method: name of the method, for the message.
      fields: fields of `Moments` that the method reads.

    Raises:
      ValueError: no moments, a field that is None, shapes that do not fit, or entries
        that are not finite.
    """
    if moments is None:
        raise ValueError(
            f"{method} needs moments of the inputs and got none; pass "
            "moments=collect_moments(model, params, batches)"
        )
    if not isinstance(moments, Moments):
        raise ValueError(
            f"{method} needs Moments, this is a {type(moments).__name__}; make them "
            "with collect_moments or moments_from_covariance"
        )
    stack, inputs, outputs = x.shape[:-2], x.shape[-2], x.shape[-1]
    square = (*stack, inputs, inputs)
    wanted = {
        "count": stack,
        "mean": (*stack, inputs),
        "second": square,
        "drifted": square,
        "cross": square,
        "tokens": (*stack, outputs),
        "curvatures": (*stack, outputs),
        "joint_curvatures": (*stack, outputs, outputs),
    }
    for name in fields:
        value = getattr(moments, name)
        if value is None:
            raise ValueError(f"{method} needs the moments' {name!r}: {_ABSENT[name]}")
        if tuple(value.shape) != wanted[name]:
            raise ValueError(
                f"{method}: the moments' {name!r} has shape {tuple(value.shape)}, and "
                f"a weight [..., inputs, outputs] of shape {tuple(x.shape)} needs "
                f"{wanted[name]}; collect them with the same model and parameters"
            )
    return moments.checked(method)


_LOOKED_UP = (
    "an embedding that is only looked up has no inputs to average; keep it with a rule "
    "(pattern, None), or give it a method that needs no moments"
)
_ABSENT = {
    "count": "make them with collect_moments",
    "mean": _LOOKED_UP,
    "second": _LOOKED_UP,
    "drifted": "compress with compress_blockwise, which measures the drift",
    "cross": "compress with compress_blockwise, which measures the drift",
    "tokens": "only an embedding that is looked up has token counts",
    "curvatures": "complete the moments with measure_curvatures",
    "joint_curvatures": "complete the moments with measure_curvatures",
}

"""Low-rank error compensation (QERA)."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxcompress import checks
from jaxcompress.calibration.moments import Moments
from jaxcompress.factorization.svd import (
    Weighted,
    nearest,
    statistics,
)
from jaxcompress.tree.generic_leaves import Sum
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.methods import describe, method, parse, traits
from jaxcompress.types import Method


def _as_traceable_as_its_base(options: Mapping[str, Any]) -> bool:
    return "base" not in options or bool(traits(_method(options["base"])).traceable)


def _without_data(options: Mapping[str, Any]) -> Any:
    """Return the method itself, with a base that needs no data."""
    base = _method(options["base"]) if "base" in options else None
    rule = None if base is None else traits(base).without_data
    return corrected(
        **(dict(options) if rule is None else {**options, "base": describe(rule)})
    )


@method(traceable=_as_traceable_as_its_base, data=True, without_data=_without_data)
def corrected(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    base: Method | str,
    rank: int,
    weighted: Weighted = "auto",
    damping: float = 1e-3,
) -> Sum:
    """QERA: Compress by another method, and add a low-rank product fitted to its error.

    The product is the one of this rank that leaves least of the error, in squared
    weights or, weighted, in the layer's expected squared output (with drifted moments,
    against the original layer on the original inputs). Its factors are floating point;
    a later stage may quantize `.../terms/1/left` and `right`.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs; the base method gets them too.
      base: the method, or its string: `"symmetric(bits=3, block=64)"`.
      rank: 1 to `min(inputs, outputs)`.
      weighted: "auto": where there are moments with a second moment.
      damping: of the second moment, as in `svd`; 0 to 1.

    Returns:
      `Sum((base, LowRank))`; `compressed_matmul` multiplies term by term where that is
      cheaper.

    Raises:
      ValueError: an option out of range, a base that is not a method on weights,
        moments missing or of another shape.
      TypeError: weights that are not floating point.

    Example:
      >>> small = jc.corrected(x, of_x, base="symmetric(bits=3, block=32)", rank=8)

    Source: Zhang et al. 2024, "QERA" (arXiv 2410.06040), theorem 1; the whitening is by
    a Cholesky factor instead of the symmetric root, which gives the same product.
    """
    checks.weights("corrected", x)
    checks.fraction("corrected", "damping", damping, zero=True)
    checks.integer("corrected", "rank", rank, most=min(x.shape[-2:]))
    second = statistics("corrected", x, moments, weighted, damping)
    coarse = _method(base)(x, moments)
    if getattr(coarse, "shape", None) != x.shape:
        raise ValueError(
            f"the base {describe(_method(base))} did not return a weight of shape "
            f"{x.shape}; corrected takes a method on weights, such as symmetric"
        )
    thin = nearest(x, dense(coarse), second, rank=rank, damping=damping)
    return Sum((coarse, thin))


def _method(base: Any) -> Method:
    f = parse(base) if isinstance(base, str) else base
    if not callable(f) or traits(f).selects != "weights":
        raise ValueError(
            "corrected takes as its base a method on weights or its string, such as "
            f"'symmetric(bits=3, block=64)', not {base!r}"
        )
    return f

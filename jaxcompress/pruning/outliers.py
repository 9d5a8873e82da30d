"""Dense plus sparse: outliers stored apart from the other weights."""

from typing import Any, Literal

import jax.numpy as jnp

from jaxcompress import checks
from jaxcompress.calibration.moments import Moments
from jaxcompress.pruning.choices import Choice, select
from jaxcompress.pruning.scores import input_norms, kept_weights
from jaxcompress.tree.generic_leaves import Sum
from jaxcompress.tree.methods import method

SCORES = ("weight", "activation")


@method(data=True, without_data=lambda o: outliers(**{**o, "score": "weight"}))
def outliers(
    x: Any,
    moments: Moments | None = None,
    *,
    fraction: float,
    score: Literal["weight", "activation"] | None = None,
    scope: Literal["leaf", "row"] = "leaf",
) -> Sum:
    """Split a weight into its outliers, `Sparse`, and the rest, dense and still exact.

    The rest, `terms/0`, has zeros in place of the outliers, so that a later stage
    rounds it with finer steps; its moments are those of the whole layer. Positions are
    a bitmap, one bit per weight in memory; entropy coding makes that 0.05 bits at
    `fraction=0.005`.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs; not needed where `score="weight"`.
      fraction: fraction of the weights that are outliers, above 0 and below 1.
      score: "weight": magnitude; "activation": times the root mean square of the
        input. None: "activation" with moments, else "weight".
      scope: they are the first of the "leaf" (each slice of a stack) or of each "row"
        (one output).

    Raises:
      ValueError: an option out of range, no moments where the score needs them.
      TypeError: weights that are not floating point.

    Example:
      >>> split = [(".*kernel", "outliers(fraction=0.005)")]
      >>> rest = [(".*kernel/terms/0", "symmetric(bits=3, block=64)")]
      >>> small = jc.compress(params, jc.chain(split, rest))

    Source: SpQR (Dettmers et al. 2023, arXiv 2306.03078) and SqueezeLLM (Kim et al.
    2023, arXiv 2306.07629, section 4.2).
    """
    checks.weights("outliers", x)
    checks.fraction("outliers", "a fraction (of weights kept apart)", fraction)
    score = score or ("weight" if moments is None else "activation")
    checks.one_of("outliers", "score", score, SCORES)
    worth = jnp.abs(x.astype(jnp.float32))
    if score == "activation":
        worth = worth * input_norms(x, moments, "outliers")
    if scope not in ("leaf", "row"):
        raise ValueError(f"outliers takes scope='leaf' or 'row', not {scope!r}")
    of = x.shape[-2] * (1 if scope == "row" else x.shape[-1])
    chosen = Choice(scope, (1, 1), of, round(fraction * of))
    if not 0 < chosen.kept < of:
        raise ValueError(
            f"outliers would keep {chosen.kept} of {of} weights apart "
            f"(fraction={fraction!r}); "
            "keep at least one and fewer than all"
        )
    mask = select(worth, chosen)
    return Sum((jnp.where(mask, 0, x), kept_weights(x, mask, chosen)))

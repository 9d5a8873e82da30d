"""Mixed precision inside a layer: the channels that matter most stay finer."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import each_slice, inverse_factor
from jaxcompress.calibration.moments import Moments, require
from jaxcompress.quantization.gptq import NEAREST
from jaxcompress.quantization.grids import Block
from jaxcompress.quantization.nearest import check_bits
from jaxcompress.tree.generic_leaves import Mixed
from jaxcompress.tree.methods import method

SCORES = ("weight", "activation", "second_order")


@method(data=True, without_data=lambda o: mixed_channels(**{**o, "score": "weight"}))
def mixed_channels(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    bits: int,
    fraction: float | None = None,
    channels: int | None = None,
    fine_bits: int | None = None,
    score: Literal["weight", "activation", "second_order"] | None = None,
    axis: Literal["inputs", "outputs"] = "inputs",
    block: Block = None,
    grid: Literal["symmetric", "asymmetric"] = "symmetric",
    scale_dtype: str = "bfloat16",
) -> Mixed:
    """Quantize a kernel to `bits`, but the channels that matter most to `fine_bits`.

    A channel's score is the squared error that `bits` would make there. Outlier inputs
    (large activations) are why some matter much more than others.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs, `second`, or `drifted`; not needed where
        `score="weight"`.
      bits: of most channels.
      fraction, channels: exactly one: how many channels stay finer, as a fraction above
        0 and below 1, or as a number of them.
      fine_bits: of those; None keeps them in the dtype of `x`.
      score: "weight": squared error of the weights; "activation": times the mean square
        of their inputs; "second_order": the change of the layer's output once the
        other inputs compensate (`axis="inputs"`), or with the whole second moment
        (`axis="outputs"`). None: "activation" with moments, else "weight".
      axis: whether channels are inputs (rows of `x`) or outputs.
      block: inputs that share a step.
      grid: "symmetric" or "asymmetric".
      scale_dtype: of the stored steps.

    Raises:
      ValueError: no moments where the score needs them, an option out of range.

    Example:
      >>> small = jc.mixed_channels(x, of_x, bits=3, fraction=0.05)

    Source: outlier columns as in LLM.int8() (arXiv 2208.07339) and OWQ (arXiv
    2306.02272).
    """
    checks.one_of("mixed_channels", "grid", grid, ("symmetric", "asymmetric"))
    checks.one_of("mixed_channels", "axis", axis, ("inputs", "outputs"))
    score = score or ("weight" if moments is None else "activation")
    checks.one_of("mixed_channels", "score", score, SCORES)
    if fine_bits is not None:
        check_bits("mixed_channels", fine_bits, 8)
    where = -2 if axis == "inputs" else -1
    count = _count(fraction, channels, x.shape[where])
    options = {"block": block, "search": True, "scale_dtype": scale_dtype}
    coarse = NEAREST[grid](x, bits=bits, **options).materialize()
    error = _errors(x, coarse, moments, score, where)
    chosen = jnp.argsort(-error, axis=-1)[..., :count]
    kept = jnp.put_along_axis(
        jnp.zeros(error.shape, bool), chosen, True, axis=-1, inplace=False
    )
    order = jnp.argsort(~kept, axis=-1, stable=True)
    wide = order[..., :, None] if axis == "inputs" else order[..., None, :]
    sorted_ = jnp.take_along_axis(x, wide, axis=where)
    first, rest = jnp.split(sorted_, [count], axis=where)
    if fine_bits is not None:
        first = NEAREST[grid](first, bits=fine_bits, **options)
    return Mixed(
        kept=first,
        rest=NEAREST[grid](rest, bits=bits, **options),
        order=order.astype(jnp.uint16 if x.shape[where] < 2**16 else jnp.uint32),
        axis=where,
    )


def _count(fraction: float | None, channels: int | None, total: int) -> int:
    if (fraction is None) == (channels is None):
        raise ValueError(
            "mixed_channels takes exactly one of fraction= and channels=, not "
            f"fraction={fraction!r} and channels={channels!r}"
        )
    count: Any = channels
    if fraction is not None:
        checks.fraction("mixed_channels", "a fraction", fraction, zero=True, one=True)
        count = round(fraction * total)
    checks.integer("mixed_channels", "number of channels", count, least=0)
    if not 1 <= count < total:
        raise ValueError(
            f"mixed_channels would keep {count} of {total} channels finer; keep at "
            "least one and fewer than all"
        )
    return count


def _errors(
    x: jax.Array, coarse: jax.Array, moments: Moments | None, score: str, where: int
) -> jax.Array:
    """Return squared error per channel, `[..., channels]`."""
    change = coarse.astype(jnp.float32) - x.astype(jnp.float32)
    if score == "weight":
        return jnp.sum(jnp.square(change), axis=-3 - where)
    checked = require(moments, x, "mixed_channels", fields=())
    _, second = checked.target_problem(x, "mixed_channels")
    if score == "second_order" and where == -1:
        moved = jnp.matmul(second, change, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(change * moved, axis=-2)
    square = jnp.diagonal(second, axis1=-2, axis2=-1)
    if score == "second_order":
        square = _conditional(second)
    return jnp.sum(jnp.square(change) * square[..., :, None], axis=-3 - where)


def _conditional(second: jax.Array) -> jax.Array:
    """Return mean square of each input that the others do not explain: 1 /
    diag(S^-1).
    """

    def one(matrix: jax.Array) -> jax.Array:
        factor = inverse_factor(matrix)
        return 1 / jnp.sum(jnp.square(factor), axis=0)

    return each_slice(one, second)

"""Automatic quantization: the grid found by gradient descent on the error it makes."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import damped, each_slice, layer_loss
from jaxcompress.calibration.moments import Moments, require
from jaxcompress.quantization.adaround import descend_relaxed
from jaxcompress.quantization.gptq import NEAREST, gptq
from jaxcompress.quantization.grids import Block, Quantized, Scheme, Steps, quantized
from jaxcompress.quantization.learned_bits import START, continuous_bits
from jaxcompress.quantization.learned_steps import (
    Place,
    descend_gradients,
    descend_outputs,
    descend_weights,
    output_error,
)
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.methods import method

OBJECTIVES = ("weights", "outputs")
ROUNDINGS = {
    "weights": ("nearest",),
    "outputs": ("coordinates", "relaxed", "offsets", "nearest"),
    "function": ("relaxed", "offsets", "nearest"),
}
Objective = Literal["weights", "outputs"] | Callable[[jax.Array], jax.Array] | None


def _shapes_known(options: Mapping[str, Any]) -> bool:
    return options.get("bits") != "auto"


def _without_data(options: dict[str, Any]) -> Any:
    """Return the method itself, on the squared error of the weights."""
    if callable(options.get("objective")):
        return learned(**options)
    return learned(**{**options, "objective": "weights", "rounding": None})


@method(traceable=_shapes_known, data=True, without_data=_without_data)
def learned(
    x: jax.Array,
    moments: Moments | None = None,
    *,
    bits: Any,
    block: Block = None,
    grid: Literal["symmetric", "asymmetric", "sign_split"] = "symmetric",
    objective: Objective = None,
    rounding: Literal["coordinates", "relaxed", "offsets", "nearest"] | None = None,
    cost: float = 0.01,
    steps: int = 120,
    learning_rate: float = 0.01,
    damping: float = 0.01,
    scale_dtype: str = "bfloat16",
) -> Quantized:
    """Minimize the quantization error by gradient descent over the grid's parameters.

    Steps (and with them clipping) and zero points descend, gradients passing the
    rounding straight through. The best is kept, so that the result is never worse than
    its start: rounding to nearest with searched steps, or, where codes move in turn,
    `gptq` if that is better.

    Args:
      x: floating-point weights `[..., inputs, outputs]`.
      moments: of the inputs, `second`, or `drifted` and `cross` (the target is then
        corrected for the compressed prefix, as in `gptq`); or None.
      bits: as the grid's nearest method takes them, 2 or more; or "auto": the width
        too, on both sides of `sign_split` alike. Step and range then descend as real
        numbers on the relative squared error plus `cost * bits`, and of the whole
        widths next to the one found the better is taken. Not under `jit`.
      block: inputs that share a step; None: all; "tensor": the matrix.
      grid: "symmetric", "asymmetric" (zero point) or "sign_split".
      objective: the error. "weights": squared, every block keeping its best. "outputs":
        the expected squared change of the layer's output. Or a function of the dense
        float32 weight, the shape of `x`, that returns a number, traceable. None:
        "outputs" with moments, else "weights".
      rounding: how codes are found, best first where several will do.
        "coordinates": steps descend with the codes fixed, then every code moves to the
        level that is best with all others fixed, in turn; only for "outputs",
        where it is exact, and its default. "relaxed": up or down is a real number that
        is pushed to either end (AdaRound); the default for a function. "offsets": of
        every weight, within half a level, by the signs of gradients (AutoRound).
        "nearest": to the nearest; the default for "weights", where nothing is better.
      cost: with `bits="auto"`, the relative squared error that a bit must save: 0.01
        makes about 4 bits, a quarter of it one more.
      steps: of gradient descent; each costs one product with the second moment, or the
        function and its gradient.
      learning_rate: in log scales, and in levels for zero points; decays to 0.
      damping: of the second moment, as in `gptq`.
      scale_dtype: of the stored scales.

    Raises:
      ValueError: moments that do not fit, an option out of range.
      TypeError: `bits="auto"` under a trace.

    Example:
      >>> small = jc.learned(x, of_x, bits=3, block=32, steps=5)

    Source: learned steps as in LSQ (Esser et al. 2019, arXiv 1902.08153); AdaRound
    (Nagel et al. 2020, arXiv 2004.10568), AutoRound (Cheng et al. 2023, arXiv
    2309.05516); step and range in the place of the width, Uhlich et al. 2019 (arXiv
    1905.11452).
    """
    kind = _objective(objective, moments)
    rounding = rounding or ROUNDINGS[kind][0]
    _check(bits, grid, kind, rounding, steps, cost)
    target, second = x.astype(jnp.float32), None
    if kind == "outputs":
        target, second = _target(x, moments, damping)
    custom = objective if kind == "function" else None
    problem = _Problem(x, target, second, moments, custom, damping)
    place = Place(
        Scheme(grid, bits, block, scale_dtype), steps, learning_rate, rounding
    )
    if bits == "auto":
        return _with_width(problem, place, cost)
    return _with_bits(problem, place)


class _Problem(NamedTuple):
    """The approximation problem: the target, and how the error is measured.

    `target` is float32; `second` is damped, and None where the error is not that of the
    outputs; `objective` is a function given by the user, or None.
    """

    x: jax.Array
    target: jax.Array
    second: jax.Array | None
    moments: Moments | None
    objective: Callable[[jax.Array], jax.Array] | None
    damping: float


def _objective(objective: Objective, moments: Moments | None) -> str:
    if objective is None:
        return "weights" if moments is None else "outputs"
    if callable(objective):
        return "function"
    if objective not in OBJECTIVES:
        raise ValueError(
            f"learned takes objective='weights', 'outputs' or a function of the dense "
            f"weight, not {objective!r}"
        )
    return objective


def _check(
    bits: Any, grid: str, kind: str, rounding: str, steps: Any, cost: Any
) -> None:
    checks.one_of("learned", "grid", grid, NEAREST)
    if rounding not in ROUNDINGS[kind]:
        raise ValueError(
            f"learned takes rounding={' or '.join(map(repr, ROUNDINGS[kind]))} where "
            f"the objective is {kind}, not {rounding!r}"
        )
    checks.integer("learned", "number of steps", steps)
    if grid == "symmetric" and bits == 1:
        raise ValueError("learned takes 2 or more bits: one bit has only its mean")
    if isinstance(bits, str) and bits != "auto":
        raise ValueError(f"learned takes bits='auto' or numbers, not {bits!r}")
    if bits == "auto":
        checks.positive("learned", "a cost of bits", cost)


def _sides(width: int, grid: str) -> Any:
    """Return bits of codes that take `width`; sign_split has two sides of one less."""
    return (width - 1, width - 1) if grid == "sign_split" else width


def _target(
    x: jax.Array, moments: Moments | None, damping: float
) -> tuple[jax.Array, jax.Array]:
    """Return target weights and the damped second moment of what multiplies them."""
    checked = require(moments, x, "learned", fields=())
    target, second = checked.target_problem(x, "learned", damping=damping)
    safe = each_slice(functools.partial(damped, damping=damping), second)
    return target.astype(jnp.float32), safe


def _with_width(problem: _Problem, place: Place, cost: float) -> Quantized:
    """Return the leaf of the width that pays for its cost; reads values."""
    error = _relative_error(problem)
    learned = continuous_bits(
        problem.target,
        error,
        grid=place.scheme.grid,
        block=place.scheme.block,
        cost=cost,
        steps=place.steps,
    )

    def total(width: int, leaf: Quantized) -> float:
        return float(error(leaf.materialize().astype(jnp.float32))) + cost * width

    tried = []
    for width in sorted({math.floor(learned), math.ceil(learned)}):
        leaf = _with_bits(
            problem, _with_width_of(place, _sides(width, place.scheme.grid))
        )
        tried.append((total(width, leaf), leaf))
    start = _nearest(problem.x, _with_width_of(place, _sides(START, place.scheme.grid)))
    tried.append((total(START, start), start))
    return min(tried, key=lambda pair: pair[0])[1]


def _relative_error(problem: _Problem) -> Callable[[jax.Array], jax.Array]:
    """Return the error of a dense weight, over what all-zero weights would make."""
    target, second = problem.target, problem.second

    def loss(value: jax.Array) -> jax.Array:
        if problem.objective is not None:
            return problem.objective(value)
        if second is None:
            return jnp.sum(jnp.square(value - target))
        return jnp.sum(layer_loss(target, value, second))

    whole = loss(jnp.zeros_like(target))
    whole = jnp.where(whole > 0, whole, 1)  # all-zero weights
    return lambda value: loss(value) / whole


def _with_width_of(place: Place, bits: Any) -> Place:
    """Return a place for codes of so many bits."""
    return place._replace(scheme=place.scheme._replace(bits=bits))


def _nearest(x: jax.Array, place: Place) -> Quantized:
    return NEAREST[place.scheme.grid](
        x,
        bits=place.scheme.bits,
        block=place.scheme.block,
        search=True,
        scale_dtype=place.scheme.scale_dtype,
    )


def _with_bits(problem: _Problem, place: Place) -> Quantized:
    """Return the leaf of a given width; traceable."""
    x, target, second, moments, objective, damping = problem
    nearest = _nearest(x, place)
    place = _with_width_of(place, nearest.bits)
    if place.rounding == "coordinates":
        options: dict[str, Any] = place.scheme._asdict()
        fed = gptq(x, moments, damping=damping, **options)
        one = functools.partial(descend_outputs, place=place)
        starts = (dense(nearest), dense(fed))
        codes, steps = each_slice(one, target, second, nearest.steps, *starts)
    elif second is not None:
        one = functools.partial(_by_gradients, place=place)
        codes, steps = each_slice(one, target, second, nearest.steps)
    elif objective is not None:
        by = descend_relaxed if place.rounding == "relaxed" else descend_gradients
        codes, steps = by(target, nearest.steps, objective, place)
    else:
        one = functools.partial(descend_weights, place=place)
        codes, steps = each_slice(one, target, nearest.steps)
    return quantized(
        codes,
        steps,
        place.scheme,
        dtype=x.dtype,
    )


@functools.partial(jax.jit, static_argnames="place")
def _by_gradients(
    target: jax.Array, second: jax.Array, start: Steps, *, place: Place
) -> tuple[jax.Array, Steps]:
    """Return codes and steps of one slice by the gradients of its output error."""
    descent = descend_relaxed if place.rounding == "relaxed" else descend_gradients
    loss = functools.partial(output_error, target, second)
    return descent(target, start, loss, place)

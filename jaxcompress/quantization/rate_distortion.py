"""Quantization at the rate-distortion bound: a step for each input, coded levels."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.calibration.error_feedback import feed_back
from jaxcompress.calibration.masked import Masked, fill
from jaxcompress.calibration.moments import Moments, require
from jaxcompress.calibration.output_feedback import (
    count_groups,
    output_costs,
    output_feedback,
    stretched,
)
from jaxcompress.coding.levels import contexts, rate_coded, trellis
from jaxcompress.coding.levels import leaf as coded_levels
from jaxcompress.coding.levels.rate_coded import RateCoded
from jaxcompress.coding.threads import in_order
from jaxcompress.quantization.grids import round_to
from jaxcompress.quantization.order_of_inputs import ORDERS, prepare
from jaxcompress.quantization.rate_model import first_guess
from jaxcompress.tree.methods import method, precise

EXACT = 0.005  # of the rate: how near the coded size is
TRIES = 6
LARGEST = 2.0**14  # levels of a row; sixteen bits hold them
SAMPLE = 192  # outputs on which the step is first sought


@method(traceable=False, data=True, masked=True)
def rate_distortion(
    x: jax.Array,
    moments: Moments | Masked | None = None,
    *,
    rate: float | Sequence[float],
    states: int = 128,
    order: Literal["pivoted", "activation", "natural"] = "pivoted",
    damping: float = 0.01,
    shrinkage: float = 0.1,
    prior: float = 0.0,
) -> RateCoded:
    """Quantize to a target file rate, minimizing output error. The rate is in bits per
    weight and includes side information.

    Input rows are quantized one by one and their errors fed into later rows, as
    in `gptq`; but the step of a row is in proportion to its conditional deviation (the
    factor's diagonal), levels are not clipped, a trellis takes the place of rounding,
    and each row is shrunk to its least-squares size before its error is fed on. So
    rows of which the outputs hardly depend cost next to nothing. The step is searched
    until the coded size is within half a percent of the rate; on small leaves, where
    sizes jump, the nearest of six attempts is taken.

    Without moments all inputs count alike. With drifted moments the target is
    corrected for the compressed prefix, as in `gptq`. With curvatures
    (`measure_curvatures`) outputs whose errors do more are quantized finer; with joint
    ones errors are fed into outputs too, where they cancel (`output_feedback`).

    After pruning, dropped weights stay zero, with their error propagated. The leaf then
    holds the whole matrix: its coded zeros take no more bits than a mask. A trellis
    cannot pass by weights that must be zero: `states=0` is needed.

    Slices are searched in threads, and on all the devices that hold `x`: replicate or
    shard a stack over several for it to be done on each of them.

    Args:
      x: floating-point weights `[..., inputs, outputs]`; one search per slice.
      moments: of the inputs; `second`, or `drifted` and `cross`; `curvatures` and
        `joint_curvatures` of the outputs; or `Masked`, where `x` are the weights that a
        mask keeps.
      rate: bits per weight in the file, above 0 and at most 12; or one number for each
        slice of a stack. After pruning, bits per weight that stays, its position
        included.
      states: of the trellis, 8 to 256 in powers of two; more gain less and less and
        cost time here, none in decoding. 0: rounding.
      order: "pivoted" keeps for last what is least explained by what follows it
        (pivoted Cholesky), so that deviations differ most, and what is explained best
        costs least; "activation" as in `gptq`; "natural" keeps their order.
      damping: as in `gptq`.
      shrinkage: as in `gptq`; 0 where the moments are exact.
      prior: adds so many times the error of a quantized component, over the mean
        squared weight, to the inputs' variance, and its ridge regression becomes the
        target. For independent Gaussian weights 0.5 is best: it drops the directions in
        which the error would exceed the weights, up to 0.07 bit at two bits. Layers
        of a language model gain nothing.

    Raises:
      ValueError: an option out of range, moments that do not fit or are not positive
        definite, or a rate that no step meets within five percent (the side
        information alone may exceed it).

    Example:
      >>> small = jc.rate_distortion(x, of_x, rate=3.0, states=8)

    Source: "WaterSIC" (2026, arXiv 2603.04956) for steps and shrinkage, YAQA (arXiv
    2505.22988) for feedback on both sides, SparseGPT (arXiv 2301.00774, section 3.5)
    for masks; pivots, trellis and contexts are additions, the trellis that of
    `trellis`.
    """
    mask, share = None, 1.0
    if isinstance(moments, Masked):
        if states:
            raise ValueError(
                f"rate_distortion takes states=0 after pruning, not {states!r}: levels "
                "of a trellis are not free to be zero where the mask wants it"
            )
        mask, share = moments.mask, x.size / moments.mask.size
        x, moments = fill(x, mask), moments.moments
    lead, inputs = x.shape[:-2], x.shape[-2]
    rates, count = np.asarray(rate, np.float64), math.prod(lead)
    if not (rates.size and ((rates > 0) & (rates <= 12)).all()):
        raise ValueError(f"rate_distortion takes 0 to 12 bits per weight, not {rate!r}")
    if rates.shape not in ((), (count,)):
        raise ValueError(
            f"{rates.size} rates for a stack of {count} slices; give one number, or "
            "one for each slice"
        )
    rates = (share * np.broadcast_to(rates, count)).tolist()
    checks.one_of("rate_distortion", "states", states, (0, *trellis.CHECKS))
    checks.one_of("rate_distortion", "order", order, ORDERS)
    checks.fraction("rate_distortion", "damping", damping)
    checks.fraction("rate_distortion", "a shrinkage", shrinkage, zero=True)
    checks.positive("rate_distortion", "a prior", prior, zero=True)
    target, second = x, None
    if moments is not None and not (isinstance(moments, Moments) and moments.looked_up):
        checked = require(moments, x, "rate_distortion", fields=())
        target, second = checked.target_problem(x, "rate_distortion", damping=damping)
    costs, joint = output_costs(moments, x, "rate_distortion")
    scales = np.zeros((*lead, x.shape[-1]), np.uint8)
    if costs is not None:
        scales = rate_coded.column_scales(costs).reshape(scales.shape)
    finer = rate_coded.SCALES[scales]
    x32 = target.astype(jnp.float32) / finer[..., None, :]
    finer = finer.reshape(count, -1)
    flat = [
        None if a is None else np.asarray(a).reshape(-1, *a.shape[-2:])
        for a in (x32, second, mask)
    ]
    scales = rate_coded.packed_scales(scales)
    side = rate_coded.scale_bits(scales) / x.shape[-2]
    holders = jnp.asarray(x).sharding.addressable_devices
    devices = sorted(holders, key=lambda device: device.id)

    def one(i: int) -> tuple[np.ndarray, np.ndarray]:
        each = [None if a is None else a[i] for a in flat]
        weights, moment, kept = jax.device_put(each, devices[i % len(devices)])
        options = {"order": order, "damping": damping, "shrinkage": shrinkage}
        prepared = prepare(weights, moment, **options)
        size = float(jnp.mean(jnp.square(weights)))
        for _ in range(2 if prior and size else 0):
            scale = first_guess(*prepared[:2], rates[i])
            ridge = prior * 4.0**scale / 12 / size
            prepared = prepare(weights, moment, **options, ridge=ridge)
        between = None
        if joint is not None:
            _, *between = stretched(output_feedback(joint[i]), finer[i])
            between = jax.device_put(between, devices[i % len(devices)])
        if kept is not None:
            kept = kept[jnp.asarray(prepared[2])]
        return _search(*prepared, between, kept, rates[i] - side, states, count)

    results = in_order(precise(one), range(count))  # threads start without it
    levels, steps = (np.stack(part) for part in zip(*results, strict=True))
    groups = 1 if joint is None else count_groups(x.shape[-1])
    return RateCoded(
        coded_levels.code_levels(levels.reshape(x.shape), states, groups),
        jnp.asarray(steps.reshape(*lead, inputs), jnp.bfloat16),
        scales,
        jnp.dtype(x.dtype),
    )


@functools.partial(jax.jit, static_argnames=("states",))
def sweep(
    x: jax.Array,
    factor: jax.Array,
    scale: jax.Array,
    between: Sequence[jax.Array] | None = None,
    mask: jax.Array | None = None,
    *,
    states: int,
) -> tuple[jax.Array, jax.Array]:
    """Return levels int32 `[inputs, outputs]` and steps `[inputs]` that bfloat16 holds.

    Args:
      x, factor: as `prepare` gives them.
      scale: what an output's error in the factor's units is quantized to.
      between: matrix and moves of `OutputFeedback`, for feedback between outputs.
      mask: where levels may be other than zero, like `x`; only without states.
    """
    outputs = x.shape[1]
    count, places = trellis.walks(outputs)
    gap, weights = count * places - outputs, None
    if gap:  # what fills the last walk up must be zeros: the coder puts them there
        filled = jnp.arange(count * places) >= outputs
        weights = jnp.where(filled, 1e9, 1.0).reshape(count, places).T
    steps = scale * jnp.diagonal(factor) / (2 if states else 1)

    def stored(step: jax.Array) -> jax.Array:
        return round_to(step, jnp.bfloat16)

    def nearest(row: jax.Array) -> jax.Array:
        if not states:
            return jnp.round(row)
        row = jnp.pad(row, (0, gap)).reshape(count, places)
        nearest_levels, _ = trellis.search(row.T, states, weights)
        return nearest_levels.T.reshape(-1)[:outputs].astype(row.dtype)

    def one_group(carry: tuple, group: tuple) -> tuple[tuple, jax.Array]:
        errors, state = carry  # of all outputs, group after group; of the walks
        start, row, moves, kept = group
        target = row - errors @ moves
        if states:
            target = target.reshape(count, -1).T
            levels, state = trellis.search(target, states, start=state)
            levels = levels.T.reshape(-1).astype(row.dtype)
        else:
            levels = jnp.round(target)
        levels = jnp.where(kept, levels, 0)
        errors = jax.lax.dynamic_update_slice(errors, levels - row, (start,))
        return (errors, state), levels

    def replace(aux: Any, j: jax.Array, row: jax.Array) -> tuple[jax.Array, Any]:
        del aux
        j = jnp.minimum(j, x.shape[0] - 1)
        step = steps[j]
        kept = jnp.ones(outputs, bool) if mask is None else mask[j]
        step = stored(jnp.maximum(step, jnp.max(jnp.abs(row)) / LARGEST))
        row = row / step
        if between is None:
            levels = jnp.where(kept, nearest(row), 0)
            size, along = jnp.sum(levels * levels), jnp.sum(levels * row)
        else:
            matrix, moves = between
            groups, _, width = moves.shape
            row = row.reshape(width, groups).T
            carry = jnp.zeros(outputs, row.dtype), jnp.zeros(count, jnp.int32)
            kept = kept.reshape(width, groups).T
            parts = jnp.arange(groups) * width, row, moves, kept
            _, levels = jax.lax.scan(one_group, carry, parts)
            counted = (levels.reshape(-1) @ matrix).reshape(levels.shape)
            size, along = jnp.sum(counted * levels), jnp.sum(counted * row)
            levels = levels.T.reshape(-1)
        shrunk = along / jnp.where(size > 0, size, 1)
        step = stored(shrunk * step)  # the same, where levels are many
        return step * levels, (levels.astype(jnp.int32), step)

    return feed_back(x, factor, replace)


def _search(
    x: jax.Array,
    factor: jax.Array,
    first: jax.Array,
    between: Sequence[jax.Array] | None,
    mask: jax.Array | None,
    rate: float,
    states: int,
    slices: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return levels and steps, in natural order, whose coded size meets the rate.

    The size is that in a file of so many slices, this one included, without column
    scales.
    """
    inputs, outputs = x.shape
    rate = max(rate, 1e-3)
    back = np.argsort(first)
    log_scale = first_guess(x, factor, rate)
    if log_scale is None:  # all weights are zero
        return np.zeros((inputs, outputs), np.int32), np.zeros(inputs, np.float32)

    def attempt(log_scale: float, stride: int) -> tuple[float, np.ndarray, np.ndarray]:
        levels, steps = sweep(
            x[:, ::stride],
            factor,
            jnp.float32(2.0**log_scale),
            between if stride == 1 else None,
            None if mask is None else mask[:, ::stride],
            states=states,
        )
        levels, steps = np.asarray(levels)[back], np.asarray(steps)[back]
        return _rate(levels, steps, outputs, states, slices), levels, steps

    stride = max(1, outputs // SAMPLE)
    best = None
    for step in (stride, 1) if stride > 1 else (1,):
        tried: list[tuple[float, float]] = []
        for _ in range(TRIES):
            size, levels, steps = attempt(log_scale, step)
            tried.append((log_scale, size))
            gap = abs(size - rate)
            if step == 1 and (best is None or gap < best[0]):
                best = gap, levels, steps
            if gap < EXACT * rate / (1 if step == 1 else 0.5):
                break
            log_scale = _next(tried, rate)
    gap, levels, steps = best
    if gap > 0.05 * rate:
        least = _rate(np.zeros_like(levels), steps, outputs, states, slices)
        raise ValueError(
            f"no step gives {inputs} x {outputs} weights {rate} bits each; {least:.3f} "
            "of them describe rows and columns. Raise the rate, or keep the leaf"
        )
    return levels, steps


def _next(tried: list[tuple[float, float]], rate: float) -> float:
    """Return the scale where the line through the last two attempts meets the rate."""
    at, reached = tried[-1]
    slope = -1.0
    if len(tried) > 1 and tried[-2][0] != at:
        slope = (reached - tried[-2][1]) / (at - tried[-2][0])
    slope = min(max(slope, -1.5), -0.1)
    return at + min(max((rate - reached) / slope, -3.0), 3.0)


def _rate(
    levels: np.ndarray, steps: np.ndarray, outputs: int, states: int, slices: int
) -> float:
    """Return bits per weight of levels, some of `outputs` columns that are like
    them.
    """
    fitted = contexts.fit(levels, 2 if states else 1)
    bits = fitted.bits * outputs / levels.shape[1]
    bits += coded_levels.side_bits(fitted, outputs)
    bits += coded_levels.step_bits(steps, slices) * steps.size
    return bits / (levels.shape[0] * outputs)

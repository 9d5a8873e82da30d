"""`plan_rates`: one rate for the model, shared out over its leaves in closed form."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.error_feedback import inverse_factor
from jaxcompress.calibration.moments import Moments, check_curvatures
from jaxcompress.calibration.output_feedback import (
    choose_shrinkage,
    count_groups,
    output_costs,
    shrunk,
)
from jaxcompress.coding.levels import leaf as coded_levels
from jaxcompress.planning.bits import check_concrete, planned_entries
from jaxcompress.quantization.rate_distortion import prepare
from jaxcompress.quantization.rate_model import deviations, gaussian_bits
from jaxcompress.tree import layouts
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.methods import precise
from jaxcompress.tree.paths import Entry
from jaxcompress.types import Batch, Params, Rule

ROW_BITS, COLUMN_BITS = 21, 5  # of side information
SMALLEST = 0.05  # bits above the side information: every leaf gets them
SMALLEST_COLUMN = 1e-9  # of the mean square of a slice
BINS = 16  # an octave of sizes is sorted into


def measure_curvatures(
    apply_fn: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    batches: Iterable[Batch],
    moments: Mapping[str, Any],
    *,
    layout: Mapping[str, Layout] | None = None,
    pattern: str | None = None,
    joint: bool = False,
    damping: float = 0.01,
    key: jax.Array,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> dict[str, Moments]:
    """How fast the divergence from the model grows with the error of each output.

    An error E of a leaf `[inputs, outputs]` that is white in the metric of its inputs'
    second moment (column `o` of `E^T S E` has variance `v[o]` in every direction, as
    error feedback leaves it) moves the model's predictions by `inputs *
    dot(curvatures, v)` nats per token, to second order: half the squared gradient, in
    that metric, of the log-probability of what the model itself would say. One backward
    pass per sequence serves all leaves. The rows of an embedding are given their mean:
    rare ones, coded coarser, would lose more than second order foretells.

    Joint curvatures say it for pairs of outputs: `v` is then a matrix `V`, and its cost
    `inputs * trace(joint @ V)`. `rate_distortion` lets errors cancel by them. To second
    order that is worth much in what makes queries and keys, less where attention and
    neurons are read, and next to nothing where outputs are more than inputs, as in gate
    and up; they would cost the most memory, and are not measured. It took 12 to
    17 % of a small model's divergence, of that of SmolLM2-135M -6 to 2 % on text like
    the batches' and -6 to 0 % on other text, worst below 2.5 bits: try it on yours.
    What one half of the sequences says of pairs is drawn towards nothing until it
    serves the other half best, so that few tokens do no harm. Sizes that walks of a
    trellis do not divide evenly (5120, 8192) have none either.

    Args:
      apply_fn: `(params, tokens [B, T]) -> logits [B, T, V]`.
      params: pytree of arrays, concrete.
      batches: dicts with "tokens" `[B, T]`, none of them padding; some 4 096 tokens
        in all are enough for single outputs, 12 000 for pairs.
      moments: by kernel name; a leaf without a second moment has the identity.
      layout, pattern: as for `plan_bits`.
      joint: whether to measure joint curvatures too. Each takes, twice over while it
        is measured, what a second moment of the outputs would.
      damping: as in `rate_distortion`.
      key: of the sampled tokens.
      progress: wraps the list of sequences; `tqdm.tqdm`, say.

    Returns:
      The moments, those of the leaves completed by `curvatures` `[..., outputs]` and,
      where they are of use, `joint_curvatures` `[..., outputs, outputs]`.

    Raises:
      ValueError: no batches, or gradients that are not finite.

    Source: the Fisher information, as GuidedQuant (ICML 2025) and YAQA (arXiv
    2505.22988) use it.
    """
    check_concrete(params, "measure_curvatures")
    layout, planned = layout or {}, planned_entries(params, moments, pattern)
    kinds = {entry.name: _kind(entry, layout) for entry in planned}
    factors = {
        entry.name: _factors(entry, damping)
        for entry in planned
        if getattr(entry.moments, "second", None) is not None
    }

    @jax.jit
    def gradient(params: Params, tokens: jax.Array, key: jax.Array) -> Params:
        def score(params: Params) -> jax.Array:
            logits = apply_fn(params, tokens[None])[0].astype(jnp.float32)
            said = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            logs = jax.nn.log_softmax(logits)
            return jnp.take_along_axis(logs, said[:, None], axis=-1).sum()

        return jax.grad(score)(params)

    rows = [row for batch in batches for row in jnp.asarray(batch["tokens"])]
    if not rows:
        raise ValueError("there are no batches; pass at least one")
    total: dict[str, list[Any]] = {name: [None, None] for name in kinds}
    tokens = 0
    for number, row in enumerate(progress(rows)):
        found = gradient(params, row, jax.random.fold_in(key, tokens))
        tokens += row.size
        for entry in planned_entries(found, None, pattern):
            matrix = layouts.matricize(entry.value, kinds[entry.name])
            products = _products(
                matrix,
                factors.get(entry.name),
                pairs=joint and not entry.embedding and _pairs(matrix),
            )
            half = total[entry.name]
            wide = np.float32 if products.ndim == 3 else np.float64
            products = np.asarray(products, wide)
            if half[number % 2] is None:
                half[number % 2] = products.copy()
            else:
                half[number % 2] += products
    completed = dict(moments)
    for entry in planned:
        matrix = layouts.matricize(entry.value, kinds[entry.name])
        shape = *matrix.shape[:-2], matrix.shape[-1]
        halves = [half for half in total.pop(entry.name) if half is not None]
        pairs, found = None, sum(halves) / (2 * tokens * matrix.shape[-2])
        finite = bool(np.isfinite(found).all())
        if found.ndim == 3:
            shrinkage = 1.0
            if finite and len(halves) > 1:
                shrinkage = choose_shrinkage(halves)
            del halves
            if shrinkage < 1:
                pairs = shrunk(found, shrinkage).reshape(*shape, shape[-1])
                pairs = jnp.asarray(pairs, jnp.float32)
            found = np.diagonal(found, axis1=1, axis2=2)
        found = found.reshape(shape)
        if not finite:
            raise ValueError(
                f"{entry.name}: its gradient is not finite on these batches; look for "
                "NaN in the weights before it"
            )
        if entry.embedding:
            found = np.broadcast_to(found.mean(axis=-1, keepdims=True), shape)
        known = moments.get(entry.name) or Moments(jnp.zeros(shape[:-1]))
        completed[entry.name] = dataclasses.replace(
            known,
            curvatures=jnp.asarray(found, jnp.float32),
            joint_curvatures=pairs,
            layout=known.layout or layout.get(entry.name),
        )
    return completed


@precise
def plan_rates(
    params: Params,
    moments: Mapping[str, Any],
    *,
    rate: float,
    layout: Mapping[str, Layout] | None = None,
    pattern: str | None = None,
    states: int = 128,
    order: str = "pivoted",
    damping: float = 0.01,
) -> list[Rule]:
    """A recipe of `rate_distortion` whose rates average to one, of least divergence.

    At a variance `v` of a leaf's error each weight costs `log2(1 / v) / 2` bits and
    adds `curvature * v` to the divergence, which is least where that is the same for
    all leaves. What a leaf then costs is the entropy of Gaussian levels, each as large
    as its row and its column have them; those that the error exceeds cost next to
    nothing. One number is left, found by bisection.

    Args:
      params: pytree of arrays, concrete.
      moments: by kernel name, of `measure_curvatures`; without curvatures all errors
        count alike.
      rate: bits per weight on average over the planned leaves, side information
        included.
      layout, pattern: as for `plan_bits`.
      states, order, damping: passed on to `rate_distortion`.

    Returns:
      Rules `(exact name, "rate_distortion(rate=...)")`, a rate for each slice of a
      stack.

    Raises:
      ValueError: a curvature that is missing or not positive, or a rate below the side
        information.
    """
    check_concrete(params, "plan_rates")
    layout, planned = layout or {}, planned_entries(params, moments, pattern)
    measured = check_curvatures({entry.name: entry.moments for entry in planned})
    slices, sizes, spreads, floors, bends = [], [], [], [], []
    for entry in planned:
        kind = _kind(entry, layout)
        matrix = layouts.matricize(entry.value, kind)
        inputs, outputs = matrix.shape[-2:]
        count = entry.value.size // (inputs * outputs)
        slices.append(count if matrix.ndim > 2 else 0)
        bent = np.ones((count, outputs))
        if measured:
            bent, _ = output_costs(entry.moments, matrix, entry.name)
        scales = coded_levels.column_scales(bent)
        finer = coded_levels.SCALES[scales]
        matrix = matrix.reshape(count, inputs, outputs) / finer[:, None]
        spreads += _spreads(matrix, entry.moments, order, damping)
        sizes += [inputs * outputs] * count
        column = COLUMN_BITS + coded_levels.scale_bits(
            coded_levels.packed_scales(scales)
        )
        floors += [ROW_BITS / outputs + column / inputs] * count
        bends += list(
            0.5 * np.log2((bent * finer.astype(np.float64) ** 2).mean(axis=1))
        )
    sizes = np.array(sizes, np.float64)
    least = float(np.dot(floors, sizes) / sizes.sum()) + SMALLEST
    if not least < rate <= 12:
        raise ValueError(
            f"plan_rates takes {least:.3f} to 12 bits per weight for these leaves, not "
            f"{rate!r}; what describes their rows and columns takes the first"
        )

    def rates(level: float) -> np.ndarray:
        found = [
            floor + max(SMALLEST, shares @ gaussian_bits(logs - level + bend))
            for (logs, shares), bend, floor in zip(spreads, bends, floors, strict=True)
        ]
        return np.array(found)

    low, high = -64.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        above = rates(middle) @ sizes / sizes.sum() > rate
        low, high = (middle, high) if above else (low, middle)
    options = f"states={states}, order={order!r}, damping={damping}"
    found, plan = iter(np.round(np.minimum(rates(high), 12), 4).tolist()), []
    for entry, count in zip(planned, slices, strict=True):
        each = tuple(itertools.islice(found, count)) if count else next(found)
        method = f"rate_distortion(rate={each}, {options})"
        plan.append((re.escape(entry.name), method))
    return plan


def _kind(entry: Entry, layout: Mapping[str, Layout]) -> Layout:
    return layouts.choose_layout(
        entry.name,
        entry.value.shape,
        layout.get(entry.name),
        entry.moments,
        embedding=entry.embedding,
    )


def _factors(entry: Entry, damping: float) -> jax.Array:
    """`[slices, inputs, inputs]`."""
    second = jnp.asarray(entry.moments.second)
    flat = second.reshape(-1, *second.shape[-2:])
    return jnp.stack([inverse_factor(each, damping=damping) for each in flat])


def _pairs(matrix: jax.Array) -> bool:
    """Whether joint curvatures are worth their memory, and can be made use of."""
    inputs, outputs = matrix.shape[-2:]
    return outputs <= inputs and count_groups(outputs) > 1


@functools.partial(jax.jit, static_argnames="pairs")
def _products(
    gradient: jax.Array, factors: jax.Array | None, *, pairs: bool
) -> jax.Array:
    """Products of a gradient's columns in its inputs' metric.

    `[slices, outputs]`, those of each with itself, or `[slices, outputs, outputs]`.

    Args:
      gradient: `[..., inputs, outputs]`; factors: `[slices, inputs, inputs]`.
    """
    flat = gradient.reshape(-1, *gradient.shape[-2:]).astype(jnp.float32)
    high = jax.lax.Precision.HIGHEST
    if factors is not None:
        flat = jnp.matmul(factors, flat, precision=high)
    if pairs:
        return jnp.matmul(flat.swapaxes(1, 2), flat, precision=high)
    return jnp.sum(flat * flat, axis=1)


def _spreads(
    x: jax.Array, moments: Any, order: str, damping: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each slice, the sizes that its levels have at a scale of one, as log2.

    Returns:
      Sizes, and the share of the levels that has each.
    """
    second = getattr(moments, "second", None)
    flat = x.reshape(-1, *x.shape[-2:]).astype(jnp.float32)
    if second is not None:
        second = second.reshape(-1, *second.shape[-2:])
    found = []
    for i, each in enumerate(flat):
        one = None if second is None else second[i]
        target, factor, _ = prepare(each, one, None, order=order, damping=damping)
        rows = deviations(target, factor)
        if rows is None:
            found.append((np.array([-100.0]), np.ones(1)))
            continue
        relative = np.square(np.asarray(target / factor.diagonal()[:, None]))
        relative = (relative * np.exp2(-2 * rows)[:, None]).mean(axis=0)
        columns = np.log2(np.maximum(relative, SMALLEST_COLUMN)) / 2
        places = np.rint(BINS * (rows[:, None] + columns)).astype(np.int64)
        counts = np.bincount((places - places.min()).reshape(-1))
        logs = (places.min() + np.arange(counts.size)) / BINS
        found.append((logs, counts / counts.sum()))
    return found

"""`measure_curvatures_blockwise`: curvatures of a model that is larger than memory."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.activations import Streams, streams
from jaxcompress.calibration.block_measurement import SCORE, Measurement
from jaxcompress.calibration.block_passes import Passes
from jaxcompress.calibration.blockwise_parts import full_names
from jaxcompress.calibration.collect import check_seen
from jaxcompress.calibration.lazy_params import Source, source_of
from jaxcompress.calibration.moment_files import moments_to_arrays
from jaxcompress.calibration.moments import Moments
from jaxcompress.progress import each_item
from jaxcompress.storage.resume import Results, digest
from jaxcompress.tracing.metric_gradients import Uses, find_uses
from jaxcompress.tracing.modules import model_function
from jaxcompress.tree.layouts import Layout, choose_layout
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Batch, Model, Params, Progress


def measure_curvatures_blockwise(
    model: Model,
    params: Params,
    batches: Iterable[Batch],
    *,
    moments: Mapping[str, Moments] | None = None,
    blocks: str | None = None,
    where: str | None = None,
    joint: bool = False,
    damping: float = 0.01,
    store: str | os.PathLike | None = None,
    devices: Sequence[Any] | None = None,
    key: jax.Array,
    progress: Progress = False,
) -> dict[str, Moments]:
    """Measure moments and curvatures with one block of the model in memory.

    Sequences run forward through one block after the other, as in
    `compress_blockwise`; the values between blocks are written to disk. Then
    their gradients run backward, block after block. The results are those of
    `collect_moments` and `measure_curvatures` on the same sequences, and both take the
    place of the whole model's gradient. In each block the metric of the inputs is
    applied to the rows that meet a weight and not to its gradient, which takes fewer
    operations.

    Memory: weights, moments, factors and gradients of one block, and per leaf its
    curvatures. What is returned has its second moments on disk where there is a
    `store`: planners read one leaf at a time.

    Args:
      model: Linen or NNX module, or a function of `(params, batch)`; returns logits
        `[B, T, V]`.
      params: a tree; or a path, or an open checkpoint, as in `compress_blockwise`.
      batches: dicts with "tokens" `[B, T]`, and "mask" if there is padding.
      moments: by name, with second moments; measured on the batches if None.
      blocks: pattern of the blocks' paths, as in `compress_blockwise`.
      where: pattern of the leaves' names; by default those that a method takes.
      joint, damping, key: as in `measure_curvatures`. In a stack each slice chooses its
        own shrinkage of joint curvatures.
      store: a directory for what is finished. A killed run resumes there; weights,
        options, moments and batches must be the same.
      devices: which sequences take turns on, as many at once as there are devices, each
        with a copy of the block. None: the default device. Curvatures are summed on the
        host, in the same order on any number.
      progress: as in `compress`, of the stretches of both passes.

    Returns:
      Moments by name, with `curvatures` and, where they are of use,
      `joint_curvatures`.

    Raises:
      ValueError: no batches, outputs that are no logits, gradients that are not finite,
        blocks that do not follow one another, a store of another run.

    Source: as `measure_curvatures`.

    Example:
      >>> path, where = "model.safetensors", ".*down_proj/kernel"
      >>> jc.save(path, params)
      >>> fisher = jc.measure_curvatures_blockwise(
      ...     model, path, batches, where=where, joint=False, key=key
      ... )
    """
    rows = _sequences(batches, key)
    with source_of(params) as source, tempfile.TemporaryDirectory() as scratch:
        parts, uses = _stretches(model, source, rows, blocks, devices or ())
        layouts, embeddings = _measured(source, parts, uses, moments, where)
        about = [blocks, where, joint, damping, sorted(layouts), moments is None]
        weights = {} if store is None else source.digests()
        statistics = {name: moments_to_arrays(x) for name, x in (moments or {}).items()}
        job = Measurement(
            source,
            parts,
            uses,
            layouts,
            embeddings,
            moments,
            joint,
            damping,
            Results(store or scratch, coding="none"),
            digest([about, weights], [rows, statistics]),
        )
        count = len(job.segments)
        stretches = [(False, i) for i in range(count)]
        stretches += [(True, i) for i in reversed(range(count))]
        run = Passes(job)
        for backward, number in each_item(
            stretches, progress, label="curvatures", unit="stretches"
        ):
            (run.backward if backward else run.forward)(number)
        return run.finish(keep=store is not None)


def _sequences(batches: Iterable[Batch], key: jax.Array) -> list[dict[str, Any]]:
    """Split batches into sequences, each with the key that samples its tokens."""
    if isinstance(batches, Mapping):
        raise TypeError("batches is one dict; pass an iterable of them: [batch]")
    rows, tokens = [], 0
    for batch in batches:
        for i in range(len(batch["tokens"])):
            inputs = {name: np.asarray(x)[i : i + 1] for name, x in batch.items()}
            own = jax.random.key_data(jax.random.fold_in(key, tokens))
            row = {"inputs": inputs, "key": np.asarray(own)}
            if "mask" in inputs:
                row["mask"] = inputs["mask"]
            rows.append(row)
            tokens += inputs["tokens"].size
    if not rows:
        raise ValueError("there are no batches; pass at least one")
    return rows


def _score(function: Callable[[Any, Any], jax.Array], params: Params, row: Any) -> Any:
    """Return the log-probability of tokens that the model itself would say."""
    logits = function(params, row["inputs"])
    if getattr(logits, "ndim", 0) != 3:
        raise ValueError(
            "curvatures are those of a language model's predictions: the model has to "
            f"return logits [B, T, V], not {jax.typeof(logits)}; wrap it in a function "
            "of (params, batch) that does"
        )
    logits = logits[0].astype(jnp.float32)
    key = jax.random.wrap_key_data(row["key"])
    said = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    logs = jax.nn.log_softmax(logits)
    each = jnp.take_along_axis(logs, said[:, None], axis=-1)[:, 0]
    mask = row.get("mask")
    return each.sum() if mask is None else jnp.where(mask[0] > 0, each, 0).sum()


def _stretches(
    model: Model,
    source: Source,
    rows: list[dict[str, Any]],
    blocks: str | None,
    devices: Sequence[Any],
) -> tuple[Streams, list[Uses]]:
    """Cut the program of the score, and find the uses of weights in each stretch."""
    function = model_function(model)
    shapes = {**source.shapes, SCORE: jax.ShapeDtypeStruct((), jnp.float32)}

    def run(weights: Mapping[str, Any], row: Any) -> jax.Array:
        return _score(function, source.rebuild(weights), row) * weights[SCORE]

    parts = streams(run, shapes, lambda weights: weights, rows, blocks, devices)
    for segments in {id(each): each for each, _ in parts.programs}.values():
        # The last use of a weight is that of SCORE, so the score ends the program.
        score = frozenset(segments[-1].equations[-1].outvars[:1])
        segments[-1] = dataclasses.replace(
            segments[-1], writes=tuple(score), alive=score
        )
    uses = []
    for segment in parts.segments:
        stacked = segment.block is not None and segment.block.index is not None
        weights = {}
        for name, full in full_names(segment).items():
            shape = shapes[full].shape[stacked and not name.startswith("/") :]
            weights[name] = jax.ShapeDtypeStruct(shape, shapes[full].dtype)
        uses.append(find_uses(segment, weights, [v.aval for v in segment.reads]))
    return parts, uses


def _measured(
    source: Source,
    parts: Streams,
    uses: list[Uses],
    moments: Mapping[str, Moments] | None,
    where: str | None,
) -> tuple[dict[str, Layout], frozenset[str]]:
    """Return layouts of what is measured, slices of stacks, and names of embeddings."""
    traced: dict[str, Layout] = {}
    for segment, each in zip(parts.segments, uses, strict=True):
        names = full_names(segment)
        for name, layout in each.layouts.items():
            traced.setdefault(names[name], layout)
    layouts, embeddings = {}, set()
    planned = planned_entries(source.tree, moments, where, traced)
    check_seen([entry.name for entry in planned], traced)
    for entry in planned:
        layout, moment = traced[entry.name], (moments or {}).get(entry.name)
        count = sum(map(len, (layout.stack, layout.inputs, layout.outputs)))
        shape = entry.value.shape[-count:]
        layouts[entry.name] = choose_layout(entry.name, shape, layout, moment)
        if entry.embedding:
            embeddings.add(entry.name)
    return layouts, frozenset(embeddings)

"""`compress_blockwise`: block after block, on what the compressed prefix produces."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress.calibration.activations import streams
from jaxcompress.calibration.blockwise_parts import Job
from jaxcompress.calibration.checkpoints import (
    Part,
    Parts,
    digest_run,
    joined,
    reports_of,
)
from jaxcompress.calibration.lazy_params import Source, source_of
from jaxcompress.calibration.moments import Moments
from jaxcompress.memory import give_back_memory
from jaxcompress.progress import clock, each_item
from jaxcompress.storage.resume import Results
from jaxcompress.tracing.layouts import find_layouts
from jaxcompress.tracing.modules import model_function
from jaxcompress.tracing.options import fix_options, with_options
from jaxcompress.tracing.refusal import find_refusal
from jaxcompress.tree.compress import chain
from jaxcompress.tree.equality import share
from jaxcompress.tree.layouts import Layout, check_layout
from jaxcompress.tree.names import nearest
from jaxcompress.tree.record import LeafReport
from jaxcompress.tree.selection import bind
from jaxcompress.types import LazyParams, Model, Params, Progress, Recipe

CURVATURES = "curvatures", "joint_curvatures"


def compress_blockwise(
    model: Model,
    params: Params | LazyParams | str | os.PathLike,
    recipe: Recipe,
    batches: Iterable[Any],
    *,
    moments: Mapping[str, Moments] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    variables: Mapping[str, Any] | None = None,
    blocks: str | None = None,
    drift: float = 0.0,
    store: str | os.PathLike | None = None,
    record: list[LeafReport] | None = None,
    progress: Progress = False,
) -> Params:
    """Compress block by block, with the moments that each block meets after the
    compressed ones.

    The traced program is cut into blocks by the weights that they read, so that the
    model needs nothing: looped or scanned, remat, any call in between. Every batch runs
    through one block after the other, on the inputs x' after the compressed blocks;
    the recipe gets their second moments, and the compressed block carries x' on. Inside
    a block x' is what its original weights make of it. With `drift`, batches run a
    second time, on the inputs x of the original model, and the recipe gets the second
    moments of both and their cross moments too (`gptq` then aims towards the original
    outputs); weights are then compressed in the order of their use, and x' is what
    those before them, in the same block too, make of it. A weight outside the blocks
    that is used in several places, as a tied embedding, is first, with moments of
    the original model.

    Memory: dense weights and moments of one block (of one stack where the model is
    scanned), the compressed ones so far, and for every batch the inputs of one block on
    the host, twice with `drift`.

    Args:
      model: a Linen module, an NNX module or a function of `(params, batch)`, as for
        `find_layouts`.
      params: the tree; or the path of a file of `save`, or what `open` or
        `models.open_weights` give: leaves are then read with their block.
      recipe: as for `compress`; names are those of the whole tree. In a stack every
        layer is compressed by itself, to leaves that must be alike, so plans of
        `plan_rates` are for the looped model.
      batches: as for `collect_moments`, with "mask" if there is one.
      moments: of `measure_curvatures`, by name. Their curvatures, joint ones too, are
        added to the moments of the blocks; the rest of them is not used.
      layouts: by name, as for `compress`, of weights that the trace does not follow.
      variables: further collections of a Linen module, as `{"batch_stats": ...}`.
      blocks: pattern that fully matches the path of every block, or of the stack of
        them in a scanned model; the longest path of a weight that it matches counts.
        None: what a loop takes slices of; modules that differ in a number and hold
        others (`h_7`, `TransformerBlock_0`, `layers/3`); where there are none, every
        module. One that the model returns to after others is then left out of the
        blocks.
      drift: part of the drift that targets compensate, 0 to 1: they are so far between
        the weights themselves and those whose outputs on x' are nearest to the original
        ones. Takes about three times as long, and many tokens: of SmolLM2-135M, `gptq`
        at 3 bits with only 8 192, 0.5 took 18 % of the divergence, and 1 added 19 %.
        Weights used in a loop inside a block need 0.
      store: a directory where each finished block is kept. A run that was killed
        resumes there, to the same bytes; the run must be the same.
      record: a list that takes a `LeafReport` per leaf, with output errors.
      progress: True prints each block's errors and the time left; or what wraps the
        iterable of blocks, such as `tqdm.tqdm`.

    Warns as `collect_moments` where tokens are few, as `find_layouts` of arrays that
    the trace does not follow, and of weights that the batches do not reach, which are
    compressed without data.

    Raises:
      ValueError: `drift` out of range, no submodule matches `blocks`, blocks that do
        not follow one another, a pattern of the recipe that matches nothing,
        activations that are NaN or infinite, a selected weight whose inputs were never
        seen but are needed, a store of another run, moments of another tree or without
        curvatures. Names the block or the leaf.
      TypeError: `batches` is one batch.

    Example:
      >>> recipe = [(".*down_proj/kernel", "gptq(bits=3, block=32)")]
      >>> small = jc.compress_blockwise(model, params, recipe, batches)

    Source: block by block as in Frantar et al. 2022, "GPTQ" (arXiv 2210.17323); moments
    of both streams as in GPTAQ (ICML 2025), whose authors' code compensates a quarter
    of the drift, and Qronos (arXiv 2505.11695).
    """
    if isinstance(batches, Mapping):
        raise TypeError("batches is one dict; pass an iterable of them: [batch]")
    batches = [jax.tree.map(np.asarray, fix_options(batch)) for batch in batches]
    if not batches:
        raise ValueError("there are no batches; pass at least one")
    if not 0 <= drift <= 1:
        raise ValueError(f"drift is a part of it, 0 to 1, not {drift!r}")
    options = {"blocks": blocks, "drift": float(drift)}
    function = with_options(model_function(model, variables))
    curvatures = {
        name: {
            k: np.asarray(getattr(x, k))
            for k in CURVATURES
            if getattr(x, k, None) is not None
        }
        for name, x in (moments or {}).items()
        if getattr(x, "curvatures", None) is not None
    }
    if moments is not None and not curvatures:
        raise ValueError(
            "moments without curvatures: nothing else of them is used here; complete "
            "them with measure_curvatures, or leave them out"
        )
    with source_of(params) as source:
        if unknown := sorted(curvatures.keys() - source.shapes.keys()):
            raise ValueError(
                f"moments hold curvatures of {unknown[0]!r}, which the tree does not "
                "have; measure them on the same form of the model, looped or scanned"
            )
        merged = _layouts(function, source, batches[0], layouts or {})
        weights = {} if store is None else source.digests()
        passed = {"passed": str(jax.tree.structure(batches[0]))}
        run = digest_run(recipe, options | passed, weights, [*batches, curvatures])
        job = Job(
            source,
            recipe,
            _wanted(source, recipe, merged),
            merged,
            frozenset(layouts or {}),
            curvatures,
            moments or {},
            drift,
            streams(function, source.shapes, source.rebuild, batches, blocks),
            Parts(Results(store), run),
        )
        parts = _shown(job.run(), job.count, progress is True)
        if callable(progress):
            parts = each_item(parts, progress, label="compressing", total=job.count)
        parts = list(parts)
        small = source.rebuild(joined(parts, source.fetch))
        if not isinstance(params, LazyParams | str | os.PathLike):
            small = share(params, small)
        _warn_if_refused(function, small, batches[0])
    if record is not None:
        record += [row for part in parts for row in reports_of(part)]
    return small


def _shown(parts: Iterator[Part], count: int, show: bool) -> Iterator[Part]:
    """Pass parts on and show progress: their errors and the time left.

    What a part needed is returned to the system, so that peaks do not add up.
    """
    start = time.monotonic()
    for number, part in enumerate(parts, start=1):
        errors = {r.name: r.output_error for r in part.reports if r.output_error}
        left = (time.monotonic() - start) / number * (count - number)
        line = f"{part.label} ({number} of {count}, {clock(left)} left)"
        if errors:
            each = (f"{n.split('/', 1)[-1]} {e:.3f}" for n, e in errors.items())
            line += ": output errors " + ", ".join(each)
        if show:
            print(line, file=sys.stderr, flush=True)
        give_back_memory(programs=False)
        yield part


def _warn_if_refused(
    function: Callable[[Any, Any], Any], small: Params, batch: Any
) -> None:
    """Warn where the model cannot take the result: it took hours, so it is kept."""
    if refusal := find_refusal(function, small, batch):
        warnings.warn(
            f"the model cannot take the compressed tree: {refusal}", stacklevel=3
        )


def _layouts(
    function: Callable[[Any, Any], Any],
    source: Source,
    batch: Any,
    fixed: Mapping[str, Layout],
) -> dict[str, Layout]:
    """Merge the layouts that the caller gives with those that a trace finds."""
    for name, layout in fixed.items():
        if name not in source.shapes:
            raise ValueError(
                f"layouts= names {name!r}, which the tree does not have; the nearest "
                f"names are {nearest(name, source.shapes)}"
            )
        check_layout(name, source.shapes[name].shape, layout)
    shapes = source.rebuild(source.shapes)
    seen = [name for name in source.shapes if name not in fixed]
    return find_layouts(function, shapes, batch, where=seen.__contains__) | dict(fixed)


def _wanted(source: Source, recipe: Recipe, layouts: Mapping[str, Layout]) -> set[str]:
    """List names of the outermost leaves that a recipe takes; check its first stage."""
    taken: set[str] = set()
    for i, stage in enumerate(chain(recipe).stages):
        bound = bind(source.tree, stage, layouts=layouts, part=i > 0)
        taken |= {entry.root for entry in bound.selected}
    return taken

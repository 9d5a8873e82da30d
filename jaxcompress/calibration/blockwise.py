"""`compress_blockwise`: block after block, on what the compressed prefix produces."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.activations import Streams, Values, streams
from jaxcompress.calibration.checkpoints import (
    Part,
    Store,
    digest,
    joined,
    one_part,
    reports_of,
)
from jaxcompress.calibration.collect import check_finite, warn_few
from jaxcompress.calibration.lazy_params import Source, source_of
from jaxcompress.calibration.moments import (
    Moments,
    both_uses,
    by_input,
    partly_drifted,
)
from jaxcompress.progress import clock, each_item
from jaxcompress.tracing.blocks import Segment
from jaxcompress.tree.compress import chain, compress
from jaxcompress.tree.layouts import Layout, choose_layout
from jaxcompress.tree.leaf import materialize
from jaxcompress.tree.record import LeafReport, output_error
from jaxcompress.tree.selection import bind

CURVATURES = "curvatures", "joint_curvatures"
BLOCKS = r"(.*/)?(layers?|blocks?|h)([_/]?\d+)?"


def compress_blockwise(
    model: Any,
    params: Any,
    recipe: Any,
    batches: Iterable[Any],
    *,
    moments: Mapping[str, Moments] | None = None,
    blocks: str = BLOCKS,
    drift: float = 0.0,
    store: str | os.PathLike | None = None,
    record: list[LeafReport] | None = None,
    progress: bool | Callable[[Iterable[Any]], Iterable[Any]] = False,
) -> Any:
    """Compute `compress` with the moments that each block meets behind the compressed
    ones.

    The traced program is cut into blocks by the weights that they read, so that the
    model needs nothing: looped or scanned, remat, any call in between. Every batch runs
    through one block after the other, on the inputs x' behind the compressed blocks;
    the recipe gets their second moments, and the compressed block carries x' on. Inside
    a block x' is what its original weights make of it. With `drift`, batches run a
    second time, on the inputs x of the original model, and the recipe gets the second
    moments of both and their cross moments too (`gptq` then aims towards the original
    outputs); weights are then compressed in the order of their use, and x' is what
    those before them, in the same block too, make of it. A weight outside the blocks
    that is used in several places, as a tied embedding, comes first, with moments of
    the original model.

    Memory: dense weights and moments of one block (of one stack where the model is
    scanned), the compressed ones so far, and for every batch the inputs of one block on
    the host, twice with `drift`.

    Args:
      model: a Linen module or a function of `(params, batch)`, as for `layout`.
      params: the tree; or the path of a file of `save`, or what `open` or
        `models.open_weights` give: leaves are then read as their block comes.
      recipe: as for `compress`; names are those of the whole tree. In a stack every
        layer is compressed by itself, to leaves that must be alike, so plans of
        `plan_rates` are for the looped model.
      batches: as for `collect_moments`, with "mask" if there is one.
      moments: of `measure_curvatures`, by name. Their curvatures, joint ones too, go
        with the moments of the blocks; the rest of them is not used.
      blocks: pattern that fully matches the path of every block, or of the stack of
        them in a scanned model; the longest path of a weight that it matches counts.
      drift: part of the drift that targets make up for, 0 to 1: they lie so far between
        the weights themselves and those whose outputs on x' are nearest to the original
        ones. Takes about three times as long, and many tokens: of SmolLM2-135M, `gptq`
        at 3 bits with only 8 192, 0.5 took 18 % of the divergence, and 1 added 19 %.
        Weights used in a loop inside a block need 0.
      store: a directory where each finished block is kept. A run that was killed goes
        on from there, to the same bytes; the run must be the same.
      record: a list that takes a `LeafReport` per leaf, with output errors.
      progress: True prints each block's errors and the time left; or what wraps the
        iterable of blocks, such as `tqdm.tqdm`.

    Warns as `collect_moments` where tokens are few.

    Raises:
      ValueError: `drift` out of range, no submodule matches `blocks`, blocks that do
        not follow one another, a pattern of the recipe that matches nothing,
        activations that are NaN or infinite, a selected weight whose inputs were never
        seen but are needed, a store of another run, moments of another tree or without
        curvatures. Names the block or the leaf.
      TypeError: `batches` is one batch.

    Source: block by block as in Frantar et al. 2022, "GPTQ" (arXiv 2210.17323); moments
    of both streams as in GPTAQ (ICML 2025), whose authors' code makes up for a quarter
    of the drift, and Qronos (arXiv 2505.11695).
    """
    if isinstance(batches, Mapping):
        raise TypeError("batches is one dict; pass an iterable of them: [batch]")
    batches = [jax.tree.map(np.asarray, batch) for batch in batches]
    if not batches:
        raise ValueError("there are no batches; pass at least one")
    if not 0 <= drift <= 1:
        raise ValueError(f"drift is a part of it, 0 to 1, not {drift!r}")
    options = {"blocks": blocks, "drift": float(drift)}
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
        job = _Job(
            source,
            recipe,
            _wanted(source, recipe),
            curvatures,
            moments or {},
            drift,
            streams(model, source.shapes, source.rebuild, batches, blocks),
            Store(
                store, digest(recipe, options, source.shapes, [*batches, curvatures])
            ),
        )
        parts = _shown(job.run(), job.count, progress is True)
        if callable(progress):
            parts = each_item(parts, progress, label="compressing", total=job.count)
        parts = list(parts)
        small = source.rebuild(joined(parts, source.fetch))
    if record is not None:
        record += [row for part in parts for row in reports_of(part)]
    return small


def _shown(parts: Iterator[Part], count: int, show: bool) -> Iterator[Part]:
    """Pass parts on and show progress: their errors and the time left."""
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
        yield part


def _wanted(source: Source, recipe: Any) -> set[str]:
    """List names of the outermost leaves that a recipe takes; check its first stage."""
    taken: set[str] = set()
    for i, stage in enumerate(chain(recipe).stages):
        taken |= {e.root for e in bind(source.tree, stage, part=i > 0).selected}
    return taken


@dataclasses.dataclass(frozen=True)
class _Job:
    source: Source
    recipe: Any
    wanted: set[str]  # full names of leaves that the recipe takes
    curvatures: dict[str, dict[str, np.ndarray]]  # by full name, then by field
    seen: Mapping[str, Moments]  # given by the caller, whose layouts must agree
    drift: float
    streams: Streams
    store: Store
    stack: dict[str, Any] = dataclasses.field(default_factory=dict)  # the latest read

    @property
    def shared(self) -> list[str]:
        """Leaves outside the blocks, to be compressed, that several segments read."""
        uses = [name for s in self.streams.segments for name in s.outer]
        return sorted({n for n in uses if uses.count(n) > 1} & self.wanted)

    @property
    def unused(self) -> list[str]:
        used = {n for s in self.streams.segments for n in full_names(s).values()}
        return sorted(self.source.shapes.keys() - used)

    @property
    def count(self) -> int:
        """Number of parts."""
        return len(self.streams.segments) + bool(self.shared) + bool(self.unused)

    def run(self) -> Iterator[Part]:
        """Return part after part, in the order of the model."""
        done: dict[str, Any] = {}  # leaves outside the blocks
        first = bool(self.shared)
        if first:
            leaves = {name: self.source.fetch(name) for name in self.shared}
            part = self.store.load(0)
            if part is None:
                moments, layouts = self.shared_moments()
                part = self.compress("shared", leaves, moments, layouts)
                self.store.save(0, part)
            done |= part.leaves
            yield part
        original = drifted = self.streams.start()
        for i, segment in enumerate(self.streams.segments):
            names = full_names(segment)
            leaves = {n: self.fetch(segment, key) for key, n in names.items()}
            weights = _dense({key: leaves[n] for key, n in names.items()})
            behind = None
            part = self.store.load(i + first)
            if part is None:
                new = {key: n for key, n in names.items() if n not in done}
                own = {n: leaves[n] for n in new.values()}
                behind, part = self.segment(i, weights, new, own, original, drifted)
                self.store.save(i + first, part)
            yield part
            done |= {n: part.leaves[n] for n in part.whole}
            if i + 1 < len(self.streams.segments):
                if self.drift:
                    original = behind or self.streams.forward(i, weights, original)
                known = done | part.leaves
                small = _dense({key: known[n] for key, n in names.items()})
                drifted = self.streams.forward(i, small, drifted)
        if self.unused:
            number = len(self.streams.segments) + first
            part = self.store.load(number)
            if part is None:
                leaves = {name: self.source.fetch(name) for name in self.unused}
                part = self.compress("unused", leaves, {}, {})
                self.store.save(number, part)
            yield part

    def fetch(self, segment: Segment, key: str) -> Any:
        """Return leaf that a segment calls `key`: its slice, where it is stacked."""
        name = full_names(segment)[key]
        if key.startswith("/") or segment.block.index is None:
            return self.source.fetch(name)
        if not any(n.startswith(f"{segment.block.path}/") for n in self.stack):
            self.stack.clear()
        if name not in self.stack:
            self.stack[name] = self.source.fetch(name)
        return jax.tree.map(lambda x: x[segment.block.index], self.stack[name])

    def segment(
        self,
        number: int,
        weights: dict[str, Any],
        new: Mapping[str, str],
        own: dict[str, Any],
        original: list[Values],
        drifted: list[Values],
    ) -> tuple[list[Values] | None, Part]:
        """Return values of the original model behind a segment, and its compressed
        leaves.

        Where targets make up for drift, leaves are compressed in the order in which
        they are used, those of one input together, and moments measured anew behind
        them: else two leaves in a row would make up for the same drift.
        """
        given = number, weights, new, original, drifted
        behind, moments, layouts = self.measure(*given)
        groups = by_input(moments, layouts) if self.drift else [set(moments)]
        groups = groups or [set()]
        groups[0] |= own.keys() - set().union(*groups)
        segment, changed, parts = self.streams.segments[number], dict(weights), []
        keys: dict[str, str] = {}
        for group in groups:
            before, keys = keys, {key: n for key, n in new.items() if n in group}
            if parts:
                small = parts[-1].leaves
                changed |= _dense({key: small[n] for key, n in before.items()})
                given = number, weights, keys, original, drifted
                _, moments, _ = self.measure(*given, changed)
            leaves = {n: own[n] for n in keys.values()}
            known = {n: m for n, m in moments.items() if n in group}
            kinds = {n: kind for n, kind in layouts.items() if n in leaves}
            label = _label(number, segment)
            parts.append(self.compress(label, leaves, known, kinds, segment))
        return behind, one_part(parts)

    def measure(
        self,
        number: int,
        weights: dict[str, Any],
        new: Mapping[str, str],
        original: list[Values],
        drifted: list[Values],
        changed: dict[str, Any] | None = None,
    ) -> tuple[list[Values] | None, dict[str, Moments], dict[str, Layout]]:
        """Return values of the original model behind a segment, moments and layouts."""
        keys = [k for k, n in new.items() if n in self.wanted and weights[k].ndim > 1]
        if self.drift:
            measured = self.streams.measure(
                number, weights, original, drifted, keys, changed
            )
        else:
            measured = self.streams.measure(number, weights, drifted, None, keys)
        after, moments, layouts = measured
        moments = {
            new[key]: partly_drifted(m, self.drift) for key, m in moments.items()
        }
        for name, m in moments.items():
            check_finite(f"{_label(number, self.streams.segments[number])}: {name}", m)
        if any(segment.block for segment in self.streams.segments[: number + 1]):
            warn_few(moments)
        layouts = {new[key]: kind for key, kind in layouts.items()}
        return after if self.drift else None, moments, layouts

    def shared_moments(self) -> tuple[dict[str, Moments], dict[str, Layout]]:
        """Measure the shared leaves over all their uses in the original model."""
        total: dict[str, Moments] = {}
        layouts: dict[str, Layout] = {}
        values = self.streams.start()
        for i, segment in enumerate(self.streams.segments):
            names = full_names(segment)
            weights = _dense({key: self.fetch(segment, key) for key in names})
            keys = [f"/{n}" for n in segment.outer if n in self.shared]
            keys = [key for key in keys if weights[key].ndim > 1]
            values, found, kinds = self.streams.measure(i, weights, values, None, keys)
            for key, moments in found.items():
                total[names[key]] = both_uses(total.get(names[key]), moments)
            layouts |= {names[key]: kind for key, kind in kinds.items()}
        return total, layouts

    def compress(
        self,
        label: str,
        leaves: dict[str, Any],
        moments: dict[str, Moments],
        layouts: dict[str, Layout],
        segment: Segment | None = None,
    ) -> Part:
        block = segment and segment.block
        index = block.index if block else None
        whole = tuple(leaves) if not block else segment.outer
        for name, known in moments.items():
            stacked = index is not None and name not in whole
            fields = {
                key: jnp.asarray(x[index] if stacked else x)
                for key, x in self.curvatures.get(name, {}).items()
            }
            choose_layout(
                name, leaves[name].shape, layouts.get(name), self.seen.get(name)
            )
            moments[name] = dataclasses.replace(known, **fields)
        rows: list[LeafReport] = []
        small = compress(
            leaves, self.recipe, moments, layouts=layouts, record=rows, part=True
        )
        for i, row in enumerate(rows):
            old, new, known = leaves[row.name], small[row.name], moments.get(row.name)
            error = None
            if new is not old and known is not None and known.second is not None:
                error = output_error(old, new, known.second, layouts[row.name])
            rows[i] = dataclasses.replace(row, output_error=error)
        return Part(label, index, tuple(n for n in whole if n in leaves), small, rows)


def full_names(segment: Segment) -> dict[str, str]:
    """Map a segment's names of its weights to their full names."""
    block, outer = segment.block, {f"/{name}": name for name in segment.outer}
    own = {name: f"{block.path}/{name}" for name in block.names} if block else {}
    return own | outer


def _label(number: int, segment: Segment) -> str:
    return segment.block.label if segment.block else f"outside[{number}]"


@jax.jit
def _dense(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    return materialize(leaves)

"""Run the parts of `compress_blockwise`, one after the other."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.activations import Streams, Values
from jaxcompress.calibration.block_moments import (
    group_by_input,
    interpolate_drift,
    merge_tied,
)
from jaxcompress.calibration.checkpoints import Part, Parts, one_part
from jaxcompress.calibration.collect import check_finite, warn_few
from jaxcompress.calibration.lazy_params import Source
from jaxcompress.calibration.moments import (
    Moments,
)
from jaxcompress.tracing.blocks import Segment
from jaxcompress.tree.compress import compress
from jaxcompress.tree.layouts import Layout, choose_layout
from jaxcompress.tree.leaf import materialize
from jaxcompress.tree.record import LeafReport, output_error
from jaxcompress.types import Recipe


@dataclasses.dataclass(frozen=True)
class Job:
    """Hold what one run of `compress_blockwise` works on, and run its parts in turn."""

    source: Source
    recipe: Recipe
    wanted: set[str]  # full names of leaves that the recipe takes
    layouts: Mapping[str, Layout]  # of whole leaves, by full name
    fixed: frozenset[str]  # whose layouts the caller gave
    curvatures: dict[str, dict[str, np.ndarray]]  # by full name, then by field
    seen: Mapping[str, Moments]  # given by the caller, whose layouts must agree
    drift: float
    streams: Streams
    store: Parts
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
                finished = done | part.leaves
                small = _dense({key: finished[n] for key, n in names.items()})
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
        """Return values of the original model after a segment, and its compressed
        leaves.

        Where targets compensate drift, leaves are compressed in the order in which
        they are used, those of one input together, and moments measured anew after
        them: else two leaves in a row would compensate the same drift.
        """
        arguments = number, weights, new, original, drifted
        behind, moments, layouts = self.measure(*arguments)
        groups = group_by_input(moments, layouts) if self.drift else [set(moments)]
        groups = groups or [set()]
        groups[0] |= own.keys() - set().union(*groups)
        segment, changed, parts = self.streams.segments[number], dict(weights), []
        keys: dict[str, str] = {}
        for group in groups:
            before, keys = keys, {key: n for key, n in new.items() if n in group}
            if parts:
                small = parts[-1].leaves
                changed |= _dense({key: small[n] for key, n in before.items()})
                arguments = number, weights, keys, original, drifted
                _, moments, _ = self.measure(*arguments, changed)
            leaves = {n: own[n] for n in keys.values()}
            of_group = {n: m for n, m in moments.items() if n in group}
            kinds = {n: kind for n, kind in layouts.items() if n in leaves}
            label = _label(number, segment)
            parts.append(self.compress(label, leaves, of_group, kinds, segment))
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
        """Return values of the original model after a segment, moments and layouts."""
        keys = [k for k, n in new.items() if n in self.wanted and weights[k].ndim > 1]
        if self.drift:
            measured = self.streams.measure(
                number, weights, original, drifted, keys, changed
            )
        else:
            measured = self.streams.measure(number, weights, drifted, None, keys)
        after, moments, layouts = measured
        moments = {
            new[key]: interpolate_drift(m, self.drift) for key, m in moments.items()
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
            values, measured, kinds = self.streams.measure(
                i, weights, values, None, keys
            )
            for key, moments in measured.items():
                total[names[key]] = merge_tied(total.get(names[key]), moments)
            layouts |= {names[key]: kind for key, kind in kinds.items()}
        return total, layouts

    def layout(self, name: str, index: int | None) -> Layout:
        """Return the layout of a leaf, or of one slice of it along axis 0."""
        layout = self.layouts[name]
        if index is None:
            return layout
        if layout.stack[:1] != (0,):
            raise ValueError(
                f"{name}: its layers are sliced along axis 0, which is no stack axis "
                f"of {layout}"
            )
        below = lambda axes: tuple(axis - 1 for axis in axes)  # noqa: E731
        return Layout(
            below(layout.stack[1:]), below(layout.inputs), below(layout.outputs)
        )

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
        for name, moment in moments.items():
            stacked = index is not None and name not in whole
            fields = {
                key: jnp.asarray(x[index] if stacked else x)
                for key, x in self.curvatures.get(name, {}).items()
            }
            choose_layout(
                name, leaves[name].shape, layouts.get(name), self.seen.get(name)
            )
            if name in self.fixed:
                layout = self.layout(name, index if stacked else None)
                choose_layout(name, leaves[name].shape, layout, moment)
            moments[name] = dataclasses.replace(moment, **fields)
        for name in leaves.keys() & self.layouts.keys() - layouts.keys():
            stacked = index is not None and name not in whole
            layouts[name] = self.layout(name, index if stacked else None)
        rows: list[LeafReport] = []
        small = compress(
            leaves,
            self.recipe,
            moments,
            layouts=layouts,
            record=rows,
            part=True,
            traced=self.layouts,
        )
        for i, row in enumerate(rows):
            old, new, moment = leaves[row.name], small[row.name], moments.get(row.name)
            error = None
            if new is not old and moment is not None and moment.second is not None:
                error = output_error(old, new, moment.second, layouts[row.name])
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

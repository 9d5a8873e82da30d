"""Calibration batches on their way through a model that was cut into segments."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress.calibration.collect import averages, row_sums
from jaxcompress.calibration.moments import Moments
from jaxcompress.tracing.blocks import Segment, cut
from jaxcompress.tracing.interpreter import run_uses
from jaxcompress.tracing.uses import Use
from jaxcompress.tree.layouts import Layout, check_layout

Values = dict[Any, np.ndarray]  # of one batch, by variable of its program


@dataclasses.dataclass(frozen=True)
class Streams:
    """The batches, each with the segments of the program that its shapes make.

    Values stay on the host between segments. Programs whose compiled text is the same,
    as those of equal blocks, are compiled once. Batches take turns on `devices`, as
    many at once as there are; without any, all are on the default device.
    """

    batches: Sequence[Any]
    programs: Sequence[tuple[list[Segment], list[Any]]]  # one per batch; shared
    compiled: dict[Any, Any] = dataclasses.field(default_factory=dict)
    devices: Sequence[Any] = ()

    def start(self) -> list[Values]:
        """Return what the first segment reads of each batch."""
        return [
            dict(zip(inputs, jax.tree.leaves(batch), strict=True))
            for batch, (_, inputs) in zip(self.batches, self.programs, strict=True)
        ]

    @property
    def segments(self) -> list[Segment]:
        """Those of the first batch; all have the same blocks and weights."""
        return self.programs[0][0]

    def forward(
        self, number: int, weights: dict[str, Any], values: list[Values]
    ) -> list[Values]:
        """Return the values after segment `number`."""
        read = lambda segment, i: ([values[i][v] for v in segment.reads],)  # noqa: E731
        results = self.run(number, _run, (weights,), read)
        return [
            _carried(segments[number], held, result)
            for (segments, _), held, result in zip(
                self.programs, values, results, strict=True
            )
        ]

    def run(
        self,
        number: int,
        step: Callable[[Segment], Callable[..., Any]],
        shared: tuple[Any, ...],
        own: Callable[[Segment, int], tuple[Any, ...]],
    ) -> Iterator[Any]:
        """Yield what `step` of segment `number` makes of each batch, in their order.

        Args:
          number: of the segment.
          step: from a segment to the function that is compiled.
          shared: its first arguments, copied to each device.
          own: its other arguments, by segment and number of the batch.
        """
        places = [jax.device_put(shared, d) for d in self.devices] or [shared]
        ready: dict[Any, Any] = {}
        waiting: collections.deque = collections.deque()
        for i, (segments, _) in enumerate(self.programs):
            segment, place = segments[number], i % len(places)
            arguments = *places[place], *own(segment, i)
            if self.devices:
                arguments = jax.device_put(arguments, self.devices[place])
            if (segment, place) not in ready:
                program = self.compile(step(segment), *arguments, place=place)
                ready[segment, place] = program
            waiting.append(ready[segment, place](*arguments))
            if len(waiting) == len(places):
                yield waiting.popleft()
        yield from waiting

    def measure(
        self,
        number: int,
        weights: dict[str, Any],
        values: list[Values],
        drifted: list[Values] | None,
        names: Sequence[str],
        changed: dict[str, Any] | None = None,
    ) -> tuple[list[Values], dict[str, Moments], dict[str, Layout]]:
        """Return values after a segment, and moments and layouts of the weights
        `names`.

        Names are those that the segment's `weights` have; layouts are in the order of
        first use. `drifted` are the values of the compressed model, where its moments
        are wanted too, and `changed` the weights that these meet, if others.
        """
        changed = weights if changed is None else changed
        after, layouts, total = [], {}, None

        def step(segment: Segment) -> Callable[..., Any]:
            return functools.partial(
                _measured, segment=segment, names=names, layouts=layouts
            )

        def own(segment: Segment, i: int) -> tuple[Any, ...]:
            batch = self.batches[i]
            read = [[values[i][v] for v in segment.reads]]
            if drifted is not None:
                read.append([drifted[i][v] for v in segment.reads])
            return read, batch.get("mask") if isinstance(batch, Mapping) else None

        for i, (results, more) in enumerate(
            self.run(number, step, (weights, changed), own)
        ):
            more = jax.device_put(more, self.devices[0]) if self.devices else more
            total = more if total is None else _add(total, more)
            after.append(_carried(self.programs[i][0][number], values[i], results))
        return after, total or {}, layouts

    def compile(
        self, function: Callable[..., Any], *arguments: Any, place: int = 0
    ) -> Any:
        lowered = jax.jit(function).lower(*arguments)
        key = place, lowered.as_text(), lowered.in_tree, lowered.out_tree
        if key not in self.compiled:
            self.compiled[key] = lowered.compile()
        return self.compiled[key]


def streams(
    function: Callable[[Any, Any], Any],
    shapes: Mapping[str, Any],
    rebuild: Any,
    batches: Any,
    pattern: str | None,
    devices: Sequence[Any] = (),
) -> Streams:
    """Return batches at the start of the model, cut by `pattern` as in `blocks.cut`.

    Raises ValueError where batches of unlike shapes use the weights in unlike ways.
    """
    seen: dict[Any, Any] = {}
    programs = []
    for batch in batches:
        leaves, structure = jax.tree.flatten(batch)
        key = structure, tuple((x.shape, x.dtype) for x in leaves)
        if key not in seen:
            run = lambda weights, batch: function(rebuild(weights), batch)  # noqa: E731
            seen[key] = cut(run, shapes, batch, pattern)
        programs.append(seen[key])
    first, *rest = ([(s.block, s.outer) for s in each] for each, _ in seen.values())
    if any(other != first for other in rest):
        raise ValueError(
            "batches of different shapes use the weights in different orders; pass "
            "batches of one shape"
        )
    return Streams(batches, programs, devices=devices)


def _run(segment: Segment) -> Callable[[dict[str, Any], list], list]:
    """Return segment as a function of one name, which is part of the compiled text."""

    def run(weights: dict[str, Any], read: list) -> list:
        return segment(weights, read)

    return run


def _measured(
    weights: dict[str, jax.Array],
    changed: dict[str, jax.Array],
    read: list[list[jax.Array]],
    mask: Any,
    *,
    segment: Segment,
    names: Sequence[str],
    layouts: dict[str, Layout],
) -> tuple[list[jax.Array], dict[str, Moments]]:
    """Return results on the first of one or two lists of values, and moments over
    both.
    """
    seen: dict[str, list[Use]] = {}

    def note(use: Use) -> dict[str, jax.Array]:
        shape = weights[use.name].shape
        check_layout(use.name, shape, use.layout)
        layouts[use.name] = use.layout
        if len(read) == 1 or use.lookup:
            return row_sums(use, shape, mask)
        if use.looped:
            raise ValueError(
                f"{use.name} is used in a loop or a branch inside its block, where "
                "the original and the compressed model cannot be compared row by row; "
                "pass drift=0"
            )
        seen.setdefault(use.name, []).append(use)
        return {}

    def compare(use: Use) -> dict[str, jax.Array]:
        if use.lookup:
            return {}
        original = seen[use.name].pop(0)
        return row_sums(original, weights[use.name].shape, mask, drifted=use)

    results, sums = run_uses(segment, weights, read[0], note, tagged=names)
    if len(read) > 1:
        _, more = run_uses(segment, changed, read[1], compare, tagged=names)
        sums = {name: named | more.get(name, {}) for name, named in sums.items()}
    named_sums = {name: named for name, named in sums.items() if named}
    return results, averages(named_sums, layouts)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: dict[str, Moments], more: dict[str, Moments]) -> dict[str, Moments]:
    return {name: moments + more[name] for name, moments in total.items()}


def _carried(segment: Segment, held: Values, results: Sequence[Any]) -> Values:
    new = dict(zip(segment.writes, map(np.asarray, results), strict=True))
    return {var: new[var] if var in new else held[var] for var in segment.alive}

"""The two passes of curvatures by blocks: values forward, their gradients backward."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.activations import Values
from jaxcompress.calibration.block_gradients import (
    backward_products,
    is_float,
    weight_gradient,
)
from jaxcompress.calibration.block_measurement import Measurement
from jaxcompress.calibration.block_moments import merge_tied
from jaxcompress.calibration.collect import check_finite
from jaxcompress.calibration.curvature_sums import (
    CurvatureSum,
    column_products,
    has_use_for_pairs,
)
from jaxcompress.calibration.error_feedback import inverse_factor
from jaxcompress.calibration.moment_files import (
    moments_from_arrays,
    moments_to_arrays,
    read_mapped,
)
from jaxcompress.calibration.moments import Moments
from jaxcompress.tracing.blocks import Segment
from jaxcompress.tree.layouts import matricize, trailing
from jaxcompress.tree.leaf import dense


class Passes:
    """State between the stretches of a program, and their finished results.

    `values` are where the forward pass is; `cotangents`, by the place where a value was
    made, where the backward pass is.
    """

    def __init__(self, job: Measurement) -> None:
        self.job = job
        self.values: list[Values] = job.streams.start()
        self.cotangents: list[dict[str, np.ndarray]] = [{} for _ in self.values]
        self.places = [_places(*program) for program in job.streams.programs]
        self.moments: dict[str, dict[int | None, Moments]] = {}
        self.curvatures: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
        readers = [full for segment in job.segments for full in segment.outer]
        self.latest: dict[int, Any] = {}  # values of stretches, from disk
        self.stacks: dict[Any, np.ndarray] = {}  # of second moments, by their slices
        self.shared = {full for full in job.layouts if readers.count(full) > 1}

    def segment(self, batch: int, number: int) -> Segment:
        return self.job.streams.programs[batch][0][number]

    def forward(self, number: int) -> None:
        """Run a stretch, measure its moments, and put what it writes on disk."""
        job, names = self.job, self.job.measured(number)
        leaders = job.leaders(number)
        measured = job.load(f"moments-{number}")
        written = job.load(f"values-{number}")
        if measured is None or written is None:
            weights = job.weights(number)
            wanted = [n for n in names if job.moments is None and weights[n].ndim > 1]
            first = dict.fromkeys(leaders[name] for name in wanted)
            after, moments, _ = job.streams.measure(
                number, weights, self.values, None, list(first)
            )
            written = {
                str(b): _numbered(held[v] for v in self.segment(b, number).writes)
                for b, held in enumerate(after)
            }
            for name, moment in moments.items():
                check_finite(names[name], moment)
                if moment.second is not None:
                    np.save(self._second(number, name), np.asarray(moment.second))
            measured = {}
            for name in wanted:
                if leaders[name] not in moments:
                    continue
                layout = trailing(job.uses[number].layouts[name])
                moment = dataclasses.replace(
                    moments[leaders[name]], second=None, layout=layout
                )
                measured[str(list(names).index(name))] = moments_to_arrays(moment)
            job.save(f"values-{number}", written)
            job.save(f"moments-{number}", measured)
        for place, arrays in measured.items():
            name = list(names)[int(place)]
            moment = moments_from_arrays(arrays)
            second = self._second(number, leaders[name])
            if os.path.exists(second):
                mapped = np.load(second, mmap_mode="r")
                moment = dataclasses.replace(moment, second=mapped)
            full, index = job.slot(number, name)
            parts = self.moments.setdefault(full, {})
            parts[index] = merge_tied(parts.get(index), moment)
        for b, held in enumerate(self.values):
            segment = self.segment(b, number)
            new = dict(zip(segment.writes, _listed(written[str(b)]), strict=True))
            self.values[b] = {v: new[v] if v in new else held[v] for v in segment.alive}

    def backward(self, number: int) -> None:
        """Carry cotangents through a stretch; finish the curvatures of its weights."""
        job, names = self.job, self.job.measured(number)
        carried = job.load(f"cotangents-{number}")
        if carried is None:
            carried = self._carry(number)
            job.save(f"cotangents-{number}", carried)
        for b, cotangents in enumerate(self.cotangents):
            for v in self.segment(b, number).writes:
                cotangents.pop(self.places[b][v], None)
            cotangents |= carried["below"].get(str(b), {})
        for place, arrays in carried["curvatures"].items():
            full, index = job.slot(number, list(names)[int(place)])
            self.curvatures.setdefault(full, {})[index] = arrays

    def finish(self, *, keep: bool) -> dict[str, Moments]:
        """Return the moments of all leaves; second ones stay on disk if `keep`."""
        for full in sorted(self.shared):
            self.curvatures[full] = {None: self._shared(full)}
        by_name = dict(self.job.moments or {})
        for full, parts in self.curvatures.items():
            each = [
                arrays for _, arrays in sorted(parts.items(), key=lambda x: x[0] or 0)
            ]
            moment = by_name.get(full) or self._known(full, keep)
            stacked = None not in parts
            arrays = {
                key: np.stack([a[key] for a in each]) if stacked else each[0][key]
                for key in each[0]
                if all(key in a for a in each)
            }
            arrays = {key: jnp.asarray(x) for key, x in arrays.items()}
            by_name[full] = dataclasses.replace(moment, **arrays)
        return by_name

    def _carry(self, number: int) -> dict[str, Any]:
        """Return what `backward` puts on disk."""
        job, names = self.job, self.job.measured(number)
        weights = job.weights(number)
        own = [name for name, full in names.items() if full not in self.shared]
        leaders = {name: job.leaders(number)[name] for name in own}
        of_leader = {n: self._factor(number, n) for n in set(leaders.values())}
        factors = {n: factor for n, factor in of_leader.items() if factor is not None}
        sums = {name: CurvatureSum() for name in own}
        shapes = {name: job.matrix_shape(names[name], weights[name]) for name in own}
        options = {
            "layouts": {name: job.layouts[names[name]] for name in own},
            "leaders": leaders,
            "plain": job.uses[number].plain,
            "pairs": {
                name: self._has_pairs(names[name], shape)
                for name, shape in shapes.items()
            },
        }
        above: dict[str, Any] = {}
        below: dict[str, Any] = {}

        def step(segment: Segment) -> Any:
            return functools.partial(backward_products, segment=segment, **options)

        def around(segment: Segment, b: int) -> tuple[list, list]:
            read, slopes = self._around(b, number)
            above[str(b)] = _numbered(slopes)
            return read, slopes

        results = job.streams.run(number, step, (weights, factors), around)
        for b, (products, pulled) in enumerate(results):
            for name, each in products.items():
                sums[name].add(b, each)
            reads = self.segment(b, number).reads
            places = [self.places[b][v] for v in reads if is_float(v)]
            below[str(b)] = {
                place: np.asarray(x) + self.cotangents[b].get(place, 0)
                for place, x in zip(places, pulled, strict=True)
            }
        if any(full in self.shared for full in names.values()):
            job.save(f"above-{number}", above)
        curvatures = {
            str(list(names).index(name)): self._finished(
                total, names[name], shapes[name]
            )
            for name, total in sums.items()
        }
        return {"below": below, "curvatures": curvatures}

    def _shared(self, full: str) -> dict[str, Any]:
        """Return the curvatures of a weight that several stretches read.

        Its gradient of a sequence is the sum over all of them.
        """
        job = self.job
        weight = dense(job.source.fetch(full))
        readers = [i for i, s in enumerate(job.segments) if full in s.outer]
        above = {number: job.load(f"above-{number}") for number in readers}
        factor = self._factor(readers[0], f"/{full}")
        shape = job.matrix_shape(full, weight)
        pairs, total = self._has_pairs(full, shape), CurvatureSum()
        held = {number: job.weights(number) for number in readers}
        ready: dict[Any, Any] = {}
        for b in range(len(self.values)):
            gradient: Any = 0
            for number in readers:
                segment, (read, _) = self.segment(b, number), self._around(b, number)
                slopes = _listed(above[number][str(b)])
                arguments = held[number], read, slopes
                if segment not in ready:
                    step = functools.partial(
                        weight_gradient, segment=segment, name=f"/{full}"
                    )
                    ready[segment] = job.streams.compile(step, *arguments)
                gradient = gradient + ready[segment](*arguments)
            matrix = matricize(gradient, job.layouts[full])
            total.add(b, column_products(matrix, factor, pairs=pairs))
        return self._finished(total, full, shape)

    def _finished(
        self, total: CurvatureSum, full: str, shape: tuple[int, ...]
    ) -> dict[str, Any]:
        masks = [
            x.get("mask", x["inputs"]["tokens"] * 0 + 1)
            for x in self.job.streams.batches
        ]
        tokens = float(sum(np.sum(mask > 0) for mask in masks))
        embedding = full in self.job.embeddings
        singles, joint = total.finish(full, shape, tokens, embedding=embedding)
        fields = {"curvatures": np.asarray(singles)}
        return (
            fields
            if joint is None
            else fields | {"joint_curvatures": np.asarray(joint)}
        )

    def _has_pairs(self, full: str, shape: tuple[int, ...]) -> bool:
        allowed = self.job.joint and full not in self.job.embeddings
        return allowed and has_use_for_pairs(shape)

    def _factor(self, number: int, name: str) -> jax.Array | None:
        """Return inverse factors of a weight's inputs, `[slices, inputs, inputs]`."""
        full, index = self.job.slot(number, name)
        if self.job.moments is None:
            second = getattr(self.moments.get(full, {}).get(index), "second", None)
        else:
            second = getattr(self.job.moments.get(full), "second", None)
            second = second if index is None or second is None else second[index]
        if second is None:
            return None
        if isinstance(second, np.memmap):
            second = read_mapped(second)
        flat = jnp.asarray(second).reshape(-1, *second.shape[-2:])
        return jnp.stack([inverse_factor(x, damping=self.job.damping) for x in flat])

    def _around(self, b: int, number: int) -> tuple[list, list]:
        """Return the values that a stretch reads, and the cotangents above it."""
        segment, places = self.segment(b, number), self.places[b]
        leaves = jax.tree.leaves(self.job.streams.batches[b])
        read = []
        for v in segment.reads:
            maker, place = places[v].split("-")
            if maker == "row":
                read.append(leaves[int(place)])
            else:
                read.append(self._written(int(maker))[str(b)][place])
        slopes = [
            self.cotangents[b].get(places[v], np.zeros(v.aval.shape, v.aval.dtype))
            for v in segment.writes
            if is_float(v)
        ]
        if number == len(self.job.segments) - 1:
            slopes = [np.ones((), np.float32)]
        return read, slopes

    def _written(self, number: int) -> Any:
        """Return the values of one stretch; the first and the latest are held."""
        if number not in self.latest:
            for old in sorted(self.latest, reverse=True)[: len(self.latest) - 1]:
                del self.latest[old]
            self.latest[number] = self.job.load(f"values-{number}")
        return self.latest[number]

    def _second(self, number: int, name: str) -> str:
        place = list(self.job.measured(number)).index(name)
        return self.job.mapped_path(f"second-{number}-{place}")

    def _known(self, full: str, keep: bool) -> Moments:
        """Return the moments that were measured of a leaf, slices of a stack as one."""
        parts = sorted(self.moments.get(full, {}).items(), key=lambda x: x[0] or 0)
        if not parts:
            return Moments(jnp.zeros(()))
        seconds = [moment.second for _, moment in parts]
        rest = [dataclasses.replace(moment, second=None) for _, moment in parts]
        second, moment = seconds[0], rest[0]
        if parts[0][0] is not None:
            moment = jax.tree.map(lambda *x: jnp.stack(x), *rest)
            if second is not None:
                second = self._stacked(full, seconds, keep)
        if second is not None and not keep:
            second = jnp.asarray(second)
        return dataclasses.replace(moment, second=second)

    def _stacked(self, full: str, seconds: list[Any], keep: bool) -> np.ndarray:
        """Return second moments of slices as one array; equal ones are one array."""
        key = tuple(getattr(each, "filename", None) or id(each) for each in seconds)
        if key not in self.stacks:
            shape = len(seconds), *seconds[0].shape
            if keep:
                number = sorted(self.moments).index(full)
                path = self.job.mapped_path(f"stack-{number}")
                stack = np.lib.format.open_memmap(path, "w+", "float32", shape)
            else:
                stack = np.empty(shape, np.float32)
            for i, each in enumerate(seconds):
                stack[i] = each
            self.stacks[key] = stack
        return self.stacks[key]


def _places(segments: Sequence[Segment], inputs: Sequence[Any]) -> dict[Any, str]:
    """Return where each value is made: "row-leaf" or "stretch-position"."""
    places = {v: f"row-{k}" for k, v in enumerate(inputs)}
    for i, segment in enumerate(segments):
        places |= {v: f"{i}-{k}" for k, v in enumerate(segment.writes)}
    return places


def _numbered(values: Iterable[Any]) -> dict[str, np.ndarray]:
    return {str(k): np.asarray(x) for k, x in enumerate(values)}


def _listed(numbered: Mapping[str, Any]) -> list[Any]:
    return [numbered[str(k)] for k in range(len(numbered))]

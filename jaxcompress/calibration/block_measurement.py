"""A measurement by blocks: a model cut into stretches, and a place for results."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.activations import Streams
from jaxcompress.calibration.blockwise_parts import full_names
from jaxcompress.calibration.lazy_params import Source
from jaxcompress.calibration.moments import Moments
from jaxcompress.storage.resume import Results
from jaxcompress.tracing.blocks import Segment
from jaxcompress.tracing.metric_gradients import Uses
from jaxcompress.tree.layouts import Layout, matricize
from jaxcompress.tree.leaf import dense
from jaxcompress.types import Params

SCORE = "score"  # a weight of one, by which the score is multiplied at the end


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A model cut into stretches, what is measured of it, and where results are kept.

    Args:
      source: of the weights.
      streams: the sequences, and the stretches of their programs.
      uses: by stretch, of weights by the names that the stretch has.
      layouts: by full name of a measured weight; in a stack, of a slice.
      embeddings: full names of those that are looked up.
      moments: by full name; None where they are measured.
      joint, damping: as in `measure_curvatures`.
      results: where what is finished is kept, for the run of digest `run`.
    """

    source: Source
    streams: Streams
    uses: Sequence[Uses]
    layouts: Mapping[str, Layout]
    embeddings: frozenset[str]
    moments: Mapping[str, Moments] | None
    joint: bool
    damping: float
    results: Results
    run: str

    @property
    def segments(self) -> list[Segment]:
        return self.streams.segments

    def load(self, name: str) -> Any:
        """Return what a run kept under a name; None where there is nothing.

        Raises ValueError where it is of another run.
        """
        advice = (
            "the model, options, moments or batches differ; delete the directory, or "
            "pass another store"
        )
        stored = self.results.load(f"curvatures-{name}", {"run": self.run}, advice)
        return None if stored is None else jax.tree.map(np.asarray, stored[0])

    def save(self, name: str, tree: Params) -> None:
        self.results.save(f"curvatures-{name}", tree, {"run": self.run})

    def mapped_path(self, name: str) -> str:
        """Return the path of an array that is mapped into memory, of this run."""
        folder = os.fspath(self.results.directory)
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, f"{self.run[:8]}-{name}.npy")

    def weights(self, number: int) -> dict[str, jax.Array]:
        """Return dense weights of a segment, by its names."""
        segment = self.segments[number]
        by_name = {}
        for name, full in full_names(segment).items():
            if full == SCORE:
                by_name[name] = jnp.ones(())
                continue
            leaf = self.source.fetch(full)
            index = self.slot(number, name)[1]
            if index is not None:
                leaf = jax.tree.map(lambda x, i=index: x[i], leaf)
            by_name[name] = dense(leaf)
        return by_name

    def measured(self, number: int) -> dict[str, str]:
        """Return full names of the measured weights of a segment, by its names."""
        names = full_names(self.segments[number])
        return {name: full for name, full in names.items() if full in self.layouts}

    def leaders(self, number: int) -> dict[str, str]:
        """Return by name of a segment's measured weight the one whose moments and
        factor serve it too.

        Moments that the caller gave may differ, so that each weight has its own.
        """
        names = self.measured(number)
        if self.moments is not None:
            return {name: name for name in names}
        leaders = self.uses[number].same.leaders(list(names))
        return {name: leaders.get(name, name) for name in names}

    def matrix_shape(self, full: str, weight: jax.Array) -> tuple[int, ...]:
        """Return the shape of a weight, or of a slice, as a matrix."""
        return jax.eval_shape(lambda x: matricize(x, self.layouts[full]), weight).shape

    def slot(self, number: int, name: str) -> tuple[str, int | None]:
        """Return the full name of a segment's weight, and the slice of a stack."""
        block = self.segments[number].block
        index = None if block is None or name.startswith("/") else block.index
        return full_names(self.segments[number])[name], index

"""First steps of every shrink: read, calibrate, and set up the planner."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress.reporting import grouped
from jaxcompress.shrinking import calibration
from jaxcompress.shrinking.efforts import choose_effort
from jaxcompress.shrinking.estimates import describe_estimate, estimate
from jaxcompress.shrinking.fitting import Attempt, Coder
from jaxcompress.shrinking.quality import Quality, measure_quality
from jaxcompress.shrinking.search import Planner
from jaxcompress.shrinking.stages import Stages
from jaxcompress.shrinking.store import Store
from jaxcompress.shrinking.subject import Subject, read_subject
from jaxcompress.storage.resume import digest
from jaxcompress.tracing.layouts import find_layouts
from jaxcompress.tree.compress import is_compressed
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.paths import Entry
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Params, Progress


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A planner, and the data that it measures on; None without data."""

    planner: Planner
    data: calibration.Data | None


def read_dense(model: Any, params: Params, tokenizer: Any) -> Subject:
    """Return the subject of `read_subject`, once its parameters are known to be dense.

    Raises:
      ValueError: parameters that are compressed already.
    """
    subject = read_subject(model, params, tokenizer)
    if is_compressed(subject.params):
        raise ValueError(
            "the parameters are compressed already; shrink starts from dense ones "
            "(jc.materialize(params) where there are no others)"
        )
    return subject


def prepare(
    subject: Subject,
    effort: str,
    *,
    text: Any,
    batches: Iterable[Any] | None,
    measures: bool,
    tries: int = 1,
    store: str | os.PathLike | None,
    key: jax.Array,
    progress: Progress,
    metadata: Mapping[str, Any],
) -> Prepared:
    """Print the estimate, read or write the data, and measure moments.

    Args:
      subject: dense.
      effort: its name.
      text, batches, store, progress, metadata: as for `shrink`.
      measures: whether data are needed to measure on, at any effort.
      tries: plans that may be made until the goal is met, for the estimate.
      key: of the whole run.

    Raises:
      ValueError: data of another kind than the model needs, or none.
    """
    chosen = choose_effort(effort)
    if text is not None and batches is not None:
        raise ValueError("shrink takes text= or batches=, not both")
    kept, stages = Store(store), Stages(progress)
    source = batches if text is None else text
    needs = chosen.texts > 0 or measures
    if not subject.language and (text is not None or (batches is None and needs)):
        raise ValueError(
            f"effort={effort!r} calibrates a {type(subject.model).__name__} on "
            "batches=, as the model takes them; pass some, or effort='quick' with a "
            "size"
        )
    data = None
    if not subject.language and source is not None:
        data = calibration.other_data(batches)
    layouts = find_kernel_layouts(subject, data)
    planned = planned_entries(subject.params, None, None)
    _check_axes(planned, layouts)
    writes = subject.language and source is None and needs
    amount = estimate(subject, planned, layouts, chosen, writes=writes, tries=tries)
    stages.say(f"{grouped(subject.weights)} weights; {describe_estimate(*amount)}")
    weights_digest = "" if store is None else digest(None, subject.params)
    about: list[Any] = [weights_digest, dataclasses.astuple(chosen)]
    if subject.language and (needs or source is not None):
        # Without calibration of its own, an effort measures as "good" does.
        wanted = chosen if chosen.texts else choose_effort("good")
        rows = _token_rows(batches) if batches is not None else text
        data = calibration.language_data(
            subject,
            rows,
            wanted,
            kept,
            weights_digest,
            stages,
            jax.random.fold_in(key, 0),
        )
    if data is not None:
        stages.say(f"calibration: {data.source}; {len(data.held_out)} batches held out")
        about.append(data.digest)
    moments = None
    if chosen.texts:
        moments = calibration.calibrate(
            subject,
            data,
            layouts,
            chosen,
            kept,
            weights_digest,
            stages,
            jax.random.fold_in(key, 1),
        )
        planned = planned_entries(subject.params, moments, None)
        numbers = np.asarray(jax.random.key_data(key)).tolist()
        about.append(numbers)
    coder = Coder(subject, planned, moments, layouts, metadata, kept, about, stages)

    def measure(attempt: Attempt) -> Quality | None:
        if data is None:
            return None
        with stages.stage("measuring", f"{len(data.held_out)} batches"):
            return measure_quality(subject, attempt.params, data.held_out)

    return Prepared(Planner(coder, chosen, measure), data)


def _check_axes(planned: list[Entry], layouts: Mapping[str, Layout]) -> None:
    """Raise ValueError where nothing says which axes of a kernel are inputs."""
    for entry in planned:
        shape = entry.value.shape
        if len(shape) > 2 and entry.name not in layouts:
            raise ValueError(
                f"{entry.name} has shape {shape}, and without an example which axes "
                "are inputs, outputs or layers is unknown; pass batches=, from which a "
                "trace finds out"
            )


def _token_rows(batches: Iterable[Any]) -> np.ndarray:
    """Return tokens `[texts, length]` of the batches of a language model."""
    rows = [b["tokens"] if isinstance(b, Mapping) else b for b in batches]
    return np.concatenate([np.asarray(x) for x in rows])


def find_kernel_layouts(subject: Subject, data: Any) -> dict[str, Layout]:
    """Find where the model's program multiplies each kernel; empty without a batch."""
    if subject.language:
        batch = {"tokens": jax.ShapeDtypeStruct((1, 8), np.int32)}
        return find_layouts(subject.function, subject.params, batch)
    if data is None:
        return {}
    return find_layouts(subject.function, subject.params, data.batches[0])

"""`shrink`: a model of the size, or of the quality, that is asked for."""

import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress.calibration.damage import divergence
from jaxcompress.progress import each_item
from jaxcompress.reporting import grouped
from jaxcompress.reporting.leaves import LeafTable
from jaxcompress.shrinking import calibration
from jaxcompress.shrinking.efforts import choose_effort
from jaxcompress.shrinking.estimates import describe_estimate, estimate
from jaxcompress.shrinking.fitting import Attempt, Coder
from jaxcompress.shrinking.goals import REACHED, parse_goal
from jaxcompress.shrinking.quality import Quality, measure_quality
from jaxcompress.shrinking.search import Planner, meet
from jaxcompress.shrinking.shrunk import Shrunk
from jaxcompress.shrinking.store import Store, digest_arrays
from jaxcompress.shrinking.subject import Subject, read_subject
from jaxcompress.shrinking.tuning import tune
from jaxcompress.tracing.layouts import find_layouts
from jaxcompress.tree.compress import is_compressed
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import nbytes
from jaxcompress.tree.paths import roots
from jaxcompress.tree.record import leaf_reports
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Params


def shrink(
    model: Any,
    params: Params = None,
    tokenizer: Any = None,
    *,
    size: int | str | None = None,
    bits_per_weight: float | None = None,
    kl: float | None = None,
    text: Any = None,
    batches: Iterable[Any] | None = None,
    effort: str = "good",
    store: str | os.PathLike | None = None,
    key: jax.Array | None = None,
    progress: bool | Callable[[Iterable[Any]], Iterable[Any]] = True,
    metadata: dict[str, Any] | None = None,
) -> Shrunk:
    """Makes a model as small as asked, with the least loss that the effort finds.

    Calibrates, shares the size out over all weights (embedding and head included),
    compresses, writes the file and measures it, until it fits. The plan and the recipe
    that gives all leaves equal rates are both measured on held-out text; the one with
    the lower divergence is returned.

        small = jc.shrink("SmolLM2.gguf", size="60MB")
        print(small)
        small.save("small.safetensors")

    Args:
      model: what `models.load` takes (a name, a path); a Linen module; an NNX module;
        or a function of `(params, batch)` that returns logits.
      params: pytree of dense arrays; None for a path or an NNX module.
      tokenizer: of a language model, to read `text` with and to store in the file.
      size: exactly one of the three. Of the finished file, tokenizer and header
        included, in bytes or as "60MB" or "57MiB": never above it, and at least 99 % of
        it where that can be reached.
      bits_per_weight: the same, over all weights of the model.
      kl: mean KL(model || small) in nats per prediction, at most; the file is then as
        small as four tries find.
      text: for language models: the calibration text, the `Path` of a file, or tokens
        `[texts, length]`. None: the model writes its own, by `key`. The last fifth is
        held out to measure on.
      batches: for other models: batches as their `apply` takes them, of equal shapes;
        the last fifth is held out.
      effort: "quick" uses no data, except to measure where some is given; "good"
        measures moments and curvatures and plans by them; "best" measures curvatures
        of pairs of outputs, on more text, and trains steps and norms.
      store: a directory for finished steps. A run that was killed and is started again
        with the same arguments resumes there, and ends with the same bytes.
      key: of the model's own text, sampled curvatures and training; None is key 0.
      progress: True prints what is done and an estimate of time and memory first; or a
        wrapper of iterables; False is silent.
      metadata: JSON values to keep in the file.

    Returns:
      `Shrunk`: parameters, recipe, report, sizes and divergences, and `save`.

    Raises:
      ValueError: no goal or several; a size that cannot be reached; data of another
        kind than the model needs; parameters that are compressed already.
    """
    chosen = choose_effort(effort)
    if text is not None and batches is not None:
        raise ValueError("shrink takes text= or batches=, not both")
    subject = read_subject(model, params, tokenizer)
    if is_compressed(subject.params):
        raise ValueError(
            "the parameters are compressed already; shrink starts from dense ones "
            "(jc.materialize(params) where there are no others)"
        )
    goal = parse_goal(size, bits_per_weight, kl, subject.weights)
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, 3)
    kept = Store(store)
    say = _speaker(progress)

    def wrap(label: str, unit: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        return lambda items: each_item(items, progress, label=label, unit=unit)

    if goal.file_bytes is not None:
        whole = _lossless(subject, goal.file_bytes, metadata or {})
        if whole is not None:
            return whole
    needs_data = chosen.texts > 0 or goal.kl is not None
    if not subject.language and batches is None and needs_data:
        raise ValueError(
            f"effort={effort!r} calibrates a {type(subject.model).__name__} on "
            "batches=; pass some, or effort='quick' with a size"
        )
    planned = planned_entries(subject.params, None, None)
    writes = subject.language and text is None and batches is None and needs_data
    amount = estimate(subject, planned, chosen, writes=writes)
    say(f"{grouped(subject.weights)} weights; {describe_estimate(*amount)}")
    about = [digest_arrays(subject.params), effort] if store is not None else []
    data = None
    if needs_data or text is not None or batches is not None:
        wanted = chosen if chosen.texts else choose_effort("good")
        given = text if batches is None else batches
        if subject.language:
            if batches is not None:
                given = _token_rows(batches)
            data = calibration.language_data(
                subject, given, wanted, kept, _first(about), wrap, keys[0]
            )
        else:
            data = calibration.other_data(batches)
        say(f"calibration: {data.source}; {len(data.held_out)} batches held out")
        about = [*about, data.digest]
    layouts = _layouts(subject, data)
    moments = None
    if chosen.texts:
        moments = calibration.calibrate(
            subject, data, layouts, chosen, kept, _first(about), wrap, keys[1]
        )
        planned = planned_entries(subject.params, moments, None)
    coder = Coder(
        subject, planned, moments, layouts, metadata or {}, kept, about, wrap
    )

    def measure(attempt: Attempt) -> Quality | None:
        if data is None:
            return None
        return measure_quality(subject, attempt.params, data.held_out)

    planner = Planner(coder, chosen, measure, say)
    attempts, notes = meet(planner, goal)
    limit = goal.file_bytes or attempts["plan" if moments else "uniform"][0].file_bytes
    if chosen.tuning_steps:
        first = min(attempts, key=lambda name: attempts[name][1].kl)
        base = attempts[first][0]
        folder = None if store is None else Path(store) / f"tuning-{base.file_bytes}"
        tuned = tune(
            subject,
            base.params,
            data.batches,
            steps=chosen.tuning_steps,
            progress=wrap("tuning", "steps"),
            folder=folder,
            key=keys[2],
        )
        attempt = coder.write(base.rules, tuned)
        if attempt.file_bytes <= limit:
            attempts["tuned"] = attempt, measure(attempt)
        else:
            notes.append(
                f"the tuned file has {grouped(attempt.file_bytes)} bytes and was "
                "dropped"
            )
    name = min(
        attempts,
        key=lambda each: math.inf if attempts[each][1] is None else attempts[each][1].kl,
    )
    attempt, quality = attempts[name]
    if goal.file_bytes and attempt.file_bytes < REACHED * goal.file_bytes:
        notes.append(
            f"{grouped(attempt.file_bytes)} bytes is the nearest that was found below "
            f"{grouped(goal.file_bytes)}"
        )
    predicted = None
    if moments is not None:
        later = dict(roots(attempt.params))
        predicted = sum(divergence(e, later[e.name], layouts) for e in planned)
    shrunk = Shrunk(
        model=subject.with_params(attempt.params),
        params=attempt.params,
        tokenizer=subject.tokenizer,
        recipe=attempt.rules,
        report=_report(subject, attempt, moments, layouts),
        file_bytes=attempt.file_bytes,
        predicted_file_bytes=limit,
        kl=None if quality is None else quality.kl,
        kl_standard_error=None if quality is None else quality.standard_error,
        predicted_kl=predicted,
        candidates={
            each: {"file_bytes": a.file_bytes, "kl": None if q is None else q.kl}
            for each, (a, q) in attempts.items()
        },
        notes=tuple(notes),
        metadata=coder.about_file(attempt.rules),
        subject=subject,
    )
    say(str(shrunk))
    return shrunk


def _speaker(progress: Any) -> Callable[[str], None]:
    def say(line: str) -> None:
        if progress:
            print(f"shrink: {line}", file=sys.stderr, flush=True)

    return say


def _first(about: list[Any]) -> str:
    return about[0] if about else ""


def _token_rows(batches: Iterable[Any]) -> np.ndarray:
    """Tokens `[texts, length]` of the batches of a language model."""
    rows = [b["tokens"] if isinstance(b, dict) else b for b in batches]
    return np.concatenate([np.asarray(x) for x in rows])


def _layouts(subject: Subject, data: Any) -> dict[str, Layout]:
    """Where the model's program multiplies each kernel; nothing without a batch."""
    if subject.language:
        batch = {"tokens": jax.ShapeDtypeStruct((1, 8), np.int32)}
        return find_layouts(subject.function, subject.params, batch)
    if data is None:
        return {}
    return find_layouts(subject.function, subject.params, data.batches[0])


def _lossless(subject: Subject, limit: int, metadata: dict[str, Any]) -> Shrunk | None:
    """The model as it is, where its losslessly coded file fits the limit."""
    if limit < nbytes(subject.params) / 2:  # floats code to more than half
        return None
    coder = Coder(subject, [], None, {}, metadata, Store(None), [], None)
    attempt = coder.write((), subject.params)
    if attempt.file_bytes > limit:
        return None
    return Shrunk(
        model=subject.model,
        params=subject.params,
        tokenizer=subject.tokenizer,
        recipe=(),
        report=_report(subject, attempt, None, {}),
        file_bytes=attempt.file_bytes,
        predicted_file_bytes=limit,
        kl=0.0,
        kl_standard_error=None,
        predicted_kl=0.0,
        candidates={},
        notes=(
            f"the model, coded without loss, has {grouped(attempt.file_bytes)} bytes: "
            "nothing was changed",
        ),
        metadata=coder.about_file(()),
        subject=subject,
    )


def _report(
    subject: Subject,
    attempt: Attempt,
    moments: Any,
    layouts: dict[str, Layout],
) -> LeafTable:
    methods = {re.sub(r"\\(.)", r"\1", n): [method] for n, method in attempt.rules}
    reasons = dict.fromkeys((n for n, _ in roots(subject.params)), "not planned")
    rows = leaf_reports(
        subject.params, attempt.params, methods, reasons, moments, layouts
    )
    return LeafTable(tuple(rows), attempt.leaf_bytes)

"""`shrink`: a model of the size, or of the quality, that is asked for."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress.calibration.damage import divergence
from jaxcompress.calibration.moments import Moments
from jaxcompress.reporting import grouped
from jaxcompress.reporting.leaves import LeafTable
from jaxcompress.shrinking.efforts import choose_effort
from jaxcompress.shrinking.fitting import AIM, Attempt, Coder, room_of
from jaxcompress.shrinking.goals import REACHED, parse_goal
from jaxcompress.shrinking.preparation import prepare, read_dense
from jaxcompress.shrinking.search import KL_TRIES, meet
from jaxcompress.shrinking.shrunk import Shrunk
from jaxcompress.shrinking.stages import Stages
from jaxcompress.shrinking.store import Store
from jaxcompress.shrinking.subject import Subject
from jaxcompress.shrinking.tuning import tune
from jaxcompress.storage.resume import digest
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import nbytes
from jaxcompress.tree.paths import roots
from jaxcompress.tree.record import leaf_reports
from jaxcompress.types import Params, Progress, Rule

CHANGED = 0.25  # of the weights, by root mean square: what a caller should know


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
    progress: Progress = True,
    metadata: dict[str, Any] | None = None,
) -> Shrunk:
    """Make a model as small as asked, with the least loss that the effort finds.

    Calibrates, shares the size out over all weights (embedding and head included),
    compresses, writes the file and measures it, until it fits. What the effort tries
    (plan, equal rates, trained steps) is measured on held-out text; the one with the
    lowest divergence is returned. To save memory, programs that the process compiled
    are dropped after calibration; what runs again is compiled again.

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
        measures moments and curvatures, plans by them, and tries equal rates too;
        "best" plans on more text, and trains steps and norms.
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

    Example:
      >>> small = jc.shrink(model, params, size=60_000, effort="quick", progress=False)
    """
    key = jax.random.key(0) if key is None else key
    chosen = choose_effort(effort)
    parse_goal(size, bits_per_weight, kl, 1)  # before a large model is read
    subject = read_dense(model, params, tokenizer)
    goal = parse_goal(size, bits_per_weight, kl, subject.weights)
    if goal.file_bytes is not None:
        whole = _lossless(subject, goal.file_bytes, metadata or {})
        if whole is not None:
            return whole
    ready = prepare(
        subject,
        effort,
        text=text,
        batches=batches,
        measures=goal.kl is not None,
        tries=1 if goal.kl is None else KL_TRIES,
        store=store,
        key=key,
        progress=progress,
        metadata=metadata or {},
    )
    planner, coder = ready.planner, ready.planner.coder
    stages = coder.stages
    measure, moments, layouts = planner.measure, coder.moments, coder.layouts
    planned = coder.planned
    attempts, notes = meet(planner, goal)
    limit = goal.file_bytes or attempts["plan" if moments else "uniform"][0].file_bytes
    if chosen.tuning_steps:
        first = min(attempts, key=lambda name: attempts[name][1].kl)
        base = attempts[first][0]
        folder = None
        if store is not None:
            about = [coder.about, [list(rule) for rule in base.rules]]
            folder = Path(store) / f"tuning-{digest(about, size=8)}"
        with stages.stage("tuning", f"{chosen.tuning_steps} steps"):
            tuned = tune(
                subject,
                base.params,
                ready.data.batches,
                steps=chosen.tuning_steps,
                progress=stages.items("tuning", "steps"),
                folder=folder,
                key=jax.random.fold_in(key, 2),
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
        key=lambda each: (
            math.inf if attempts[each][1] is None else attempts[each][1].kl
        ),
    )
    attempt, quality = attempts[name]
    if goal.file_bytes and attempt.file_bytes < REACHED * goal.file_bytes:
        notes.append(
            f"{grouped(attempt.file_bytes)} bytes is the nearest that was found below "
            f"{grouped(goal.file_bytes)}"
        )
    report = _report(subject, attempt, moments, layouts)
    if quality is None and (change := _change(report)) > CHANGED:
        notes.append(
            f"weights changed by {change:.0%} (root mean square) and nothing was "
            "measured; effort='good' measures, and loses less"
        )
    predicted = None
    if moments is not None:
        later = dict(roots(attempt.params))
        predicted = sum(divergence(e, later[e.name]) for e in planned)
    shrunk = Shrunk(
        model=subject.with_params(attempt.params),
        params=attempt.params,
        tokenizer=subject.tokenizer,
        recipe=attempt.rules,
        report=report,
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
        stages=stages.taken,
        subject=subject,
    )
    stages.say(str(shrunk))
    return shrunk


def plan_recipe(
    model: Any,
    params: Params = None,
    tokenizer: Any = None,
    *,
    size: int | str | None = None,
    bits_per_weight: float | None = None,
    text: Any = None,
    batches: Iterable[Any] | None = None,
    effort: str = "good",
    store: str | os.PathLike | None = None,
    key: jax.Array | None = None,
    progress: Progress = True,
) -> tuple[list[Rule], dict[str, Any]]:
    """Return the recipe that `shrink` would try first, without compressing anything.

    Args: as for `shrink`, without `kl`.

    Returns:
      The rules, and `{"file_bytes": limit, "planned_bytes": of the planned leaves}`.

    Raises:
      ValueError: as `shrink`.
    """
    subject = read_dense(model, params, tokenizer)
    goal = parse_goal(size, bits_per_weight, None, subject.weights)
    ready = prepare(
        subject,
        effort,
        text=text,
        batches=batches,
        measures=False,
        store=store,
        key=jax.random.key(0) if key is None else key,
        progress=progress,
        metadata={},
    )
    room = room_of(ready.planner.coder, goal.file_bytes, AIM)
    kind = (
        ready.planner.planned
        if ready.planner.coder.moments
        else (ready.planner.uniform)
    )
    about = {"file_bytes": goal.file_bytes, "planned_bytes": room}
    return list(kind(room)), about


def _lossless(subject: Subject, limit: int, metadata: dict[str, Any]) -> Shrunk | None:
    """Return the model as it is, where its losslessly coded file fits the limit."""
    if limit < nbytes(subject.params) / 2:  # floats code to more than half
        return None
    coder = Coder(subject, [], None, {}, metadata, Store(None), [], Stages(False))
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
        stages={},
        subject=subject,
    )


def _change(report: LeafTable) -> float:
    """Return root mean square of the relative errors of the weights that changed."""
    rows = [row for row in report if row.relative_error]
    weights = [math.prod(row.shape) for row in rows]
    squares = [row.relative_error**2 for row in rows]
    return math.sqrt(np.average(squares, weights=weights)) if rows else 0.0


def _report(
    subject: Subject,
    attempt: Attempt,
    moments: Mapping[str, Moments] | None,
    layouts: Mapping[str, Layout],
) -> LeafTable:
    methods = {re.sub(r"\\(.)", r"\1", n): [method] for n, method in attempt.rules}
    reasons = dict.fromkeys((n for n, _ in roots(subject.params)), "not planned")
    rows = leaf_reports(
        subject.params, attempt.params, methods, reasons, moments, layouts
    )
    return LeafTable(tuple(rows), attempt.leaf_bytes)

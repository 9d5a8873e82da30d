"""Batches to calibrate and to measure on, and what calibration measures."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.block_curvatures import (
    measure_curvatures_blockwise,
)
from jaxcompress.calibration.collect import collect_moments
from jaxcompress.calibration.curvatures import measure_curvatures
from jaxcompress.calibration.moments import Moments
from jaxcompress.memory import give_back_memory
from jaxcompress.running.decode_once import decode_once
from jaxcompress.shrinking.efforts import Effort
from jaxcompress.shrinking.own_text import write_text
from jaxcompress.shrinking.quality import first_output
from jaxcompress.shrinking.stages import Stages
from jaxcompress.shrinking.store import Store
from jaxcompress.shrinking.subject import Subject
from jaxcompress.storage.resume import digest
from jaxcompress.tokenization import read_text
from jaxcompress.tree.layouts import Layout
from jaxcompress.types import Params

HELD_OUT = 5  # one window in so many, the last ones
LOGIT_BYTES = 2**27  # of one array of logits in a batch, about
OWN_BATCH = 64  # texts that are written side by side, at most


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches of calibration and, disjoint from them, those to measure on.

    `digest` is of all of their arrays; `source` says in words where they are from.
    """

    batches: Sequence[Any]
    held_out: Sequence[Any]
    digest: str
    source: str


def language_data(
    subject: Subject,
    text: Any,
    effort: Effort,
    store: Store,
    model_digest: str,
    stages: Stages,
    key: jax.Array,
) -> Data:
    """Return windows of a text, or of one that the model writes.

    Args:
      text: the text itself, the path of a file, tokens `[texts, length]`, or None.
      effort: says how many windows, and how long.
      store: keeps what the model writes.
      model_digest: of its parameters.
      stages: told of what is done.
      key: of the writing.

    Raises:
      ValueError: a text that is too short or that no tokenizer reads.
    """
    if text is None:
        rows = _own(subject, effort, store, model_digest, stages, key)
        source = f"{rows.shape[0]} x {rows.shape[1]} tokens that the model wrote"
    elif isinstance(text, str | Path):
        rows = _windows(subject, text, effort)
        source = f"{rows.shape[0]} windows of {rows.shape[1]} tokens of the text"
    else:
        rows = np.asarray(text)
        if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(
                f"text is an array {rows.dtype} {rows.shape}; pass a string, a path or "
                "integer tokens [texts, length]"
            )
        source = f"{rows.shape[0]} x {rows.shape[1]} tokens given"
    if len(rows) < 2:
        raise ValueError(
            f"{len(rows)} window of {rows.shape[1]} tokens: one is held out to measure "
            f"on; give a text of {2 * rows.shape[1]} tokens or more"
        )
    rows = rows.astype(np.int32)
    kept = max(1, len(rows) // HELD_OUT)
    size = max(1, LOGIT_BYTES // (4 * rows.shape[1] * subject.model.vocab_size))
    mask = np.broadcast_to(np.arange(rows.shape[1]) > 0, rows.shape)
    held_out = [
        {"tokens": rows[i : i + size], "mask": mask[i : i + size]}
        for i in range(len(rows) - kept, len(rows), size)
    ]
    used = rows[: len(rows) - kept]
    batches = [{"tokens": used[i : i + size]} for i in range(0, len(used), size)]
    if len(batches) > 1 and len(batches[-1]["tokens"]) < size:
        batches.pop()  # one shape, one compilation
    return Data(batches, held_out, digest(None, {"rows": rows}), source)


def other_data(batches: Iterable[Any]) -> Data:
    """Return batches of any other model; the last fifth is held out.

    Raises:
      ValueError: fewer than two batches.
    """
    batches = list(batches)
    if len(batches) < 2:
        raise ValueError(
            f"{len(batches)} batch: the last fifth of them is held out to measure on; "
            "give at least 2"
        )
    kept = max(1, len(batches) // HELD_OUT)
    data_digest = digest(None, list(batches))
    source = f"{len(batches)} batches given"
    return Data(batches[:-kept], batches[-kept:], data_digest, source)


def _own(
    subject: Subject,
    effort: Effort,
    store: Store,
    model_digest: str,
    stages: Stages,
    key: jax.Array,
) -> np.ndarray:
    tokenizer = subject.tokenizer
    start = 0
    if tokenizer is not None:
        marks = (tokenizer.bos_id, tokenizer.eos_id)
        start = next((mark for mark in marks if mark is not None), 0)
    positions = subject.model.positions or effort.length
    length = min(effort.length, positions)
    about = [
        model_digest,
        repr(subject.model),
        [effort.texts, length, start],
        np.asarray(jax.random.key_data(key)).tolist(),
    ]

    label = "writing calibration text"

    def write() -> dict[str, np.ndarray]:
        with stages.stage(label, f"{effort.texts} texts of {length} tokens"):
            rows = write_text(
                subject.model,
                decode_once(subject.params),
                count=effort.texts,
                length=length,
                start=start,
                batch=OWN_BATCH,
                progress=stages.items(label, "calls"),
                key=key,
            )
        return {"tokens": rows}

    return np.asarray(store.get("text", about, write)["tokens"])


def _windows(subject: Subject, text: str | Path, effort: Effort) -> np.ndarray:
    """Return windows spread evenly over the text; those of its last fifth are last."""
    if subject.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer to read the text with; pass tokenizer=, or "
            "tokens [texts, length] as text="
        )
    words = read_text(text) if isinstance(text, Path) else text
    ids = np.asarray(subject.tokenizer.encode(words), np.int32)
    length = min(effort.length, subject.model.positions or effort.length, ids.size // 5)
    if length < 16:
        raise ValueError(
            f"the text has {ids.size} tokens; give at least 80, better "
            f"{effort.texts * effort.length} and of the kind that the model is to read"
        )
    rows = ids[: ids.size // length * length].reshape(-1, length)
    border = len(rows) - max(1, len(rows) // HELD_OUT)
    kept = max(1, min(effort.texts, len(rows)) // HELD_OUT)
    first = np.linspace(0, border - 1, min(border, effort.texts - kept))
    last = np.linspace(border, len(rows) - 1, min(len(rows) - border, kept))
    chosen = np.unique(np.rint(np.concatenate([first, last])).astype(int))
    return rows[chosen]


def calibrate(
    subject: Subject,
    data: Data,
    layouts: dict[str, Layout],
    effort: Effort,
    store: Store,
    model_digest: str,
    stages: Stages,
    key: jax.Array,
) -> dict[str, Moments]:
    """Return moments with curvatures, from the store where it has them."""
    about = [
        model_digest,
        data.digest,
        dataclasses.astuple(effort),
        np.asarray(jax.random.key_data(key)).tolist(),
    ]

    def compute() -> dict[str, Moments]:
        with stages.stage("moments", f"{len(data.batches)} batches"):
            moments = collect_moments(
                subject.function,
                subject.params,
                data.batches,
                progress=stages.items("moments", "batches"),
            )
            jax.block_until_ready(moments)
        give_back_memory()
        rows = _rows(subject, data, effort)
        with stages.stage("curvatures", f"{len(rows)} sequences"):
            measured = _curvatures(
                subject,
                data,
                rows,
                moments,
                layouts,
                joint=effort.joint,
                key=key,
                progress=stages.items("curvatures", "steps"),
            )
            jax.block_until_ready(measured)
        give_back_memory()
        return measured

    return store.get_moments("moments", about, compute)


def _rows(subject: Subject, data: Data, effort: Effort) -> np.ndarray:
    """Return what curvatures are measured on: tokens, or numbers of examples."""
    if not subject.language:
        count = sum(len(jax.tree.leaves(batch)[0]) for batch in data.batches)
        return _spread(np.arange(count), effort.curvature_rows)[:, None]
    ids = np.concatenate([batch["tokens"] for batch in data.batches])
    length = min(effort.curvature_length, ids.shape[1])
    ids = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
    return _spread(ids, effort.curvature_rows)


def _curvatures(
    subject: Subject,
    data: Data,
    rows: np.ndarray,
    moments: dict[str, Moments],
    layouts: dict[str, Layout],
    **options: Any,
) -> dict[str, Moments]:
    """Measure a language model block by block, in half of the memory; another whole."""
    if subject.language:
        batch = {"tokens": rows}
        return measure_curvatures_blockwise(
            subject.model, subject.params, [batch], moments=moments, **options
        )
    examples = jax.tree.map(lambda *x: np.concatenate(x), *data.batches)
    chosen = jax.tree.map(lambda x: jnp.asarray(x[rows[:, 0]]), examples)

    def apply_fn(params: Params, index: jax.Array) -> jax.Array:
        batch = jax.tree.map(lambda x: x[index.reshape(-1)], chosen)
        logits = first_output(subject.function(params, batch))
        return logits.reshape(1, -1, logits.shape[-1])

    batch = {"tokens": np.arange(len(rows))[:, None]}
    return measure_curvatures(
        apply_fn, subject.params, [batch], moments, layouts=layouts, **options
    )


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return rows[np.rint(chosen).astype(int)]

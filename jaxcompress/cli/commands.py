"""Commands: results on the standard output, progress on the other."""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress import evaluation, reporting, storage
from jaxcompress.cli import demo, running
from jaxcompress.evaluation import Apply, LanguageModelMetrics, perplexity
from jaxcompress.models import generation
from jaxcompress.models.saved import ARCHITECTURE
from jaxcompress.types import Params


def evaluate(options: argparse.Namespace) -> None:
    model, params, tokenizer = running.load_to_run(options.model)
    if options.against:
        other, dense, other_tokenizer = running.load_to_run(options.against)
        if (
            other_tokenizer is None
            or tokenizer is None
            or other_tokenizer.digest != tokenizer.digest
        ):
            raise ValueError(
                f"{options.model} and {options.against} have different tokenizers; "
                "only models that read the same tokens can be compared"
            )
        report = running.compare_on_text(
            options, other, dense, model, params, tokenizer
        )
        row = {"model": options.model, "against": options.against, **report.to_dict()}
    else:
        row = {"model": options.model, **_score(options, model, params, tokenizer)}
    if options.json:
        reporting.append_lines(options.json, [row])


def _score(
    options: argparse.Namespace, model: Any, params: Params, tokenizer: Any
) -> dict[str, Any]:
    batches = running.text_batches(options, tokenizer)
    start = time.perf_counter()
    sums = evaluation.totals(
        LanguageModelMetrics(Apply(model)), params, running.track(batches)
    )
    seconds = time.perf_counter() - start
    loss, tokens = sums["loss"][0] / sums["loss"][1], int(sums["loss"][1])
    row = {
        "perplexity": perplexity(loss),
        "loss": loss,
        "bits_per_byte": sums["bits_per_byte"][0] / sums["bits_per_byte"][1],
        "accuracy": sums["accuracy"][0] / tokens,
        "tokens": tokens,
        "bytes": int(sums["bits_per_byte"][1]),
        "seconds": seconds,
    }
    running.show(
        *(f"{key.replace('_', ' '):14} {value:.6g}" for key, value in row.items())
    )
    return row


def generate(options: argparse.Namespace) -> None:
    model, params, tokenizer = running.load_to_run(options.model)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer; text needs one")
    untold = [options.prompt]

    def tell(text: str, row: int) -> None:
        del row
        print(*untold, text, sep="", end="", flush=True)
        untold.clear()

    generation.generate(
        model,
        params,
        tokenizer,
        options.prompt,
        max_tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop,
        on_text=tell,
        key=jax.random.key(options.seed),
    )
    print(*untold, sep="")


def inspect(options: argparse.Namespace) -> None:
    with storage.open_checkpoint(options.file) as stored:
        rows = []
        for name in stored.names:
            kind, shape, dtype = stored.describe(name)
            rows.append(
                {
                    "leaf": _shown_name(name, stored.metadata),
                    "type": kind,
                    "shape": "x".join(map(str, shape)),
                    "dtype": dtype,
                    "bytes in file": stored.nbytes(name),
                    "bits in file": 8 * stored.nbytes(name) / max(1, np.prod(shape)),
                }
            )
        total = sum(file.size for file in stored.files()) + stored.index_bytes
        running.show(reporting.table(rows), "")
        if options.parts:
            running.show(reporting.table(list(_parts(stored))), "")
        for key, value in {**stored.metadata, "versions": stored.versions}.items():
            running.show(f"{key}: {json.dumps(value)}")
        running.show(f"{len(rows)} leaves, {reporting.grouped(total)} bytes in all")


def _parts(stored: storage.StoredParams) -> Iterator[dict[str, Any]]:
    """Yield a row for each array of a file, and for each kind of other bytes."""
    for name in stored.names:
        weights = max(1, np.prod(stored.describe(name)[1]))
        for part in stored.parts(name):
            yield {
                "array": _shown_name(part.name, stored.metadata),
                "stored as": part.dtype,
                "shape": "x".join(map(str, part.shape)),
                "coding": part.coding or "none",
                "bytes in file": part.nbytes,
                "bits a weight": 8 * part.nbytes / weights,
            }
    for name, count in stored.overhead().items():
        other = dict.fromkeys(("stored as", "shape", "coding"), "")
        yield {"array": f"({name})"} | other | {"bytes in file": count}


def _shown_name(name: str, metadata: dict[str, Any]) -> str:
    """Return the name that recipes take, or, of a packed file, its path and part."""
    if ARCHITECTURE in metadata:
        return name.removeprefix("params/")
    if "archive" in metadata and name.startswith("files/"):
        _, number, *part = name.split("/")
        path = metadata["archive"][int(number)]["path"]
        return f"{path} part {'/'.join(part)}"
    return name


def verify(options: argparse.Namespace) -> None:
    summary = storage.verify(options.file)
    running.show(
        f"{options.file}: as written. "
        f"{reporting.grouped(summary['bytes'])} bytes in {summary['files']} file(s), "
        f"{summary['leaves']} leaves, {summary['arrays']} arrays, format "
        f"{summary['format_version']}"
    )


def pack(options: argparse.Namespace) -> None:
    progress = running.progress(options)("packing", "parts")
    coding = "decode" if options.fast else "size"
    summary = storage.pack(
        options.folder, options.out, base=options.base, coding=coding, progress=progress
    )
    before, after = summary["bytes"], summary["packed"]
    running.show(
        f"{options.out}: {reporting.grouped(after)} bytes of "
        f"{reporting.grouped(before)} in {summary['files']} file(s), "
        f"{100 * after / max(1, before):.1f} %"
    )
    if options.base:
        running.show(
            f"{summary['differences']} part(s) are differences from {options.base}"
        )
    if storage.is_orbax(options.folder):
        running.show(
            "Orbax has compressed the arrays in its files, which are kept as they are: "
            "jaxcompress.save of what Orbax restores takes fewer bytes"
        )


def unpack(options: argparse.Namespace) -> None:
    progress = running.progress(options)("unpacking", "files")
    summary = storage.unpack(
        options.file, options.out, base=options.base, progress=progress
    )
    running.show(
        f"{options.out}: {reporting.grouped(summary['bytes'])} bytes in "
        f"{summary['files']} file(s), as they were packed"
    )


def demo_(options: argparse.Namespace) -> None:
    if options.out:
        demo.run(Path(options.out), limit=options.windows)
        return
    with tempfile.TemporaryDirectory() as folder:
        demo.run(Path(folder), limit=options.windows)

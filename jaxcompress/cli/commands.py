"""What each command does; results on the standard output, progress on the other."""

import argparse
import dataclasses
import functools
import json
import math
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress import evaluation, reporting, storage
from jaxcompress.cli import demo
from jaxcompress.evaluation import (
    Apply,
    LanguageModelMetrics,
    Report,
    perplexity,
    windows,
)
from jaxcompress.models import generation
from jaxcompress.models.loading import load, shapes
from jaxcompress.models.saved import save
from jaxcompress.models.transformer import stack_layers
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tokenization import read_text
from jaxcompress.tree.compress import chain, compress
from jaxcompress.tree.leaf import nbytes
from jaxcompress.tree.methods import parse
from jaxcompress.tree.paths import roots
from jaxcompress.tree.record import LeafReport

CODING = ("entropy_code()", "code_floats()")
RULE = re.compile(r"(?P<pattern>.+?)=(?P<method>None|[A-Za-z_]\w*(\(.*\))?)")
PER_LAYER = ("heads", "kv_heads", "mlp_width", "sliding_window")


def _progress(label: str, unit: str = "leaves") -> Any:
    return functools.partial(reporting.track, label=label, unit=unit)


def compress_(options: argparse.Namespace) -> None:
    stages = stages_of(options.recipe or ["symmetric(bits=8)"])
    if options.dry_run:
        _dry_run(options, stages)
        return
    if not Path(options.out).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"no directory {Path(options.out).absolute().parent} to write to; make it"
        )
    seconds = {}
    clock = time.perf_counter()
    model, params, tokenizer = load(options.model, scan=False)
    seconds["load"] = time.perf_counter() - clock
    clock = time.perf_counter()
    reports: list[LeafReport] = []
    small = compress(
        params, chain(*stages), record=reports, progress=_progress("compressing")
    )
    coded = small
    if not options.no_coding:
        coded = compress(small, chain(*CODING), progress=_progress("coding"))
        held = {name: nbytes(value) for name, value in roots(coded)}
        reports = [
            dataclasses.replace(
                report,
                bytes_after=held[report.name],
                bits_per_weight=8 * held[report.name] / max(1, math.prod(report.shape)),
            )
            for report in reports
        ]
    seconds["compress"] = time.perf_counter() - clock
    clock = time.perf_counter()
    recipe = options.recipe or ["symmetric(bits=8)"]
    metadata = {"source": str(options.model), "recipe": recipe}
    save(options.out, model, coded, tokenizer, metadata)
    seconds["save"] = time.perf_counter() - clock
    with storage.open_checkpoint(options.out) as stored:
        inside = {name: stored.nbytes(name) for name in stored.names}
        files = [file.path for file in stored.files()]
    inside = {name.removeprefix("params/"): size for name, size in inside.items()}
    size = reporting.measure(coded, *files)
    row = {
        "model": str(options.model),
        "recipe": recipe,
        "weights": size.weights,
        "memory_bytes_before": nbytes(params),
        "memory_bytes_after": size.memory_bytes,
        "file_bytes": size.file_bytes,
        "bits_per_weight": size.bits_per_weight,
        "seconds": seconds,
    }
    _print(
        reporting.leaf_table(reports, inside, largest=options.leaves),
        "",
        f"{options.out}: {reporting.grouped(size.file_bytes)} bytes, "
        f"{size.bits_per_weight:.3f} bits per weight, tokenizer included",
    )
    if options.text:
        report = _compare(
            options, *_to_run(model, params), *_to_run(model, small), tokenizer
        )
        row["text"] = report.to_dict()
    row["peak_memory_bytes"] = reporting.peak_memory()
    spent = ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items())
    peak = row["peak_memory_bytes"]
    _print(f"{spent}; peak memory {peak / 2**20:.0f} MiB" if peak else spent)
    if options.json:
        reporting.append_lines(options.json, [row])


def stages_of(texts: Sequence[str]) -> list[Any]:
    """The stages of a chain that `--recipe` options say; see its help."""
    stages: list[Any] = []
    rules: list[Any] | None = None
    for text in texts:
        try:
            stages.append(parse(text))
            rules = None
            continue
        except ValueError:
            match = RULE.fullmatch(text)
            if match is None:
                raise
        method = match["method"]
        rule = (match["pattern"], None if method == "None" else parse(method))
        if rules is None:
            stages.append(rules := [])
        rules.append(rule)
    return stages


def _dry_run(options: argparse.Namespace, stages: list[Any]) -> None:
    params = shapes(options.model)
    small = jax.eval_shape(functools.partial(compress, recipe=chain(*stages)), params)
    after = dict(roots(small))
    rows = [
        {
            "leaf": name,
            "shape": "x".join(map(str, old.shape)),
            "bytes before": nbytes(old),
            "after": nbytes(after[name]),
            "bits/weight": 8 * nbytes(after[name]) / max(1, old.size),
        }
        for name, old in roots(params)
    ]
    rows.sort(key=lambda row: -row["bytes before"])
    before, later = nbytes(params), nbytes(small)
    weights = reporting.weight_count(params)
    _print(
        reporting.table(rows[: options.leaves]),
        f"{max(0, len(rows) - options.leaves)} more leaves" if rows else "",
        "",
        f"memory {reporting.grouped(before)} bytes before, {reporting.grouped(later)} "
        f"after: {8 * later / weights:.3f} bits per weight of "
        f"{reporting.grouped(weights)}",
        "The file holds as much and its header, or less with lossless coding, which "
        "depends on values. Nothing was written.",
    )


def evaluate(options: argparse.Namespace) -> None:
    model, params, tokenizer = _load_to_run(options.model)
    if options.against:
        other, dense, theirs = _load_to_run(options.against)
        if theirs is None or tokenizer is None or theirs.digest != tokenizer.digest:
            raise ValueError(
                f"{options.model} and {options.against} have different tokenizers; "
                "only models that read the same tokens can be compared"
            )
        report = _compare(options, other, dense, model, params, tokenizer)
        row = {"model": options.model, "against": options.against, **report.to_dict()}
    else:
        row = {"model": options.model, **_score(options, model, params, tokenizer)}
    if options.json:
        reporting.append_lines(options.json, [row])


def _load_to_run(name: str) -> tuple[Any, Any, Any]:
    """A loaded model with its layers stacked where they are alike: compiled once.

    Losslessly coded arrays are decoded, so that running does not decode them again.
    """
    model, params, tokenizer = load(name)
    return *_to_run(model, params), tokenizer


def _to_run(model: Any, params: Any) -> tuple[Any, Any]:
    params = decode_once(params)
    layers = [getattr(model, field) for field in PER_LAYER]
    alike = not any(isinstance(x, tuple) and len(set(x)) > 1 for x in layers)
    if alike and not model.scan:
        try:
            return model.clone(scan=True), stack_layers(params)
        except ValueError:  # layers compressed differently run one by one
            pass
    return model, params


def _score(
    options: argparse.Namespace, model: Any, params: Any, tokenizer: Any
) -> dict[str, Any]:
    batches = _batches(options, tokenizer)
    start = time.perf_counter()
    sums = evaluation.totals(
        LanguageModelMetrics(Apply(model)), params, _track(batches)
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
    _print(*(f"{key.replace('_', ' '):14} {value:.6g}" for key, value in row.items()))
    return row


def _compare(
    options: argparse.Namespace,
    model: Any,
    params: Any,
    small_model: Any,
    small: Any,
    tokenizer: Any,
) -> Report:
    batches = _batches(options, tokenizer)
    report = evaluation.compare(
        Apply(model),
        params,
        small,
        _track(batches),
        small_apply_fn=Apply(small_model),
    )
    _print(*reporting.comparison_lines(report))
    return report


def _track(batches: list[Any]) -> Any:
    return reporting.track(
        batches,
        "evaluating",
        unit="tokens",
        amount=lambda batch: int(np.sum(batch["mask"])),
    )


def _batches(options: argparse.Namespace, tokenizer: Any) -> list[Any]:
    if tokenizer is None:
        raise ValueError("the model came without a tokenizer; a text needs one")
    ids = tokenizer.encode(read_text(options.text))
    return windows(
        ids,
        options.length,
        options.batch,
        token_bytes=tokenizer.token_bytes(ids),
        limit=options.windows,
    )


def generate(options: argparse.Namespace) -> None:
    model, params, tokenizer = _load_to_run(options.model)
    if tokenizer is None:
        raise ValueError(f"{options.model} came without a tokenizer; text needs one")
    text = generation.generate(
        model,
        params,
        tokenizer,
        options.prompt,
        max_tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        key=jax.random.key(options.seed),
    )
    print(options.prompt + text)


def inspect(options: argparse.Namespace) -> None:
    with storage.open_checkpoint(options.file) as stored:
        rows = []
        for name in stored.names:
            kind, shape, dtype = stored.describe(name)
            rows.append(
                {
                    "leaf": name,
                    "type": kind,
                    "shape": "x".join(map(str, shape)),
                    "dtype": dtype,
                    "bytes in file": stored.nbytes(name),
                    "bits/weight": 8 * stored.nbytes(name) / max(1, np.prod(shape)),
                }
            )
        total = sum(file.size for file in stored.files()) + stored.index_bytes
        _print(reporting.table(rows), "")
        for key, value in {**stored.metadata, "versions": stored.versions}.items():
            _print(f"{key}: {json.dumps(value)}")
        _print(f"{len(rows)} leaves, {reporting.grouped(total)} bytes in all")


def verify(options: argparse.Namespace) -> None:
    found = storage.verify(options.file)
    _print(
        f"{options.file}: as written. "
        f"{reporting.grouped(found['bytes'])} bytes in {found['files']} file(s), "
        f"{found['leaves']} leaves, {found['arrays']} arrays, format "
        f"{found['format_version']}"
    )


def pack(options: argparse.Namespace) -> None:
    progress = _progress("packing", "parts")
    coding = "decode" if options.fast else "size"
    found = storage.pack(
        options.folder, options.out, base=options.base, coding=coding, progress=progress
    )
    before, after = found["bytes"], found["packed"]
    _print(
        f"{options.out}: {reporting.grouped(after)} bytes of "
        f"{reporting.grouped(before)} in {found['files']} file(s), "
        f"{100 * after / max(1, before):.1f} %"
    )
    if options.base:
        _print(f"{found['differences']} part(s) are differences from {options.base}")
    if storage.is_orbax(options.folder):
        _print(
            "Orbax has compressed the arrays in its files, which are kept as they are: "
            "jaxcompress.save of what Orbax restores takes fewer bytes"
        )


def unpack(options: argparse.Namespace) -> None:
    progress = _progress("unpacking", "files")
    found = storage.unpack(
        options.file, options.out, base=options.base, progress=progress
    )
    _print(
        f"{options.out}: {reporting.grouped(found['bytes'])} bytes in "
        f"{found['files']} file(s), as they were packed"
    )


def demo_(options: argparse.Namespace) -> None:
    if options.out:
        demo.run(Path(options.out), limit=options.windows)
        return
    with tempfile.TemporaryDirectory() as folder:
        demo.run(Path(folder), limit=options.windows)


def _print(*items: Any) -> None:
    print(reporting.render(*items), flush=True)

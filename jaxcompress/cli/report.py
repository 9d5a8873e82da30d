"""`report`: a folder with the table and the pictures of a small model."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress import plots, reporting
from jaxcompress.cli import running
from jaxcompress.models.loading import load
from jaxcompress.reporting.leaves import report
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.paths import roots
from jaxcompress.types import Params

PRUNED = 0.3  # share of zeros from which masks are drawn; coarse codes have fewer


def report_(options: argparse.Namespace) -> None:
    model, small, tokenizer = load(options.model)
    other, params, _ = load(options.against, scan=getattr(model, "scan", None))
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    table = report(params, small)
    lines = [reporting.leaf_table(table.rows, table.file_bytes, largest=len(table))]
    row: dict[str, Any] = {
        "model": options.model,
        "against": options.against,
        "leaves": [reporting.plain(each) for each in table],
        "file_bytes": dict(table.file_bytes),
    }
    if options.text:
        before, after = running.to_run(other, params), running.to_run(model, small)
        comparison = running.compare_on_text(options, *before, *after, tokenizer)
        row["text"] = comparison.to_dict()
        lines += ["", *reporting.comparison_lines(comparison)]
    text = reporting.render(*lines)
    (folder / "report.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
    written = ["report.txt", "report.json"]
    figures = {
        "layers": lambda: plots.layers(table),
        "histograms": lambda: plots.histograms(params, small),
        "spectra": lambda: plots.spectra(params),
    }
    if _is_pruned(small):
        figures["masks"] = lambda: plots.masks(small)
    for name, draw in figures.items():
        draw().savefig(folder / f"{name}.png", dpi=150)
        written.append(f"{name}.png")
    running.show(reporting.leaf_table(table.rows, table.file_bytes), "")
    running.show(f"{folder}: {', '.join(written)}")


def _is_pruned(small: Params) -> bool:
    """Return whether a large matrix has many zeros."""
    matrices = [x for _, x in roots(small) if x.ndim > 1]
    if not matrices:
        return False
    return any(
        float(np.mean(np.asarray(dense(x)) == 0)) > PRUNED
        for x in sorted(matrices, key=lambda x: -np.prod(x.shape))[:4]
    )

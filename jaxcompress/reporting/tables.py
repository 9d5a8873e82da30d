"""Tables: measured numbers as text, and as JSON lines.

A size here is the length of a file or the bytes of arrays really held; nothing is an
estimate.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxcompress.tree.compress import LeafReport
from jaxcompress.tree.leaf import nbytes
from jaxcompress.tree.paths import roots
from jaxcompress.types import Params

NATURAL = 10_000  # characters: wider than any table
WIDEST = 64  # characters of a method in a table


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of parameters: `weights` counts numbers of the dense model.

    `memory_bytes` are of the arrays held after loading, `file_bytes` of the file or
    files, header and checksums included.
    """

    weights: int
    memory_bytes: int
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file per weight of the dense model."""
        return 8 * self.file_bytes / self.weights


def measure(params: Params, *paths: str | Path) -> Size:
    """Return the size of parameters in memory, and of the files they are stored in."""
    return Size(
        weights=weight_count(params),
        memory_bytes=nbytes(params),
        file_bytes=sum(Path(path).stat().st_size for path in paths),
    )


def weight_count(params: Params) -> int:
    """Return numbers in the dense form of a tree; works on `eval_shape` too."""
    return sum(math.prod(value.shape) for _, value in roots(params))


# Tables.


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Callable[[Any], str]] | None = None,
    *,
    title: str | None = None,
) -> Table:
    """Return a table of rows, one column per key; numbers are set right.

    Missing ones are "-".

    `columns` maps the keys to show, in order, to what formats their values; by default
    all keys of the first row, with `brief`.
    """
    columns = columns or dict.fromkeys(rows[0] if rows else (), brief)
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for key in columns:
        text = all(isinstance(row.get(key, ""), str) for row in rows)
        grid.add_column(key, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        cells = (
            "-" if row.get(key) is None else form(row[key])
            for key, form in columns.items()
        )
        grid.add_row(*cells)
    return grid


def leaf_table(
    reports: Sequence[LeafReport],
    stored: Mapping[str, int] | None = None,
    *,
    largest: int = 12,
) -> Table:
    """Tabulate leaves: the largest ones, the rest in one row, the total.

    `bits` are those of a weight in memory; `stored` are bytes in a file by leaf name.
    The relative error is `|x - y| / |x|` (Frobenius norms) of the weights.
    """
    order = sorted(reports, key=lambda report: -report.bytes_before)
    shown, rest = order[:largest], order[largest:]
    grid = Table(box=None, pad_edge=False)
    for name in ("leaf", "shape", "method"):
        grid.add_column(name, no_wrap=True)
    columns = ("bytes before", "in memory", "bits", "in file", "relative error")
    for name in columns if stored else columns[:3] + columns[4:]:
        grid.add_column(name, justify="right", no_wrap=True)
    for report in shown:
        error = report.relative_error
        grid.add_row(
            report.name,
            "x".join(map(str, report.shape)),
            _brief_method(report.method) or f"none: {report.reason}",
            *_amounts([report], stored),
            "-" if error is None else f"{error:.4f}",
        )
    if rest:
        grid.add_row(f"{len(rest)} more", "", _methods(rest), *_amounts(rest, stored))
    grid.add_section()
    grid.add_row(f"{len(order)} leaves", "", "", *_amounts(order, stored))
    return grid


def _brief_method(method: str) -> str:
    """Return a method in one column: a rate for each layer becomes its range."""

    def shorten(match: re.Match[str]) -> str:
        numbers = [float(x) for x in match[1].split(",") if x.strip()]
        return f"({min(numbers):g} to {max(numbers):g})"

    text = re.sub(r"\(([\d., ]+,[\d., ]*)\)", shorten, method)
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def _methods(reports: Sequence[LeafReport]) -> str:
    counts: dict[str, int] = {}
    for report in reports:
        method = report.method.split("(")[0] or "none"
        counts[method] = counts.get(method, 0) + 1
    return ", ".join(f"{method} ({count})" for method, count in counts.items())


def _amounts(
    reports: Sequence[LeafReport], stored: Mapping[str, int] | None
) -> list[str]:
    before = sum(report.bytes_before for report in reports)
    after = sum(report.bytes_after for report in reports)
    weights = sum(math.prod(report.shape) for report in reports)
    cells = [grouped(before), grouped(after), f"{8 * after / max(1, weights):.3f}"]
    if stored:
        cells.append(grouped(sum(stored.get(report.name, 0) for report in reports)))
    return cells


def comparison_lines(report: Any) -> list[str]:
    """Return the numbers of an `evaluation.Report`, a line each, with their units."""
    rows = []
    for key, unit in (
        ("perplexity", "per token"),
        ("loss", "nats per token"),
        ("bits_per_byte", "bits per byte"),
        ("accuracy", "of tokens"),
    ):
        dense, small = getattr(report.dense, key), getattr(report.small, key)
        if small is not None:
            name = key.replace("_", " ")
            rows.append(f"{name:14} {small:<10.6g} against {dense:.6g} {unit}")
    error = report.kl_standard_error
    spread = "" if error is None else f" +- {error:.2g}"
    rows.append(f"{'KL':14} {report.kl:.4g}{spread} nats per token")
    rows.append(f"{'top-1 the same':14} {report.agreement:.4f} of tokens")
    rows.append(f"{'tokens':14} {report.tokens} in {report.windows} windows")
    return rows


def brief(value: Any) -> str:
    """Return a value with about four digits; integers with thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return grouped(value) if isinstance(value, int) else f"{value:.4g}"


def grouped(value: int) -> str:
    """Return an integer with a thin gap between thousands: `12 345 678`."""
    return f"{value:,}".replace(",", " ")


def render(*tables: Table | str, width: int | None = None) -> str:
    """Return tables and lines as plain text, no colors, one line a row.

    Names are never folded: where a terminal is narrower it wraps the lines, and grep
    finds what it looks for. `width` cuts off at so many characters.
    """
    width = NATURAL if width is None else width
    console = Console(width=width, no_color=True, highlight=False, markup=False)
    with console.capture() as capture:
        for item in tables:
            console.print(item)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def append_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """Append rows (dicts or dataclasses) to a file of JSON lines.

    NaN and infinity, which JSON lacks, become null.
    """
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(plain(row), allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Return dataclasses, mappings, sequences and NumPy numbers as JSON knows them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

"""Tables of Markdown, written from rows of results between two comments of a page.

A room lists its tables in `tables.py`; its `README.md` holds the text around them and,
for each, the lines `<!-- table: NAME -->` and `<!-- end -->`. Neither the tables nor
this module imports JAX.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)

Row = dict[str, Any]
Cell = str | Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Choose rows of a file of results, and say what each column shows of them.

    Args:
        results: the file `results/<results>.jsonl` of the room.
        command: what made the rows, after `python -m experiments.`.
        columns: heading to a template of `str.format_map`, or to a function of a row.
            A cell whose row lacks a value stays empty.
        rows: chooses, orders and joins the rows of the file, all of them by default.
        files: the format of the files whose sizes are shown, for rows that do not say
            it themselves; 0 where no sizes of files are shown.
    """

    results: str
    command: str
    columns: Mapping[str, Cell]
    rows: Callable[[list[Row]], Iterable[Row]] = list
    files: int = 0


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a file of results."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def rooms() -> list[str]:
    """List the rooms that have tables."""
    return sorted(
        path.parent.name
        for path in ROOT.glob("*/tables.py")
        if path.parent != Path(__file__).parent
    )


def tables_of(room: str) -> dict[str, Table]:
    """Import the tables of a room by their names."""
    return importlib.import_module(f"experiments.{room}.tables").TABLES


def render(table: Table, room: str) -> str:
    """Write a table with the command, commits and versions of its rows below it.

    Raises:
        ValueError: if no row is chosen, or a column is empty in all of them.
    """
    path = ROOT / room / "results" / f"{table.results}.jsonl"
    chosen = list(table.rows(read_rows(path)))
    if not chosen:
        raise ValueError(
            f"{room}: no row of {table.results}.jsonl is chosen for `{table.command}`"
        )
    lines = [[x.strip() for x in table.columns], ["---"] * len(table.columns)]
    lines += [[cell(row, x) for x in table.columns.values()] for row in chosen]
    empty = [
        lines[0][i] for i, x in enumerate(zip(*lines[2:], strict=True)) if not any(x)
    ]
    if empty:
        raise ValueError(
            f"{room}: no row of `{table.command}` has a value for {empty}; does the "
            f"column name a key of {table.results}.jsonl?"
        )
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{source(table, list(measured(chosen)))}"


def cell(row: Row, template: Cell) -> str:
    """Write what a column shows of a row; nothing where the row lacks a value."""
    try:
        return template(row) if callable(template) else template.format_map(row)
    except (KeyError, TypeError):
        return ""


def measured(rows: Iterable[Any]) -> Iterator[Row]:
    """Find the rows of results in rows that were joined."""
    for row in rows:
        if isinstance(row, dict):
            parts = [x for x in row.values() if isinstance(x, dict | list)]
            if {"device", "jax", "commit"} & row.keys() or not parts:
                yield row
            else:
                yield from measured(parts)
        elif isinstance(row, list):
            yield from measured(row)


def source(table: Table, rows: list[Row]) -> str:
    """Say which command made the rows, at which commits, and on what."""
    commits = distinct(str(row.get("commit") or "")[:7] for row in rows)
    parts = [f"`python -m experiments.{table.command}`"]
    if commits:
        parts.append(f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}")
    if not rows or not all(row.get("commit") for row in rows):
        parts.append("some without a commit" if commits else "commit not recorded")
    versions = distinct(
        row.get("jax") or row.get("versions", {}).get("jax", "") for row in rows
    )
    if versions:
        parts.append(f"jax {', '.join(versions)}")
    parts += distinct(str(row.get("device", "")) for row in rows)
    if table.files:
        formats = sorted({int(row.get("format", table.files)) for row in rows})
        parts.append(f"files of format {' and '.join(map(str, formats))}")
    return f"<sub>{'; '.join(parts)}</sub>"


def distinct(values: Iterable[str]) -> list[str]:
    """Drop repeated and empty values, in order."""
    return [x for x in dict.fromkeys(values) if x]


def page(room: str) -> Path:
    """Return the path of the page of a room."""
    return ROOT / room / "README.md"


def refresh(room: str) -> str:
    """Write the text of a room's page with its tables anew.

    Raises:
        ValueError: if the page and `tables.py` name different tables.
    """
    text = page(room).read_text(encoding="utf-8")
    tables = tables_of(room)
    in_page = BLOCK.findall(text)
    if sorted(in_page) != sorted(tables):
        raise ValueError(
            f"{room}/README.md has the tables {sorted(in_page)}, {room}/tables.py "
            f"{sorted(tables)}; each needs its two comments in the page, once"
        )

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n{render(tables[name], room)}\n<!-- end -->"

    return BLOCK.sub(block, text)


# Rows


def where(**values: Any) -> Callable[[list[Row]], list[Row]]:
    """Choose rows that have these values; a tuple allows each of its values."""

    def chosen(rows: list[Row]) -> list[Row]:
        return [
            row for row in rows if all(agrees(row.get(k), v) for k, v in values.items())
        ]

    return chosen


def agrees(value: Any, wanted: Any) -> bool:
    """Compare a value with the one that is wanted, or with each of several."""
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def last(rows: Iterable[Row], *by: str) -> list[Row]:
    """Keep the last row of each combination of values, where the first one was."""
    return list({tuple(str(row.get(key)) for key in by): row for row in rows}.values())


def spread(rows: Iterable[Row], on: str, *by: str) -> list[Row]:
    """Join rows that agree in `by`: a row of these values, and a row for each `on`."""
    joined: dict[str, Row] = {}
    for row in rows:
        key = {name: row.get(name) for name in by}
        joined.setdefault(json.dumps(key), key)[str(row[on])] = row
    return list(joined.values())


# Cells


def named(key: str, names: Mapping[Any, str]) -> Callable[[Row], str]:
    """Show a value by another name, or as it is."""
    return lambda row: names.get(row[key], str(row[key]))


def percent(key: str, digits: int = 0) -> Callable[[Row], str]:
    """Show a fraction in percent."""
    return lambda row: f"{100 * row[key]:.{digits}f} %"


def scaled(key: str, by: float, digits: int) -> Callable[[Row], str]:
    """Show a multiple of a value."""
    return lambda row: f"{by * row[key]:.{digits}f}"


def short(x: float, digits: int = 2) -> str:
    """Write a number with fixed digits, from 10 000 on with an exponent."""
    return (
        f"{x:.{digits}f}"
        if x < 1e4
        else f"{x:.1e}".replace("e+0", "e").replace("e+", "e")
    )

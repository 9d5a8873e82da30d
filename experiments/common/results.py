"""Rows of results: JSON lines that say what they were measured on."""

import json
import os
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from experiments.common.tables import Row, read_rows
from jaxcompress import reporting
from jaxcompress.storage.checksummed_file import VERSION


def commit() -> str:
    """Return the commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip()


def about() -> Row:
    """Describe what measures: commit, versions, device, load, format of files."""
    return {
        "commit": commit(),
        "jax": metadata.version("jax"),
        "flax": metadata.version("flax"),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # processes that ran, this one too
        "format": VERSION,
    }


def without_folders(value: Any) -> Any:
    """Return plain values with the names of files in place of absolute paths."""
    if isinstance(value, dict):
        return {key: without_folders(x) for key, x in value.items()}
    if isinstance(value, list):
        return [without_folders(x) for x in value]
    absolute = isinstance(value, str) and os.path.isabs(value)
    return os.path.basename(value) if absolute else value


class Results:
    """The rows of a run, each completed, shown and appended as it is measured.

    Rows are committed: of an absolute path they keep the name.

    Args:
        config: of an experiment. Its `results` is the file; a run with `fast` neither
            reads nor writes it, where it is the committed one.
        hide: keys that are not shown.
        constant: what every row says, before what it was measured on.
    """

    def __init__(
        self, config: Any, /, *, hide: tuple[str, ...] = (), **constant: Any
    ) -> None:
        committed = type(config).__dataclass_fields__["results"].default
        kept = bool(config.results) and not (
            config.fast and config.results == committed
        )
        self.path = Path(config.results) if kept else None
        there = self.path is not None and self.path.exists()
        self.held = read_rows(self.path) if there else []
        self.rows: list[Row] = []
        self._constant, self._hide = constant, hide
        self._clock = time.perf_counter()

    def holds(self, **values: Any) -> bool:
        """Say whether the file held a row with these values when the run began."""
        wanted = reporting.plain(values)
        return any(
            all(key in row and row[key] == x for key, x in wanted.items())
            for row in self.held
        )

    def add(self, row: Row) -> Row:
        """Complete a row, show it, append it to the file; returns it as written."""
        seconds = time.perf_counter() - self._clock
        row = {**row, **self._constant, "row_seconds": seconds, **about()}
        row = without_folders(reporting.plain(row))
        self._clock = time.perf_counter()
        self.rows.append(row)
        shown = {key: x for key, x in row.items() if key not in self._hide}
        print(json.dumps(shown), flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            reporting.append_lines(self.path, [row])
        return row

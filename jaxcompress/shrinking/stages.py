"""Stages of a shrink: announced as they start, timed, their memory noted."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxcompress.memory import give_back_memory, peak_memory
from jaxcompress.progress import clock, each_item

SHORT = 1.0  # seconds: the end of a shorter stage is not told


@dataclasses.dataclass
class Stages:
    """Says what is done, and keeps what each stage took.

    Args:
      progress: as for `shrink`.

    `taken` holds, by label, seconds of all stages of this label, wall and processor,
    and the most memory that the process had held when the last of them ended.
    """

    progress: bool | Callable[[Iterable[Any]], Iterable[Any]]
    taken: dict[str, dict[str, float | None]] = dataclasses.field(default_factory=dict)

    def say(self, line: str) -> None:
        """Print a line for the reader who waits, unless nothing is to be shown."""
        if self.progress:
            print(f"shrink: {line}", file=sys.stderr, flush=True)

    def items(self, label: str, unit: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        """Return a wrapper of items that shows how many are done."""
        return lambda items: each_item(items, self.progress, label=label, unit=unit)

    @contextlib.contextmanager
    def stage(self, label: str, amount: str = "") -> Iterator[None]:
        """Announce a stage, and add to `taken` what it takes.

        Args:
          label: what is done; stages of one label are added up.
          amount: of work, for the reader.
        """
        self.say(f"{label}: {amount}" if amount else label)
        start, used = time.perf_counter(), time.process_time()
        yield
        seconds = time.perf_counter() - start
        before, peak = self.taken.get(label, {}), peak_memory()
        used = time.process_time() - used
        give_back_memory(programs=False)
        self.taken[label] = {
            "seconds": (before.get("seconds") or 0.0) + seconds,
            "processor_seconds": (before.get("processor_seconds") or 0.0) + used,
            "peak_memory_bytes": peak,
        }
        if seconds > SHORT:
            held = "" if peak is None else f", {peak / 2**30:.2f} GiB at most so far"
            self.say(f"{label} took {clock(seconds)}{held}")

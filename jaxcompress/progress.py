"""Progress of long work, shown in one way everywhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TextIO

QUIET = 10.0  # seconds between lines of progress where there is no terminal


def each_item(
    items: Iterable[Any],
    progress: bool | Callable[[Any], Iterable[Any]],
    *,
    label: str,
    total: int | None = None,
    unit: str = "leaves",
) -> Iterable[Any]:
    """Iterate over items with the progress that a caller asked for.

    Args:
      items: what to iterate over.
      progress: False for none, True for a bar (`track`), or what wraps the items, such
        as `tqdm.tqdm`.
      label, total, unit: as in `track`.

    Raises:
      TypeError: progress is neither a boolean nor callable.
    """
    if isinstance(progress, bool):
        if not progress:
            return items
        return track(items, label, total=total, unit=unit)
    if not callable(progress):
        raise TypeError(
            f"progress is True, False or a wrapper of an iterable such as tqdm.tqdm, "
            f"not {progress!r}"
        )
    return progress(items)


def track(
    items: Iterable[Any],
    label: str,
    *,
    total: int | None = None,
    unit: str = "batches",
    amount: Callable[[Any], int] = lambda item: 1,
    stream: TextIO | None = None,
) -> Iterator[Any]:
    """Pass items on and show position, rate and the time left.

    The first item, whose use usually compiles, is shown as compiling and is no part
    of the rate. On a terminal it is a bar; elsewhere a line every 10 seconds.

    Args:
      items: what to iterate over, usually batches.
      label: what is being done.
      total: how many items; by default their length, unknown without one.
      unit: what the rate counts, `amount(item)` of it for each item.
      stream: where to write, by default the standard error.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=stream or sys.stderr)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[state]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    start = said = time.monotonic()
    first, counted, done = start, 0, 0
    with progress:
        task = progress.add_task(label, total=total, state="compiling")
        for item in items:
            yield item
            done, now = done + 1, time.monotonic()
            if done == 1:
                first = now
            else:
                counted += amount(item)
            state = _state(done, total, counted / max(now - first, 1e-9), unit)
            if total is not None and done > 1:
                left = (now - first) / (done - 1) * (total - done)
                state += f", {clock(left)} left"
            state += f", {clock(now - start)} so far"
            progress.update(task, completed=done, state=state)
            if not console.is_terminal and now - said >= QUIET:
                said = now
                print(f"{label}: {state}", file=stream or sys.stderr, flush=True)


def _state(done: int, total: int | None, rate: float, unit: str) -> str:
    state = f"{done}/{'?' if total is None else total}"
    return state if done < 2 else f"{state}, {rate:.4g} {unit}/s"


def clock(seconds: float) -> str:
    """Return seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

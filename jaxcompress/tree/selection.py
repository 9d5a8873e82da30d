"""Which entries of a tree a pattern, or a method, takes."""

from typing import Any

from jaxcompress.tree.compress import choose
from jaxcompress.tree.paths import Entry, entries
from jaxcompress.types import Params


def _weight(x: Any, moments: Any = None) -> Any:
    """A method that changes nothing; what it takes by default is what is planned."""
    del moments
    return x


def planned_entries(params: Params, moments: Any, where: str | None) -> list[Entry]:
    """The leaves whose names the pattern matches, or that a method takes by default."""
    chosen, _ = choose(params, _weight if where is None else [(where, _weight)])
    return [entry for entry in entries(params, moments) if entry.name in chosen]

"""Patterns on names of leaves, and the nearest names where one is not there."""

import difflib
import re
from collections.abc import Collection, Iterable


def nearest(name: str, candidates: Iterable[str]) -> str:
    """List the three candidates that are most like an unknown name."""
    return ", ".join(difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.0))


def match(
    pattern: str | re.Pattern[str], names: Collection[str], what: str = "leaf"
) -> list[str]:
    """List the names that a pattern fully matches.

    Args:
      pattern: a regular expression.
      names: to choose from.
      what: a name means, for the error.

    Raises:
      ValueError: there are none; tells the nearest.
    """
    compiled = re.compile(pattern)
    matches = [name for name in names if compiled.fullmatch(name)]
    if not matches:
        raise ValueError(
            f"the pattern {compiled.pattern!r} matches no {what}; the nearest names "
            f"are {nearest(compiled.pattern, names)} (of {len(names)})"
        )
    return matches

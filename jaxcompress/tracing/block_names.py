"""Find the submodules of a model that are its blocks, by names and by loops."""

import os
import re
from collections.abc import Mapping, Sequence

NAMED = re.compile(r"(\w*(layer|block)s?|h)([._-]?\d+)?", re.IGNORECASE)
NUMBERED = re.compile(r"(.*?)[._-]?\d+")


def find_blocks(names: Sequence[str], pattern: str) -> dict[str, list[str]]:
    """Group weights by submodule whose path the pattern matches: short names by path.

    The longest path of a weight that fully matches decides. Raises ValueError where
    none does.
    """
    compiled = re.compile(pattern)
    names_of: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")
        for depth in range(len(parts) - 1, 0, -1):
            path = "/".join(parts[:depth])
            if compiled.fullmatch(path):
                names_of.setdefault(path, []).append("/".join(parts[depth:]))
                break
    if not names_of:
        paths = dict.fromkeys(name.rsplit("/", 1)[0] for name in names)
        tops = dict.fromkeys(name.split("/")[0] for name in names)
        raise ValueError(
            f"no submodule is called {pattern!r}, so that there are no blocks; the "
            f"model has {', '.join(list(tops)[:8])} (as {', '.join(list(paths)[:4])}). "
            "Pass blocks= a pattern that fully matches the path of each block, or "
            "compress the model whole with collect_moments"
        )
    return names_of


def parameters(names: Sequence[str]) -> list[str]:
    """Select the names of parameters, where the tree holds other collections too."""
    if not any(name.startswith("params/") for name in names):
        return list(names)
    return [name for name in names if name.startswith("params/")]


def guess_blocks(
    names: Sequence[str], loops: Mapping[str, int] | None = None
) -> dict[str, list[str]]:
    """Group weights by block, where the caller names no pattern: short names by path.

    A block is what a loop takes slices of; or one of several modules whose names differ
    in a number and that hold modules of their own, the outermost of these (`h_7`,
    `TransformerBlock_0`, `encoder/layers/3`); or a module called layer, block or h.
    Where there are none, each module that holds a matrix is a block.

    Args:
      names: of all matrices and vectors of the model.
      loops: the loop that slices each weight, by name.
    """
    loops = loops or {}
    names_of: dict[str, list[str]] = {}
    for loop in dict.fromkeys(loops.values()):
        inside = [name for name in names if loops.get(name) == loop]
        path = os.path.commonpath([os.path.dirname(name) for name in inside])
        if path and not any(nests(path, other) for other in names_of):
            names_of[path] = [name.removeprefix(f"{path}/") for name in inside]
    left = [
        name
        for name in parameters(names)
        if name not in loops and not any(nests(name, path) for path in names_of)
    ]
    families = _families(left)
    for name in left:
        if path := _path(name, families):
            names_of.setdefault(path, []).append(name.removeprefix(f"{path}/"))
    if not names_of:
        for name in left:
            path, _, short = name.rpartition("/")
            if path:
                names_of.setdefault(path, []).append(short)
    return names_of


def nests(a: str, b: str) -> bool:
    """Tell whether one of two paths is the other, or is below it."""
    return a == b or a.startswith(f"{b}/") or b.startswith(f"{a}/")


def _prefixes(name: str) -> list[str]:
    """List the paths of the modules around a weight, outermost first."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _families(names: Sequence[str]) -> dict[str, int]:
    """Count the modules that have each path, but for the number at its end.

    Those count that hold modules, or are called layer, block or h.
    """
    members: dict[str, set[str]] = {}
    for name in names:
        for path in _prefixes(name):
            holds = name.count("/") > path.count("/") + 1
            if (holds or _is_named(path)) and (match := NUMBERED.fullmatch(path)):
                members.setdefault(match[1], set()).add(path)
    return {stem: len(paths) for stem, paths in members.items()}


def _path(name: str, families: Mapping[str, int]) -> str | None:
    """Return the path of the block that holds a weight, if one does."""
    alone = None
    for path in _prefixes(name):
        match = NUMBERED.fullmatch(path)
        if match and families.get(match[1], 0) > 1:
            return path
        if alone is None and _is_named(path):
            alone = path
    return alone


def _is_named(path: str) -> bool:
    *above, last = path.split("/")
    if last.isdigit() and above:
        last = f"{above[-1]}_{last}"
    return NAMED.fullmatch(last) is not None

"""Recipes on the command line: `--recipe` options, and files of JSON."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcompress.tree.methods import parse

RULE = re.compile(r"(?P<pattern>.+?)=(?P<method>None|[A-Za-z_]\w*(\(.*\))?)")
DEFAULT = "symmetric(bits=8)"


def stages_of(texts: Sequence[str]) -> list[Any]:
    """Return the stages of a chain that `--recipe` options say; see its help."""
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


def names_stacks(stages: Sequence[Any]) -> bool:
    """Return whether rules name leaves of a model whose layers are stacked, as plans
    and files of `compress --size` do.
    """
    rules = [rule for stage in stages if isinstance(stage, list) for rule in stage]
    return any(pattern.startswith("layers/") for pattern, _ in rules)


def read_recipe(path: str | Path) -> tuple[list[Any], list[Any]]:
    """Read what `plan` prints, or a list as `--recipe` takes it.

    Returns:
      The stages, and the recipe as JSON values.

    Raises:
      ValueError: not JSON, or not a recipe; names the file.
    """
    wanted = (
        '{"recipe": [...]} or a list, of [pattern, method] pairs or of strings as '
        "--recipe takes them"
    )
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); write {wanted}") from error
    rows = stored.get("recipe") if isinstance(stored, dict) else stored
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no recipe; write {wanted}")
    if all(isinstance(row, str) for row in rows):
        return stages_of(rows), rows
    rules = []
    for row in rows:
        pair = isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)
        if not pair or not isinstance(row[1], str | None):
            raise ValueError(f"{path}: {row!r} is not a rule; write {wanted}")
        rules.append((row[0], None if row[1] is None else parse(row[1])))
    return [rules], rows

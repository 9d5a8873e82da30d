"""What experiments share: a command line made of a `Config`, and what ran where."""

import argparse
import dataclasses
import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

POSITIONAL = ("model", "text")


def parse(
    config: type, description: str | None, *, leave_out: tuple[str, ...] = ()
) -> Any:
    """The configuration that the command line asks for.

    A field is an option of its name, a boolean one a flag, one of several numbers takes
    them one after the other; `model` and `text` are positional, where the class has
    them and they are not left out. With `--fast` results go to a file of their own,
    unless one is named.
    """
    parser = argparse.ArgumentParser(description=description)
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        if field.name in POSITIONAL:
            parser.add_argument(field.name, nargs="?", default=field.default)
        elif isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        elif isinstance(field.default, tuple):
            options = {"type": type(field.default[0]), "default": field.default}
            parser.add_argument(f"--{field.name}", nargs="+", **options)
        else:
            kind = type(field.default)
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    given = vars(parser.parse_args())
    found = config(
        **{k: tuple(x) if isinstance(x, list) else x for k, x in given.items()}
    )
    if found.fast and found.results == config.results:
        aside = f"{Path(config.results).stem}_fast.jsonl"
        found = dataclasses.replace(found, results=aside)
    return found


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    """The rows that a file of results holds; makes room for more."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def commit() -> str:
    """The commit that is checked out here."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def about() -> dict[str, Any]:
    """Commit, versions, device; the machine is shared unless a table says otherwise."""
    return {
        "commit": commit(),
        "jax": metadata.version("jax"),
        "flax": metadata.version("flax"),
        "device": jax.devices()[0].device_kind,
        "machine": "shared with other work",
    }

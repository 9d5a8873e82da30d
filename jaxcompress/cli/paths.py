"""Paths on the command line, checked before any work begins."""

import argparse
import os
from pathlib import Path

from jaxcompress.tokenization import read_text


def check_out(path: str, *, clobber: bool = True, source: str | None = None) -> bool:
    """Check that a file can be written; return whether one exists already.

    Raises:
      FileNotFoundError: no such directory.
      ValueError: a directory, a file that must stay, or the model itself.
      PermissionError: a directory or file that is not writable.
    """
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no directory {target.parent} to write to; make it")
    if target.is_dir():
        raise ValueError(f"{path} is a directory; give the name of a file to write")
    exists = target.exists()
    if exists and not clobber:
        raise ValueError(f"{path} exists, and --no-clobber was given")
    itself = exists and source is not None and Path(source).exists()
    if itself and os.path.samefile(source, target):
        raise ValueError(f"{path} is the model itself; write to another file")
    if not os.access(target if exists else target.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission")
    return exists


def check_file(path: str, what: str) -> None:
    """Check that a file is there to read.

    Raises:
      FileNotFoundError: nothing at the path.
      ValueError: a directory.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a directory; {what} is a file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {path} ({what})")


def check_text(path: str, what: str) -> str:
    """Return the text of a file, once it is known to be one.

    Raises:
      ValueError: not UTF-8, or empty; names the file.
    """
    check_file(path, what)
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; {what} has words")
    return text


def check_model(name: str) -> None:
    """Check what a path says without reading weights.

    Raises:
      ValueError: a directory that holds no model.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(
            f"{name} holds no config.json: it is no Hugging Face model directory"
        )


def check_all(options: argparse.Namespace) -> None:
    """Check every path that the options of a command have."""
    for name in ("model", "against"):
        if getattr(options, name, None):
            check_model(getattr(options, name))
    out = getattr(options, "out", None)
    if out is not None and getattr(options, "writes_file", False):
        clobber = not getattr(options, "no_clobber", False)
        source = getattr(options, "model", None)
        options.replaced = check_out(out, clobber=clobber, source=source)
    for name, what in (("text", "a text"), ("calibrate", "a text to calibrate on")):
        if getattr(options, name, None):
            check_text(getattr(options, name), what)
    if getattr(options, "recipe_file", None):
        check_file(options.recipe_file, "a recipe in JSON")
    if getattr(options, "json", None):
        check_out(options.json)
    if getattr(options, "store", None) and Path(options.store).is_file():
        raise ValueError(f"{options.store} is a file; --store takes a directory")

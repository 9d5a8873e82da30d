"""The command line: `python -m jaxcompress`."""

from jaxcompress.cli.parser import main

__all__ = ["main"]

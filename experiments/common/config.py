"""The command line of an experiment, made of its frozen `Config`."""

import argparse
import dataclasses
from typing import Any

POSITIONAL = ("model", "text")


def parse(
    config: type, description: str | None, *, leave_out: tuple[str, ...] = ()
) -> Any:
    """Read the configuration that the command line asks for.

    A field is an option of its name, a boolean one a flag, one of several numbers takes
    them one after the other. `model` and `text` are positional, where the class has
    them.

    Args:
        config: a frozen dataclass whose fields all have defaults.
        description: the module's docstring.
        leave_out: fields that are no options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(config):
        default = field.default
        if field.name in leave_out:
            continue
        if field.name in POSITIONAL:
            parser.add_argument(field.name, nargs="?", default=default)
        elif isinstance(default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        elif isinstance(default, tuple):
            options = {"type": type(default[0]), "default": default, "nargs": "+"}
            parser.add_argument(f"--{field.name}", **options)
        else:
            parser.add_argument(f"--{field.name}", type=type(default), default=default)
    options = vars(parser.parse_args())
    return config(
        **{k: tuple(x) if isinstance(x, list) else x for k, x in options.items()}
    )

"""The command line of an experiment, made of its frozen `Config`."""

import argparse
import dataclasses
from typing import Any

POSITIONAL = ("model", "text")


@dataclasses.dataclass(frozen=True)
class OnText:
    """What experiments on a model and a text have in common."""

    model: str = "reference"
    text: str = ""  # the packaged held-out text, for the reference model
    fraction: float = 0.2  # of the text, from its end, to measure on; else calibration
    calibration: int = 64  # windows
    windows: int = 32  # to measure on
    tokens: int = 256  # in a window
    only: str = ""  # rows whose name or recipe holds this
    fast: bool = False  # the reference model and little text


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

"""`python -m jaxcompress`: the parser of all commands."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jaxcompress import __version__
from jaxcompress.cli import commands
from jaxcompress.cli.export_command import add_export
from jaxcompress.cli.text import add_text

MODEL = (
    '"reference", a file written by compress, a .gguf file, a Hugging Face directory '
    "or a name on its hub"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0, or 2 and one line on the standard error."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, KeyError, TypeError, OSError, ModuleNotFoundError) as error:
        if options.debug:
            raise
        text = error.args[0] if isinstance(error, KeyError) else error
        print(f"jaxcompress: {' '.join(str(text).split())}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each has an example in its help."""
    top = argparse.ArgumentParser(prog="python -m jaxcompress", description=__doc__)
    top.add_argument(
        "--version", action="version", version=f"jaxcompress {__version__}"
    )
    choices = top.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Any, about: str, example: str) -> argparse.ArgumentParser:
        made = choices.add_parser(
            run.__name__.removesuffix("_"),
            help=about,
            description=about,
            epilog=f"example:\n  python -m jaxcompress {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument(
            "--debug", action="store_true", help="show where an error comes from"
        )
        made.set_defaults(run=run)
        return made

    add = command(
        commands.compress_,
        "compress a model into one file, and say what it cost",
        'compress reference small.safetensors --recipe "symmetric(bits=4, block=64)"',
    ).add_argument
    add("model", help=MODEL)
    add("out", help="the file to write")
    add(
        "--recipe",
        action="append",
        metavar="METHOD or PATTERN=METHOD",
        help="a method for all large kernels and embeddings, or a rule for the leaves "
        "whose whole names match a pattern (PATTERN=None keeps them). Given again: "
        "rules that follow each other make one list, of which the first that matches "
        "decides; anything else is a stage of its own, working on what the one before "
        'left. Default: "symmetric(bits=8)"',
    )
    add(
        "--no-coding",
        action="store_true",
        help="leave out the lossless coding of codes and floats, which makes files "
        "smaller and takes a moment when they are loaded, not when they run",
    )
    add("--dry-run", action="store_true", help="only sizes, from shapes alone")
    add("--leaves", type=int, default=12, help="leaves to list one by one (12)")
    add("--json", metavar="FILE", help="append the result to a file of JSON lines")
    _text_options(add, required=False)

    add = command(
        commands.evaluate,
        "how well a model predicts a text, alone or beside another",
        "evaluate small.safetensors --text notes.txt --against reference",
    ).add_argument
    add("model", help=MODEL)
    add("--against", metavar="MODEL", help="compare with this model, same tokenizer")
    add("--json", metavar="FILE", help="append the result to a file of JSON lines")
    _text_options(add, required=True)

    add = command(
        commands.generate,
        "let a model go on with a prompt",
        'generate small.safetensors --prompt "def main():" --temperature 0.8',
    ).add_argument
    add("model", help=MODEL)
    add("--prompt", required=True, help="text to go on with")
    add("--tokens", type=int, default=100, help="at most this many tokens (100)")
    add("--temperature", type=float, default=0.0, help="0 (default): the likeliest")
    add("--top-k", type=int, help="draw among this many")
    add("--top-p", type=float, help="draw among the likeliest of this probability")
    add("--seed", type=int, default=0, help="of the draws (0)")

    add = command(
        commands.inspect,
        "what is in a file, without reading its weights",
        "inspect small.safetensors",
    ).add_argument
    add("file", help="a file written by compress")

    add = command(
        commands.verify,
        "check every byte of a file against its checksums",
        "verify small.safetensors",
    ).add_argument
    add("file", help="a file written by compress")

    add = command(
        commands.pack,
        "pack a directory with a checkpoint into one file, without loss",
        "pack SmolLM2-135M smollm2.packed",
    ).add_argument
    add("folder", help="a directory of Hugging Face, of Orbax, or any other")
    add("out", help="the file to write")
    add(
        "--base",
        metavar="DIR",
        help="keep tensors as differences from those of the same name in this "
        "directory, such as the model that was fine-tuned; unpack needs it again",
    )
    add(
        "--fast",
        action="store_true",
        help="a coding that is unpacked sooner, for some hundredths of a bit a weight",
    )

    add = command(
        commands.unpack,
        "write the files of a packed directory, byte for byte",
        "unpack smollm2.packed SmolLM2-135M",
    ).add_argument
    add("file", help="a file written by pack")
    add("out", help="the directory to make")
    add("--base", metavar="DIR", help="the directory that pack was given as --base")

    add_text(choices)
    add_export(command, MODEL)

    add = command(
        commands.demo_,
        "compress the reference model at 8, 4, 3 and 2 bits; two minutes",
        "demo",
    ).add_argument
    add("--out", metavar="DIR", help="keep the files in this directory")
    add("--windows", type=int, default=32, help="windows of held-out text (32)")
    return top


def _text_options(add: Any, *, required: bool) -> None:
    add("--text", metavar="FILE", required=required, help="UTF-8 text to predict")
    add("--windows", type=int, help="only the first windows of the text (all)")
    add("--length", type=int, default=512, help="tokens in a window (512)")
    add("--batch", type=int, default=1, help="windows at a time (1)")

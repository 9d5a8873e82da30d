"""`python -m jaxcompress`: the parser of all commands, and what errors become."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jaxcompress import __version__
from jaxcompress.cli import commands, compressing, paths
from jaxcompress.cli.export_command import add_export
from jaxcompress.cli.report import report_
from jaxcompress.cli.text import add_text

MODEL = (
    '"reference", a file written by compress, a .gguf file, a Hugging Face directory '
    "or a name on its hub"
)


ABOUT = "Make a language model small, run it, and look into its file."
EXAMPLES = """examples:
  python -m jaxcompress compress model.gguf small.safetensors --size 60MB
  python -m jaxcompress generate small.safetensors --prompt "def main():"
  python -m jaxcompress COMMAND --help
environment:
  JAX_COMPILATION_CACHE_DIR  a folder where compiled programs are kept, so that the same
                             command starts sooner the next time"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      0; 2 and one line on the standard error where something is wrong; 130 where it
      was interrupted.
    """
    top = parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        top.print_help()
        return 0
    options = top.parse_args(arguments)
    try:
        paths.check_all(options)
        keep_compiled()
        options.run(options)
    except KeyboardInterrupt:
        print(f"jaxcompress: {_interrupted(options)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, KeyError, TypeError, OSError, ModuleNotFoundError) as error:
        if options.debug:
            raise
        print(f"jaxcompress: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def keep_compiled() -> None:
    """Let JAX keep small programs too, where $JAX_COMPILATION_CACHE_DIR is set.

    JAX keeps what took a second to compile; a command compiles many smaller ones.
    """
    least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") and least not in os.environ:
        jax.config.update(least.lower(), 0.05)


def _interrupted(options: argparse.Namespace) -> str:
    written = getattr(options, "written", None)
    if written is not None:
        return f"interrupted; {written} was written before"
    if getattr(options, "writes_file", False):
        return "interrupted, nothing was written"
    return "interrupted"


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no file at {error.filename}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    text = error.args[0] if isinstance(error, KeyError) else error
    return " ".join(str(text).split())


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each has an example in its help."""
    top = argparse.ArgumentParser(
        prog="python -m jaxcompress",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--version", action="version", version=f"jaxcompress {__version__}"
    )
    choices = top.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Any, about: str, example: str) -> argparse.ArgumentParser:
        subparser = choices.add_parser(
            run.__name__.removesuffix("_"),
            help=about,
            description=about,
            epilog=f"example:\n  python -m jaxcompress {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.add_argument(
            "--debug", action="store_true", help="show where an error comes from"
        )
        subparser.set_defaults(run=run)
        return subparser

    subparser = command(
        compressing.compress_,
        "compress a model into one file, by size or by recipe, and say what it cost",
        "compress model.gguf small.safetensors --size 60MB --calibrate text.txt",
    )
    subparser.set_defaults(writes_file=True)
    add = subparser.add_argument
    add("model", help=MODEL)
    add("out", help="the file to write; one that is there is replaced")
    _goal_options(add, kl=True)
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
    add("--recipe-file", metavar="FILE", help="a recipe in JSON, as plan prints it")
    add(
        "--blockwise",
        action="store_true",
        help="with a recipe: block by block, on the inputs that the compressed blocks "
        "before make; needs --calibrate, resumes with --store",
    )
    add(
        "--coded-in-memory",
        action="store_true",
        help="keep codes and floats losslessly coded in memory too; the file is coded "
        "in any case",
    )
    add(
        "--no-coding",
        action="store_true",
        help="no lossless coding at all, of the file neither: any reader of "
        ".safetensors sees its numbers",
    )
    add("--no-clobber", action="store_true", help="never replace a file")
    add("--dry-run", action="store_true", help="only sizes, from shapes alone")
    add("--leaves", type=int, default=12, help="leaves to list one by one (12)")
    add("--json", metavar="FILE", help="append the result to a file of JSON lines")
    _text_options(add, required=False)

    subparser = command(
        compressing.plan,
        "print the recipe that compress --size would try first, as JSON",
        "plan model.gguf --size 60MB --out recipe.json",
    )
    subparser.set_defaults(writes_file=True)
    add = subparser.add_argument
    add("model", help=MODEL)
    add("--out", metavar="FILE", help="write the recipe there instead")
    _goal_options(add, kl=False)

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
        report_,
        "write a folder with the table and the pictures of a small model",
        "report small.safetensors --against model.gguf -o folder",
    ).add_argument
    add("model", help="the small model: a file written by compress")
    add("--against", metavar="MODEL", required=True, help="the model it was made from")
    add("-o", "--out", metavar="DIR", required=True, help="the folder to write")
    _text_options(add, required=False)

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
    add("--stop", action="append", default=[], help="end before this text; repeatable")
    add("--top-p", type=float, help="draw among the likeliest of this probability")
    add("--seed", type=int, default=0, help="of the draws (0)")

    add = command(
        commands.inspect,
        "what is in a file, without reading its weights",
        "inspect small.safetensors",
    ).add_argument
    add("file", help="a file written by compress")
    add("--parts", action="store_true", help="each array, its coding, and other bytes")

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


def _goal_options(add: Any, *, kl: bool) -> None:
    add(
        "--size",
        metavar="BYTES",
        help="of the finished file, as 60MB or 57MiB: never above, nearly reached",
    )
    add("--bits-per-weight", type=float, help="the same, over all weights")
    if kl:
        add("--kl", type=float, help="at most so many nats from the model, per token")
    add(
        "--calibrate",
        metavar="FILE",
        help="a UTF-8 text of the kind the model is to read; without one the model "
        "writes its own (with --size), or nothing is measured (with --recipe)",
    )
    add(
        "--effort",
        choices=("quick", "good", "best"),
        default="good",
        help="quick: no data; good (default); best: trains steps and norms too",
    )
    add("--store", metavar="DIR", help="keep finished steps there, and resume")
    add("--seed", type=int, default=0, help="of what is drawn (0)")
    add("--quiet", action="store_true", help="no progress")


def _text_options(add: Any, *, required: bool) -> None:
    add("--text", metavar="FILE", required=required, help="UTF-8 text to predict")
    add("--windows", type=int, help="only the first windows of the text (all)")
    add("--length", type=int, default=512, help="tokens in a window (512)")
    add("--batch", type=int, default=1, help="windows at a time (1)")

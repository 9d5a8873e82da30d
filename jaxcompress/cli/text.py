"""`python -m jaxcompress text encode|decode|verify`: text compressed by a model."""

import argparse
import contextlib
import functools
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from jaxcompress import textcoding
from jaxcompress.models.loading import load


def add_text(choices: Any) -> None:
    """Add the command `text`, with its own commands, to the parser's choices."""
    about = "compress text losslessly with a language model, and decompress it"
    text = choices.add_parser("text", help=about, description=about)
    inner = text.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Any, about: str, example: str) -> Any:
        parser = inner.add_parser(
            run.__name__.removesuffix("_"),
            help=about,
            description=about,
            epilog=f"example:\n  python -m jaxcompress text {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--debug", action="store_true", help="show a traceback")
        parser.add_argument(
            "--model",
            default="reference",
            help='"reference", a file of compress, a .gguf file, a Hugging Face '
            "directory or a name on its hub; decoding needs the same one",
        )
        parser.add_argument(
            "--primer",
            help="a file of text that the model reads first; decoding needs it",
        )
        parser.set_defaults(run=functools.partial(_run, run))
        return parser.add_argument

    add = command(encode_, "compress a file", "encode notes.txt notes.jxtc")
    add("file", help="the file to compress, best text in UTF-8")
    add("out", help="the file to write")
    add("--window", type=int, default=512, help="tokens the model sees (512)")
    add("--overlap", type=int, help="tokens of a window coded before (half of it)")
    add("--lanes", type=int, help="parts decoded together (one for 16384 tokens)")
    add("--no-mix", action="store_true", help="do not learn from the text as it goes")
    add("--no-verify", action="store_true", help="do not decode the result again")
    add = command(decode_, "decompress a file", "decode notes.jxtc notes.txt")
    add("file", help="a file written by text encode")
    add("out", help="the file to write")
    add = command(verify_, "decode a file and check it", "verify notes.jxtc")
    add("file", help="a file written by text encode")


def _run(command: Any, options: argparse.Namespace) -> None:
    """Run a command; what a device can't do is an error of one line, too."""
    try:
        command(options)
    except RuntimeError as error:
        if options.debug:
            raise
        raise ValueError(str(error)) from error


def encode_(options: argparse.Namespace) -> None:
    data = Path(options.file).read_bytes()
    start = time.perf_counter()
    coded = textcoding.encode(
        data,
        *_model(options.model),
        window=options.window,
        overlap=options.overlap,
        lanes=options.lanes,
        mix=not options.no_mix,
        primer=_primer(options),
        verify=not options.no_verify,
    )
    write_whole(Path(options.out), coded)
    bits = f", {8 * len(coded) / len(data):.3f} bits per byte" if data else ""
    _say(f"{options.out}: {len(data)} bytes in {len(coded)}{bits}", start)


def decode_(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    data = textcoding.decode(
        Path(options.file).read_bytes(),
        *_model(options.model),
        primer=_primer(options),
    )
    write_whole(Path(options.out), data)
    _say(f"{options.out}: {len(data)} bytes", start)


def verify_(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    size = textcoding.verify(
        Path(options.file).read_bytes(),
        *_model(options.model),
        primer=_primer(options),
    )
    _say(f"{options.file}: {size} bytes of text, every checksum fits", start)


def _primer(options: argparse.Namespace) -> bytes:
    return Path(options.primer).read_bytes() if options.primer else b""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: under another name first, then renamed."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _model(name: str) -> tuple[Any, ...]:
    """Return what `encode` takes: nothing for the reference model, which it loads
    itself.
    """
    if name == "reference":
        return ()
    model, params, tokenizer = load(name, scan=False)
    if tokenizer is None:
        raise ValueError(f"{name} holds no tokenizer; text coding needs one")
    return model, params, tokenizer


def _say(text: str, start: float) -> None:
    print(f"{text}; {time.perf_counter() - start:.1f} s", file=sys.stdout, flush=True)

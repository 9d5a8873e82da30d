"""`export`: a compressed model in the format of another ecosystem."""

import argparse
import contextlib
import time
from collections.abc import Sequence
from typing import Any

from jaxcompress import reporting
from jaxcompress.export import ExportedLeaf, compressed_tensors, gguf, huggingface
from jaxcompress.models.loading import REFERENCE, load, open_weights
from jaxcompress.types import Params

FORMATS = ("compressed-tensors", "gguf", "huggingface")


def add_export(command: Any, model_help: str) -> None:
    """Register the command with the parser of all commands."""
    add = command(
        export,
        "write a model in a format that other programs run",
        "export small.safetensors out --format compressed-tensors --dtype bfloat16",
    ).add_argument
    add("model", help=model_help)
    add("out", help="the directory (gguf: file) to write; it must not exist")
    add(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="compressed-tensors: codes and scales unchanged, for vLLM, transformers "
        "and tpu-inference; gguf: the same in one file, for llama.cpp; huggingface: a "
        "dense directory",
    )
    add("--dtype", help="of what is written dense (that of each weight)")
    add("--context", type=int, default=8192, help="tokens at most (8192)")
    add(
        "--dense",
        metavar="PATTERN",
        help="compressed leaves to write dense, such as '(embed|head)/.*'",
    )
    add(
        "--requantize",
        action="append",
        metavar="PATTERN=METHOD",
        help="a method for compressed leaves without a counterpart",
    )
    add(
        "--activations",
        choices=("dynamic",),
        help="compressed-tensors: activations rounded to 8 bits when it runs",
    )
    add("--group", type=int, help="compressed-tensors: inputs per scale (32, 64, 128)")
    add("--leaves", type=int, default=12, help="leaves to list one by one (12)")


def export(options: argparse.Namespace) -> None:
    if options.model == REFERENCE:
        model, params, tokenizer = load(REFERENCE)
    else:
        model, params, tokenizer = open_weights(options.model)
    clock = time.perf_counter()
    with params if hasattr(params, "close") else contextlib.nullcontext():
        written = _write(options, model, params, tokenizer)
    seconds = time.perf_counter() - clock
    written.sort(key=lambda leaf: -leaf.nbytes)
    total = sum(leaf.nbytes for leaf in written)
    print(
        reporting.render(
            reporting.table(list(map(_row, written[: options.leaves]))),
            f"{max(0, len(written) - options.leaves)} more leaves",
            "",
            f"{options.out}: {reporting.grouped(total)} bytes of tensors, "
            f"{seconds:.1f} s",
        ),
        flush=True,
    )


def _write(
    options: argparse.Namespace, model: Any, params: Params, tokenizer: Any
) -> list[ExportedLeaf]:
    shared: dict[str, Any] = {"dtype": options.dtype, "context": options.context}
    if options.format == "huggingface":
        return huggingface(options.out, model, params, tokenizer, **shared)
    shared |= {"dense": options.dense, "requantize": _rules(options.requantize or ())}
    if options.format == "gguf":
        return gguf(options.out, model, params, tokenizer, **shared)
    return compressed_tensors(
        options.out,
        model,
        params,
        tokenizer,
        activations=options.activations,
        group=options.group,
        **shared,
    )


def _rules(texts: Sequence[str]) -> list[tuple[str, str]]:
    rules = []
    for text in texts:
        pattern, separator, method = text.partition("=")
        if not separator:
            raise ValueError(f"--requantize takes PATTERN=METHOD, not {text!r}")
        rules.append((pattern, method))
    return rules


def _row(leaf: ExportedLeaf) -> dict[str, Any]:
    return {
        "leaf": leaf.name,
        "tensor": leaf.tensor,
        "stored": leaf.stored,
        "bytes": leaf.nbytes,
        "relative error added": leaf.error,
    }

"""Models on the command line: loaded to run, compared on a text, shown."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxcompress import evaluation, reporting
from jaxcompress.evaluation import Apply, Report, windows
from jaxcompress.models.loading import load
from jaxcompress.models.stacking import stack_layers
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tokenization import read_text
from jaxcompress.types import Params

PER_LAYER = ("heads", "kv_heads", "mlp_width", "sliding_window")


def progress(options: argparse.Namespace) -> Callable[..., Any]:
    """Make wrappers of iterables by label; quiet ones with `--quiet`."""

    def wrap(label: str, unit: str = "leaves") -> Any:
        if getattr(options, "quiet", False):
            return lambda items: items
        return functools.partial(reporting.track, label=label, unit=unit)

    return wrap


def show(*items: Any) -> None:
    """Print tables and lines on the standard output."""
    print(reporting.render(*items), flush=True)


def load_to_run(name: str) -> tuple[Any, Any, Any]:
    """Return loaded model with its layers stacked where they are alike: compiled once.

    Losslessly coded arrays are decoded, so that running does not decode them again.
    """
    model, params, tokenizer = load(name)
    return *to_run(model, params), tokenizer


def to_run(model: Any, params: Params) -> tuple[Any, Any]:
    """Return a model with its layers stacked where they are alike, lossless arrays
    decoded.
    """
    params = decode_once(params)
    layers = [getattr(model, field) for field in PER_LAYER]
    alike = not any(isinstance(x, tuple) and len(set(x)) > 1 for x in layers)
    if alike and not model.scan:
        try:
            return model.clone(scan=True), stack_layers(params)
        except ValueError:  # layers compressed differently run one by one
            pass
    return model, params


def compare_on_text(
    options: argparse.Namespace,
    model: Any,
    params: Params,
    small_model: Any,
    small: Params,
    tokenizer: Any,
) -> Report:
    batches = text_batches(options, tokenizer)
    report = evaluation.compare(
        Apply(model),
        params,
        small,
        track(batches),
        small_apply_fn=Apply(small_model),
    )
    show(*reporting.comparison_lines(report))
    return report


def track(batches: list[Any]) -> Any:
    return reporting.track(
        batches,
        "evaluating",
        unit="tokens",
        amount=lambda batch: int(np.sum(batch["mask"])),
    )


def text_batches(options: argparse.Namespace, tokenizer: Any) -> list[Any]:
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; a text needs one")
    ids = tokenizer.encode(read_text(options.text))
    return windows(
        ids,
        options.length,
        options.batch,
        token_bytes=tokenizer.token_bytes(ids),
        limit=options.windows,
    )

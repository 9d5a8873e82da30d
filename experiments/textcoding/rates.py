"""How fast is text coded, and how small does it become, by models of several sizes?

Encodes and decodes a text in many lanes, with the mixer and without; every token is
compared. Compilation is not counted: each direction runs twice, and the second is
timed, in seconds that passed and in seconds of all processors.

    python -m experiments.textcoding.rates reference --lanes 32
    python -m experiments.textcoding.rates student.safetensors --lanes 32
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import timed
from experiments.textcoding.ratio import other_compressors
from jaxcompress import textcoding
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.models.loading import load
from jaxcompress.textcoding import codec, pieces, windows


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    bytes: int = 61440
    lanes: int = 32
    window: int = 256
    overlap: int = 0
    peers: bool = False  # other compressors on the same bytes too; encoding alone
    fast: bool = False  # two hundred bytes
    results: str = "experiments/textcoding/results/rates.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Time both directions with the mixer and without; a row for each."""
    if config.fast:
        config = dataclasses.replace(config, bytes=200, lanes=2, window=32)
    model, params, tokenizer = load(config.model, scan=False)
    data = heldout_text().encode()[: config.bytes]
    exact = textcoding.exact(model, params).widen()
    if not config.fast:
        exact = exact.unstack()
    ids = pieces.to_pieces(tokenizer, data).ids
    lanes = [x.tolist() for x in np.array_split(np.array(ids), config.lanes)]
    first = codec._first_token(tokenizer)
    weights = sum(x.size for x in jax.tree.leaves(params))
    results = Results(
        config,
        experiment="rates",
        model=Path(config.model).name,
        weights=weights,
        bytes=len(data),
        lanes=config.lanes,
        window=config.window,
        overlap=config.overlap,
    )
    for mix in (False, True):
        options = (first, config.window, config.overlap, (), mix)
        seconds: dict[str, Any] = {}
        for _ in range(2):
            payloads, *seconds["encode"] = timed(
                functools.partial(windows.encode_windows, exact, lanes, *options)
            )
        arguments = (exact, payloads, [len(lane) for lane in lanes], *options)
        for _ in range(2):
            decoded, *seconds["decode"] = timed(
                functools.partial(windows.decode_windows, *arguments)
            )
        if decoded != lanes:
            raise ValueError("the text did not come back")
        row: dict[str, Any] = {"mix": mix}
        row["bits_per_byte"] = 8 * sum(map(len, payloads)) / len(data)
        for name, (passed, processor) in seconds.items():
            row[f"{name}_seconds"] = passed
            row[f"{name}_processor_seconds"] = processor
        results.add(row)
    if config.peers:
        for row in other_compressors(data):
            results.add(row)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

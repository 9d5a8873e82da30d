"""Do any bytes come back, and is every damaged file refused?

Random and adversarial inputs are encoded by the reference model and decoded; a lane is
never stored, so that the model codes all of them, every other one with the mixer and a
primer. Then single bits of files are
flipped, and files are cut: each must raise an error.

    python -m experiments.textcoding.round_trips --inputs 1000
"""

import dataclasses
import time
from typing import Any

import numpy as np

from experiments.common.config import parse
from experiments.common.results import Results
from jaxcompress import textcoding
from jaxcompress.models.bundled_text import heldout_text

FIXED = [
    b"",
    b"a",
    b"\x00",
    b"\xff",
    "naïve 😀👩‍👩‍👧 ‮\u2028".encode(),
    b"<s></s><unk><pad><|im_start|><|endoftext|>",
    b"\xe2\x96\x81<0x41>\xed\xa0\x80\xc0\x80",
    bytes(range(256)),
    b"\r\n\t \x0b\x0c\x1c",
]


@dataclasses.dataclass(frozen=True)
class Config:
    inputs: int = 1000
    longest: int = 60  # bytes
    flips: int = 300
    fast: bool = False  # a dozen inputs
    results: str = "experiments/textcoding/results/round_trips.jsonl"


def draw(random: np.random.Generator, longest: int) -> bytes:
    """Draw noise, code points of any plane, text, or a mixture of all."""
    size = int(random.integers(0, longest + 1))
    noise = random.bytes(size)
    points = random.integers(0, 0x110000, size // 3)
    plane = "".join(chr(x) for x in points if not 0xD800 <= x < 0xE000).encode()
    text = heldout_text().encode()
    at = int(random.integers(0, len(text) - size))
    kinds = [noise, plane, text[at : at + size]]
    mixed = b"".join(
        x[: size // 3] for x in random.permutation(np.array(kinds, object))
    )
    return [*kinds, mixed][int(random.integers(4))]


def run(config: Config) -> list[dict[str, Any]]:
    """Count what comes back, and damaged files that are refused; one row."""
    if config.fast:
        config = dataclasses.replace(config, inputs=12, flips=12, longest=12)
    random = np.random.default_rng(0)
    inputs = FIXED[: config.inputs]
    while len(inputs) < config.inputs:
        inputs = [*inputs, draw(random, config.longest)]
    clock, same, files = time.perf_counter(), 0, []
    primers = [b"", b"import os\n"]
    for i, data in enumerate(inputs):
        options = {"mix": i % 2 == 1, "primer": primers[i % 2], "store": False}
        files.append(textcoding.encode(data, window=64, verify=False, **options))
        same += textcoding.decode(files[-1], primer=primers[i % 2]) == data
    letters = b"a" * 1_000_000
    if not config.fast:
        same += textcoding.decode(textcoding.encode(letters, verify=False)) == letters
    refused = 0
    for i in range(config.flips):
        which = (i // 2) % len(files)
        bad = bytearray(files[which])
        place = int(random.integers(len(bad)))
        if i % 2:
            bad[place] ^= 1 << int(random.integers(8))
        else:
            del bad[place:]
        try:
            textcoding.decode(bytes(bad), primer=primers[which % 2])
        except ValueError:
            refused += 1
    results = Results(config, experiment="round_trips")
    row = {
        "inputs": len(inputs) + (not config.fast),
        "same": int(same),
        "damaged": config.flips,
        "refused": refused,
        "seconds": time.perf_counter() - clock,
    }
    results.add(row)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

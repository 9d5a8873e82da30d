"""Text to train on: sources of the standard library, none of them held out."""

import hashlib
from typing import Any

import numpy as np

from experiments.models.train_reference import Config, library_files, long_lines
from jaxcompress.models.bundled_text import heldout_text


def training_tokens(tokenizer: Any, size: int) -> np.ndarray:
    """Tokens of library files, about `size` bytes of them; near copies left out too."""
    held = long_lines(heldout_text())
    found: list[int] = []
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    texts = library_files(Config())
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    for name in order[::-1]:  # the held-out files are the first of this order
        own = long_lines(texts[name])
        if len(own & held) <= 0.1 * len(own):
            found += [*begin, *tokenizer.encode(texts[name])]
            size -= len(texts[name])
        if size <= 0:
            break
    return np.asarray(found, np.int32)


def batch_at(
    step: int, tokens: np.ndarray, length: int, batch: int, seed: int
) -> dict[str, np.ndarray]:
    """Windows at random places, as a function of the seed and the step."""
    random = np.random.default_rng((seed, step))
    starts = random.integers(0, len(tokens) - length, batch)
    mask = np.ones((batch, length), bool)
    mask[:, 0] = False
    return {"tokens": tokens[starts[:, None] + np.arange(length)], "mask": mask}

"""How fast does our float32 model evaluate text, beside transformers with PyTorch?

The same weights, windows of tokens and machine; one window through each in turn, for
several rounds, so that other work on the machine slows both alike. Reports medians of
wall and processor time, and speed ratios (above 1: ours is faster), as medians of the
rounds' ratios. Needs torch and transformers:

    python -m experiments.evaluation.speed SmolLM2.gguf text.txt
"""

import dataclasses
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import timed
from experiments.evaluation.parity import (
    in_transformers,
    peer_versions,
    text_windows,
    torch_losses,
    window_losses,
)
from jaxcompress.models.loading import load


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    fraction: float = 0.2  # of the text, counted from its end
    windows: int = 8  # rounds: one window in each
    tokens: int = 512  # in a window
    batch: int = 1  # windows at a time
    scan: bool = False
    fast: bool = False  # three rounds of short windows
    results: str = "experiments/evaluation/results/speed.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Time batches of windows in both, in turn; one row."""
    import torch

    start = time.perf_counter()
    if config.fast:
        config = dataclasses.replace(config, windows=3, tokens=64)
    model, params, tokenizer = load(config.model, scan=config.scan, dtype=jnp.float32)
    wanted = dataclasses.replace(config, windows=config.windows * config.batch)
    windows = text_windows(tokenizer, wanted)
    windows = windows.reshape(-1, config.batch, config.tokens)
    reference = in_transformers(model, params, tokenizer)

    def ours(window):
        return window_losses(model, params, window).block_until_ready()

    first = np.asarray(ours(windows[0]))  # compiles
    difference = np.abs(first - torch_losses(reference, windows[0])).max()
    rounds = []
    for window in windows:
        _, *mine = timed(lambda window=window: ours(window))
        _, *theirs = timed(lambda window=window: torch_losses(reference, window))
        rounds.append((*mine, *theirs))
    wall, processor, their_wall, their_processor = np.array(rounds).T
    row = {
        "scan": config.scan,
        "batch": config.batch,
        "tokens": config.tokens,
        "rounds": len(rounds),
        "seconds": float(np.median(wall)),
        "seconds_transformers": float(np.median(their_wall)),
        "processor_seconds": float(np.median(processor)),
        "processor_seconds_transformers": float(np.median(their_processor)),
        "ratio": float(np.median(their_wall / wall)),
        "ratio_processor": float(np.median(their_processor / processor)),
        "largest_loss_difference": float(difference),
        "torch_threads": torch.get_num_threads(),
        "seconds_in_all": time.perf_counter() - start,
    }
    results = Results(config, experiment="evaluation_speed", **peer_versions())
    results.add(row)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

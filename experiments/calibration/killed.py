"""Does a run that is killed in each stage end with the same bytes?

Curvatures, plan and codes of a language model, block by block, in processes of their
own. One run is left alone. The other is killed (SIGKILL) in each sweep, as soon as
half of its files are there, and started again with the same store:

    python -m experiments.calibration.killed SmolLM2.gguf text.txt
"""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import jaxcompress as jc
from experiments.calibration.larger import WHERE, code, measured
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import Clock
from jaxcompress.models.bundled_text import heldout_text

STAGES = ("curvatures", "plan", "compress")
# Stage, its sweep, and the files in the store that the sweep leaves, one a block.
SWEEPS = (
    ("curvatures", "moments, forward", "curvatures/*-moments-*"),
    ("curvatures", "curvatures, backward", "curvatures/*-cotangents-*"),
    ("plan", "plan", "curvatures/*-moments-*"),
    ("compress", "codes", "blocks/part-*"),
)
SOON = 6.0  # seconds after which a plan is killed


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = ""  # the reference model, if empty
    text: str = ""
    windows: int = 8
    tokens: int = 128  # in a window
    rate: float = 3.0  # bits per weight of the linear layers
    states: int = 8  # of the trellis
    stage: str = ""  # what one process does, with `store`; all, if empty
    store: str = ""
    fast: bool = False  # the reference model, two windows
    results: str = "experiments/calibration/results/killed.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Kill in each sweep and compare bytes; a row for each sweep."""
    if config.stage:
        work(config)
        return []
    if config.fast:
        config = dataclasses.replace(config, windows=2, tokens=64)
    results = Results(config, experiment="killed")
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as torn:
        counts = {}
        for stage in STAGES:
            start(config, stage, whole).wait()
        for _, sweep, files in SWEEPS:
            counts[sweep] = len(list(Path(whole).glob(files)))
        ends = {}
        for stage, sweep, files in SWEEPS:
            ends[sweep] = kill(config, stage, torn, files, counts[sweep])
        for stage, sweep, _ in SWEEPS:
            left, after, killed = ends[sweep]
            results.add(
                {
                    "model": Path(config.model).name or "reference",
                    "calibration_tokens": config.windows * config.tokens,
                    "stage": stage,
                    "sweep": sweep,
                    "blocks": counts[sweep],
                    "blocks_when_killed": left,
                    "seconds_when_killed": after,
                    "killed": killed,
                    "file_bytes": (Path(whole) / "small.safetensors").stat().st_size,
                    "same_bytes": digest(whole) == digest(torn),
                }
            )
    return results.rows


def start(config: Config, stage: str, store: str) -> subprocess.Popen:
    """Start a stage in a process of its own."""
    options = dataclasses.asdict(config) | {"stage": stage, "store": store}
    positional = [options.pop("model"), options.pop("text")]
    command = [sys.executable, "-m", "experiments.calibration.killed"]
    command += [x for x in positional if x]
    for name, value in options.items():
        if name == "fast":
            command += ["--fast"] if value else []
        elif value != "":
            command += [f"--{name}", str(value)]
    return subprocess.Popen(command)


def kill(
    config: Config, stage: str, store: str, files: str, count: int
) -> tuple[int, float, bool]:
    """Kill a stage when half of a sweep's files are there; the plan has none.

    Where no other sweep of the stage follows, it is then run to its end.

    Returns:
      How many there were, seconds since its start, and whether it still ran then.
    """
    clock, process = Clock(), start(config, stage, store)
    while process.poll() is None:
        there = len(list(Path(store).glob(files)))
        if there >= count // 2 and (stage != "plan" or clock.seconds > SOON):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there, after = len(list(Path(store).glob(files))), clock.seconds
    if files is not SWEEPS[0][2] or stage == "plan":
        start(config, stage, store).wait()
    return there, after, process.returncode == -signal.SIGKILL


def digest(store: str) -> str:
    """Return one digest of the recipe and of the file."""
    found = hashlib.sha256()
    for name in ("recipe.json", "small.safetensors"):
        found.update((Path(store) / name).read_bytes())
    return found.hexdigest()


def work(config: Config) -> None:
    """Do one stage, from what the ones before it left."""
    folder = Path(config.store)
    if config.model:
        model, weights, tokenizer = jc.models.open_weights(config.model)
        text = jc.tokenization.read_text(config.text)
    else:
        model, weights, tokenizer = jc.models.load("reference")
        text = heldout_text()
    count = config.windows * config.tokens
    ids = np.array(tokenizer.encode(text[: 8 * count])[:count], np.int32)
    batches = [{"tokens": row} for row in ids.reshape(-1, 1, config.tokens)]
    moments = measured(model, weights, batches, folder)
    if config.stage == "plan":
        rules = jc.planning.plan_rates(
            weights,
            moments,
            where=WHERE,
            bits_per_weight=config.rate,
            states=config.states,
        )
        (folder / "recipe.json").write_text(json.dumps(rules))
    if config.stage == "compress":
        code(model, weights, batches, moments, folder)


if __name__ == "__main__":
    run(parse(Config, __doc__))

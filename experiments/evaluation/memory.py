"""How much memory does evaluating a model of a large vocabulary take?

Each job runs in a fresh process, whose peak (`VmHWM`) is read after the imports, after
loading and at the end: loading alone, `evaluate`, and `compare` of the model with
itself, on windows of random tokens.

    python -m experiments.evaluation.memory gemma-3-270m.gguf
"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.common.config import parse
from experiments.common.results import Results

JOBS = ("load", "evaluate", "compare")
HERE = "experiments.evaluation.memory"
PROGRAM = f"import sys; from {HERE} import job; job(*sys.argv[1:])"


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"  # or a file
    tokens: int = 512  # in a window
    batch: int = 2  # windows, all in one batch
    fast: bool = False  # short windows
    results: str = "experiments/evaluation/results/memory.jsonl"


def peak() -> float:
    """Read the peak of this process so far, in MiB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def job(name: str, model_name: str, tokens: str, batch: str) -> None:
    """Do one job in this process, and print its peaks as JSON."""
    import numpy as np

    import jaxcompress as jc
    from jaxcompress.evaluation import Apply, LanguageModelMetrics, windows

    peaks = {"imports": peak()}
    model, params, _ = jc.models.load(model_name)
    peaks["loaded"] = peak()
    size = int(batch) * (int(tokens) - 1) + 1
    text = np.random.default_rng(0).integers(0, model.vocab_size, size)
    batches = windows(text, int(tokens), int(batch))
    clock = time.process_time()
    if name == "evaluate":
        jc.evaluate(LanguageModelMetrics(Apply(model)), params, batches)
    elif name == "compare":
        jc.compare(Apply(model), params, params, batches)
    peaks |= {
        "peak": peak(),
        "pieces": model.vocab_size,
        "parameters": jc.nbytes(params) / 2**20,
        "processor_seconds": time.process_time() - clock,
    }
    print(json.dumps(peaks))


def run(config: Config) -> list[dict[str, Any]]:
    """Run each job in a process of its own; a row for each."""
    if config.fast:
        config = dataclasses.replace(config, tokens=32)
    results = Results(config, experiment="evaluation_memory")
    for name in JOBS:
        arguments = [name, config.model, str(config.tokens), str(config.batch)]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        results.add(
            {
                "job": name,
                "model": Path(config.model).stem,
                "tokens": config.tokens,
                "batch": config.batch,
                **json.loads(done.stdout.splitlines()[-1]),
            }
        )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

"""Does a file decode wherever it is read?

Encodes a text with batched prefill, in as many lanes as asked for, and decodes each
file in new processes: as this one, with XLA restricted to SSE4.2, with one thread, and
with other Python environments (`--pythons`, separated by commas, each with its own
version of JAX). Every process must give the same bytes, and encode to the same file.

    python -m experiments.textcoding.portable --pythons old/bin/python,new/bin/python
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.common.config import parse
from experiments.common.results import Results
from jaxcompress import textcoding
from jaxcompress.models.bundled_text import heldout_text

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import hashlib, json, sys, jax
from jaxcompress import textcoding
options = json.loads(sys.argv[2])
data = textcoding.decode(open(sys.argv[1], "rb").read())
again = textcoding.encode(data, verify=False, **options)
digests = [hashlib.sha256(x).hexdigest() for x in (data, again)]
print(json.dumps([*digests, jax.__version__, sys.version.split()[0]]))
"""


@dataclasses.dataclass(frozen=True)
class Config:
    lanes: str = "1,3,32"
    bytes: int = 6000
    window: int = 256
    pythons: str = ""
    fast: bool = False  # one file, one process
    results: str = "experiments/textcoding/results/portable.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Decode each file in each process; a row for each, whether all was the same."""
    lanes = [int(x) for x in config.lanes.split(",")]
    flags = os.environ.get("XLA_FLAGS", "")
    places = {
        "another process": (sys.executable, flags),
        "SSE4.2": (sys.executable, f"{flags} --xla_cpu_max_isa=SSE4_2"),
        "one thread": (
            sys.executable,
            f"{flags} --xla_cpu_multi_thread_eigen=false",
        ),
    }
    for python in filter(None, config.pythons.split(",")):
        places[f"python {python}"] = (python, flags)
    size = config.bytes
    if config.fast:
        lanes, size = [2], 100
        places = {"SSE4.2": places["SSE4.2"]}
    data = heldout_text().encode()[:size]
    results = Results(config, experiment="portable")
    for count in lanes:
        options = {"lanes": count, "window": config.window}
        file = textcoding.encode(data, verify=False, **options)
        wanted = [hashlib.sha256(x).hexdigest() for x in (data, file)]
        for place, (python, xla) in places.items():
            clock = time.perf_counter()
            *found, jax_version, version = elsewhere(python, xla, file, options)
            results.add(
                {
                    "lanes": count,
                    "bytes": len(data),
                    "place": place if "/" not in place else "another version",
                    "jax": jax_version,
                    "python": version,
                    "same_text": found[0] == wanted[0],
                    "same_file": found[1] == wanted[1],
                    "seconds": time.perf_counter() - clock,
                }
            )
    return results.rows


def elsewhere(python: str, xla: str, file: bytes, options: dict[str, Any]) -> Any:
    """Decode and encode in another process."""
    with tempfile.NamedTemporaryFile() as stored:
        stored.write(file)
        stored.flush()
        environment = os.environ | {"XLA_FLAGS": xla.strip(), "PYTHONPATH": str(ROOT)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [python, "-c", PROGRAM, stored.name, json.dumps(options)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    if not all(
        row["same_text"] and row["same_file"] for row in run(parse(Config, __doc__))
    ):
        sys.exit("a process gave other bytes")

"""Does a file decode wherever it is read?

Encodes a text with batched prefill, the mixer and a primer, in as many lanes as asked
for, and decodes the files in new processes: as this one, with XLA restricted to SSE4.2,
with one thread, and with other Python environments (`--pythons`, separated by commas,
each with its own version of JAX). Every process must give the same bytes, and encode
them to the same file as the first.

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
options = json.loads(sys.argv[1])
primer = options.pop("primer").encode()
texts = []
for name in sys.argv[2:]:
    stored = open(name, "rb").read()
    texts.append(textcoding.decode(stored, primer=primer))
again = textcoding.encode(texts[0], primer=primer, verify=False, **options)
digests = [hashlib.sha256(x).hexdigest() for x in (again, *texts)]
print(json.dumps([jax.__version__, sys.version.split()[0], *digests]))
"""


@dataclasses.dataclass(frozen=True)
class Config:
    lanes: str = "1,3,32"
    bytes: int = 1500
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
    text = heldout_text()
    data, primer = text.encode()[1000 : 1000 + size], text[:500]
    results = Results(config, experiment="portable")
    options = [{"lanes": count, "window": config.window} for count in lanes]
    files = [
        textcoding.encode(data, verify=False, primer=primer.encode(), **option)
        for option in options
    ]
    digests = [hashlib.sha256(x).hexdigest() for x in (files[0], data)]
    for place, (python, xla) in places.items():
        clock = time.perf_counter()
        jax_version, version, again, *texts = elsewhere(
            python, xla, files, options[0] | {"primer": primer}
        )
        seconds = time.perf_counter() - clock
        for count, digest in zip(lanes, texts, strict=True):
            row = {
                "lanes": count,
                "bytes": len(data),
                "place": place if "/" not in place else "another version",
                "decoder_jax": jax_version,
                "python": version,
                "same_text": digest == digests[1],
                "seconds": seconds,
            }
            if count == lanes[0]:
                row["same_file"] = again == digests[0]
            results.add(row)
    return results.rows


def elsewhere(
    python: str, xla: str, files: list[bytes], options: dict[str, Any]
) -> Any:
    """Decode files in another process, and encode the text of the first."""
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for i, file in enumerate(files):
            names.append(str(Path(folder) / f"{i}.jxtc"))
            Path(names[-1]).write_bytes(file)
        environment = os.environ | {"XLA_FLAGS": xla.strip(), "PYTHONPATH": str(ROOT)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [python, "-c", PROGRAM, json.dumps(options), *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    if not all(
        row["same_text"] and row.get("same_file", True)
        for row in run(parse(Config, __doc__))
    ):
        sys.exit("a process gave other bytes")

"""What memory does packing a checkpoint take, and how does it grow with its size?

Makes up directories like those of Hugging Face (bfloat16 shards, an index, settings),
packs and unpacks them in processes of their own, compares every file, and reports peak
memory of each process. The weights are Gaussian with a scale for each row.

    python -m experiments.storage.packed_checkpoint --folder FOLDER --sizes 0.75,1.5,3
"""

import dataclasses
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from experiments.common.config import parse
from experiments.common.results import Results

WIDTH = 4096


@dataclasses.dataclass(frozen=True)
class Config:
    folder: str = ""  # with room for twice the largest size; a temporary one if empty
    sizes: str = "0.75,1.5,3"  # gigabytes
    shard: float = 1.0  # gigabytes
    fast: bool = False  # one directory of 20 megabytes
    results: str = "experiments/storage/results/packed_checkpoint.jsonl"


def make(folder: Path, size: float, shard: float) -> None:
    """Make up a checkpoint of so many gigabytes."""
    random = np.random.default_rng(0)
    pool = random.standard_normal((2048, WIDTH), np.float32) * 0.03
    folder.mkdir(parents=True)
    rows = max(1, int(size * 1e9 / 2 / WIDTH))
    layout, tensors, held, files = [], {}, 0.0, 0
    while rows:
        some = min(rows, int(random.choice([1024, 4096, 14336])))
        scale = np.exp(random.normal(0, 0.4, (some, 1))).astype(np.float32)
        which = random.integers(0, len(pool), some)
        name = f"model.layers.{len(layout)}.weight"
        tensors[name] = (pool[which] * scale).astype(ml_dtypes.bfloat16)
        layout.append(name)
        rows -= some
        held += some * WIDTH * 2 / 1e9
        if held >= shard or not rows:
            files += 1
            save_file(tensors, folder / f"model-{files:05d}.safetensors")
            tensors, held = {}, 0.0
    text = json.dumps({"weight_map": layout}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)


def measured(*arguments: str) -> tuple[float, float, int]:
    """Run a command of ours: seconds passed, of the processor, peak bytes.

    The peak is read while the process runs: what the system reports behind it counts
    this process too, from which it was forked.
    """
    start = time.perf_counter()
    command = [sys.executable, "-m", "jaxcompress", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("VmHWM"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak


def run(config: Config) -> list[dict[str, Any]]:
    """Pack, verify and unpack each size; a row for each."""
    sizes = [0.02] if config.fast else [float(x) for x in config.sizes.split(",")]
    results = Results(config, experiment="lossless_checkpoint")
    with tempfile.TemporaryDirectory(dir=config.folder or None) as name:
        folder = Path(name)
        for size in sizes:
            source, packed, back = (folder / x for x in ("in", "packed", "out"))
            make(source, size, config.shard)
            pack = measured("pack", str(source), str(packed))
            verify = measured("verify", str(packed))
            unpack = measured("unpack", str(packed), str(back))
            files = sorted(path.name for path in source.iterdir())
            same, different, wrong = filecmp.cmpfiles(
                source, back, files, shallow=False
            )
            if different or wrong or len(same) != len(list(back.iterdir())):
                raise ValueError(f"{different + wrong} did not come back")
            before = sum(path.stat().st_size for path in source.iterdir())
            results.add(
                {
                    "bytes": before,
                    "files": len(files),
                    "packed_share": packed.stat().st_size / before,
                    **_row("pack", *pack),
                    **_row("verify", *verify),
                    **_row("unpack", *unpack),
                }
            )
            shutil.rmtree(source)
            shutil.rmtree(back)
            packed.unlink()
    return results.rows


def _row(name: str, seconds: float, processor: float, peak: int) -> dict[str, float]:
    return {
        f"{name}_seconds": seconds,
        f"{name}_processor_seconds": processor,
        f"{name}_peak_mb": peak / 1e6,
    }


if __name__ == "__main__":
    run(parse(Config, __doc__))

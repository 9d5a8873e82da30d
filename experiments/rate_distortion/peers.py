"""What do the files of AutoRound and llama.cpp cost the same model on the same texts?

Rows beside those of `rate_distortion.py`: the same windows to evaluate on, the same
tokens to calibrate on, linear layers only; bits are those of these layers' tensors in
the peers' own files. llama.cpp is given as the folder of its programs, `llama-imatrix`
and `llama-quantize`; AutoRound as packages beside this one, `pip install auto-round`:

    python -m experiments.rate_distortion.peers SmolLM2.gguf text.txt \\
        --llama llama.cpp/build/bin
    python -m experiments.rate_distortion.peers SmolLM2.gguf text.txt --bits 4 3 2
"""

import dataclasses
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load
from experiments.common.results import Results
from experiments.quantization import calibrated
from experiments.rate_distortion.models import compared

BLOCK = 128  # of AutoRound's weights
BATCH = 8  # windows in one of its steps


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    llama: str = ""  # folder of llama.cpp's programs
    types: str = "IQ4_XS;Q3_K_M;IQ3_XXS;Q2_K;IQ2_S"
    bits: tuple[int, ...] = (0,)  # of AutoRound, 0 for none
    iterations: int = 20  # of AutoRound, for each block
    samples: int = 64  # windows that it takes of those to calibrate on
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    calibration: int = 256  # windows
    windows: int = 8  # of each text
    tokens: int = 512  # in a window
    threads: int = 2
    fast: bool = False  # does nothing: the peers have no fast form
    results: str = "experiments/rate_distortion/results/models.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the files of the peers that the results lack."""
    original = load(config.model)
    model, params, tokenizer = original.model, original.params, original.tokenizer
    scanned, dense = original.scanned, original.dense
    calibration, batches = calibrated.texts(config, tokenizer)
    ids = np.concatenate(calibration)
    text = tokenizer.decode(ids.reshape(-1))
    results = Results(config)

    def label(name: str, seen: int) -> dict[str, Any]:
        return {
            "model": original.name,
            "variant": name,
            "rate": 0.0,
            "embedding": 0.0,
            "states": 0,
            "calibration_tokens": seen,
        }

    def new(name: str, seen: int) -> bool:
        return not results.holds(**label(name, seen))

    def add(name: str, seen: int, path: Path, bits: float, seconds: float) -> None:
        ready = jc.models.load(path, scan=True, dtype="float32")[1]
        ready = {**ready, "embed": dense["embed"]}
        about = {"bits_per_compressed_weight": bits, "compress_seconds": seconds}
        labels = label(name, seen)
        compared(results, labels, scanned, dense, ready, batches, about)

    with tempfile.TemporaryDirectory() as folder:
        for kind in config.types.split(";") if config.llama else ():
            name = f"llama.cpp {kind}, importance matrix"
            if new(name, ids.size):
                clock = time.perf_counter()
                path = llama(config, Path(folder), text, kind)
                add(name, ids.size, path, gguf_bits(path), time.perf_counter() - clock)
        for bits in filter(None, config.bits):
            seen = ids[: config.samples]
            name = f"AutoRound, {bits} bits, {config.iterations} iterations"
            if new(name, seen.size):
                clock = time.perf_counter()
                source = Path(folder) / "float"
                if not source.exists():
                    jc.export.huggingface(source, model, params, tokenizer)
                dense_path, packed = autoround(
                    source, Path(folder), seen, bits, config.iterations
                )
                seconds = time.perf_counter() - clock
                add(name, seen.size, dense_path, packed_bits(packed, bits), seconds)
    return results.rows


def llama(config: Config, folder: Path, text: str, kind: str) -> Path:
    """Write a file of llama.cpp, calibrated; the embedding stays as it is."""
    matrix, seen, path = folder / "matrix.gguf", folder / "text.txt", folder / "x.gguf"
    threads = str(config.threads)
    if not matrix.exists():
        seen.write_text(text, encoding="utf-8")
        command = [Path(config.llama) / "llama-imatrix", "-m", config.model, "-f", seen]
        command += ["-o", matrix, "-c", str(config.tokens), "-t", threads]
        subprocess.run(command, check=True, capture_output=True)
    command = [Path(config.llama) / "llama-quantize", "--allow-requantize"]
    command += ["--imatrix", matrix, "--token-embedding-type", "f32"]
    command += [config.model, path, kind, threads]
    subprocess.run(command, check=True, capture_output=True)
    return path


def gguf_bits(path: Path) -> float:
    """Count the bits of a weight of the linear layers in a .gguf file."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    found = [x for x in tensors if x.name.startswith("blk.") and len(x.shape) == 2]
    size = sum(int(np.prod(x.shape)) for x in found)
    return 8 * sum(int(x.n_bytes) for x in found) / size


def autoround(
    source: Path, folder: Path, ids: np.ndarray, bits: int, iterations: int
) -> tuple[Path, Path]:
    """Run AutoRound on a folder of weights and windows `[windows, tokens]`.

    Returns:
        The folders of its weights, dense and packed.
    """
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    windows = ids.reshape(-1, BATCH, ids.shape[-1]).astype(np.int64)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(source),
        bits=bits,
        group_size=BLOCK,
        sym=False,
        iters=iterations,
        seqlen=ids.shape[-1],
        nsamples=len(ids),
        batch_size=BATCH,
        dataset=list(torch.tensor(windows)),
        device_map="cpu",
        amp=False,
    )
    kinds = "fake,auto_round:auto_gptq"
    _, folders = rounder.quantize_and_save(str(folder / str(bits)), kinds)
    dense, packed = map(Path, folders)
    return dense, packed


def packed_bits(folder: Path, bits: int) -> float:
    """Count the bits of a weight of the linear layers in AutoRound's packed files."""
    size = weights = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(("qweight", "scales", "qzeros")):
                    array = file.get_tensor(name)
                    size += array.nbytes
                    if name.endswith("qweight"):
                        weights += 32 * array.size // bits
    return 8 * size / weights


if __name__ == "__main__":
    run(parse(Config, __doc__))

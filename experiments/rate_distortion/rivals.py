"""What do GLQ's trellis codes cost the same model on the same texts?

Rows beside those of `rate_distortion.models`: the same windows to evaluate on, linear
layers only; bits are those of these layers' tensors in GLQ's own file. GLQ (PyPI `glq`,
a trellis of 2^16 states after QTIP) runs as it comes, layer after layer on the inputs
of the compressed prefix, on the windows that the other rows calibrate on. With
`--viterbi` its search runs in `viterbi.c`, compiled; that both find the same states is
checked first. Packages beside this one, `pip install glq torch transformers`:

    gcc -O3 -march=native -ffp-contract=off -shared -fPIC -o viterbi.so \\
        experiments/rate_distortion/viterbi.c
    python -m experiments.rate_distortion.rivals SmolLM2.gguf text.txt \\
        --bits 2 3 --viterbi ./viterbi.so --store DIR
"""

import ctypes
import dataclasses
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load
from experiments.common.results import Results
from experiments.common.timing import Clock
from experiments.quantization import calibrated
from experiments.rate_distortion.models import compared

STATES = 2**16
CODED = ("trellis_packed", "SU", "SV", "Wscale")  # of a layer, in GLQ's file


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    bits: tuple[int, ...] = (2, 3, 4)
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings,plays"  # further texts to measure on
    calibration: int = 64  # windows
    windows: int = 8  # of each text
    tokens: int = 512  # in a window
    viterbi: str = ""  # the compiled library; GLQ's own search where empty
    store: str = ""  # of finished layers; what it holds takes no time
    fast: bool = False  # does nothing: GLQ has no fast form
    results: str = "experiments/rate_distortion/results/models.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the files of GLQ that the results lack."""
    results = Results(config)
    if config.fast:
        return results.rows
    original = load(config.model)
    tokenizer = original.tokenizer
    calibration, batches = calibrated.texts(config, tokenizer)
    ids = np.concatenate(calibration)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(config.store or folder) / "float"
        if not source.exists():
            jc.export.huggingface(source, original.model, original.params, tokenizer)
        for bits in config.bits:
            label = {
                "model": original.name,
                "variant": f"GLQ trellis, {bits} bits",
                "rate": 0.0,
                "embedding": 0.0,
                "states": STATES,
                "calibration_tokens": ids.size,
            }
            if results.holds(**label):
                continue
            clock = Clock()
            text = tokenizer.decode(ids.reshape(-1))
            coded = Path(config.store or folder) / f"glq-{bits}"
            quantize(config, source, coded, text, bits, len(ids))
            about = {
                "bits_per_compressed_weight": coded_bits(coded, bits),
                "compress_processor_seconds": clock.processor_seconds,
            }
            dense = Path(folder) / f"dense-{bits}"
            write_dense(source, coded, dense, bits)
            ready = jc.models.load(dense, scan=True, dtype="float32")[1]
            ready = {**ready, "embed": original.dense["embed"]}
            compared(
                results, label, original.scanned, original.dense, ready, batches, about
            )
    return results.rows


def quantize(
    config: Config, source: Path, coded: Path, text: str, bits: int, samples: int
) -> None:
    """Run GLQ on a folder of float weights, calibrated on a text of ours."""
    import torch
    from glq import quantize_model

    if (coded / "quantize_config.json").exists():
        return
    # GLQ asks the package `datasets` for its text; nothing else of it is used.
    datasets = types.ModuleType("datasets")
    datasets.load_dataset = lambda *_, **__: {"text": [text]}
    sys.modules["datasets"] = datasets
    if config.viterbi:
        replace_search(config.viterbi)
    quantize_model.quantize(
        str(source),
        str(coded),
        bpw=bits,
        nsamples=samples,
        seqlen=config.tokens,
        device="cpu",
        dtype=torch.float32,
        workers=1,
        codebook_type="trellis",
        resume=True,
    )


def replace_search(path: str) -> None:
    """Let GLQ search in the compiled library, after a check that it finds the same.

    Raises:
        ValueError: if states differ.
    """
    import torch
    from glq import trellis

    library = ctypes.CDLL(str(Path(path).resolve()))
    own = trellis.bitshift_codebook.viterbi
    values: dict[int, np.ndarray] = {}

    def viterbi(self: Any, x: Any, overlap: Any = None) -> Any:
        if id(self) not in values:
            room = np.empty(STATES + 16, np.float32)
            start = -room.ctypes.data // 4 % 16
            values[id(self)] = room[start : start + STATES]  # on 64 bytes
            values[id(self)][:] = self.lut.numpy().reshape(-1)
        steps, rows = x.shape
        targets = np.ascontiguousarray(x.float().numpy())
        shared = None if overlap is None else overlap.numpy().astype(np.int32)
        states = np.empty((steps, rows), np.int32)
        library.viterbi(
            *(pointer(a) for a in (values[id(self)], targets, shared, states)),
            *(steps, rows, self.K),
        )
        return torch.from_numpy(states)

    for bits in (2, 3, 4):
        codebook = trellis.TrellisCodebook("3inst", K=bits).cb
        x = torch.randn(48, 2, generator=torch.Generator().manual_seed(bits)).half()
        free, ours = own(codebook, x), viterbi(codebook, x)
        overlap = free[24] >> bits
        ends = own(codebook, x, overlap), viterbi(codebook, x, overlap)
        if not (torch.equal(free, ours) and torch.equal(*ends)):
            raise ValueError(f"{path} finds other states than GLQ at {bits} bits")
    values.clear()
    trellis.bitshift_codebook.viterbi = viterbi


def pointer(array: np.ndarray | None) -> Any:
    """Return the address of an array for C; none for None."""
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def coded_bits(folder: Path, bits: int) -> float:
    """Count the bits of a weight of the linear layers in GLQ's file."""
    size = weights = 0
    with safe_open(folder / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith(CODED):
                array = file.get_tensor(name)
                size += array.nbytes
                if name.endswith("trellis_packed"):
                    weights += 8 * array.nbytes // bits
    return 8 * size / weights


def write_dense(source: Path, coded: Path, target: Path, bits: int) -> None:
    """Write the folder of float weights with those that GLQ's file decodes to."""
    import torch
    from glq import resume, trellis

    codebook = trellis.TrellisCodebook("3inst", K=bits)
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    with (
        safe_open(source / "model.safetensors", "np") as dense,
        safe_open(coded / "model.safetensors", "pt") as file,
    ):
        tensors = {name: dense.get_tensor(name) for name in dense.keys()}  # noqa: SIM118
        for name in [x for x in file.keys() if x.endswith(CODED[0])]:  # noqa: SIM118
            layer = name.removesuffix(f".{CODED[0]}")
            parts = {key: file.get_tensor(f"{layer}.{key}") for key in CODED}
            outputs, inputs = tensors[f"{layer}.weight"].shape
            with torch.no_grad():
                weight = resume.dequantize_artifacts(
                    parts, inputs, outputs, "trellis", codebook=codebook
                )
            tensors[f"{layer}.weight"] = weight.numpy()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    run(parse(Config, __doc__))

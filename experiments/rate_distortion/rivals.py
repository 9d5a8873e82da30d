"""What do GLQ and AutoRound cost the same layers, at the same bytes as ours?

The first layers of a model, its others float. GLQ (PyPI `glq`, a trellis of 2^16
states after QTIP) and AutoRound (blocks of 128, asymmetric) run as they come, layer
after layer on the inputs of the compressed prefix; `rate_distortion` on moments of the
original model, at equal rates, at the bits of the rival's tensors in its own file. All
calibrate on the same windows. With `--viterbi` GLQ's search runs in `viterbi.c`,
compiled; that both find the same states is checked first. Packages beside this one,
`pip install glq auto-round torch transformers`:

    gcc -O3 -march=native -ffp-contract=off -shared -fPIC -o viterbi.so \\
        experiments/rate_distortion/viterbi.c
    python -m experiments.rate_distortion.rivals SmolLM2.gguf text.txt \\
        --bits 2 3 --layers 6 --viterbi ./viterbi.so --store DIR
    python -m experiments.rate_distortion.rivals SmolLM2.gguf text.txt \\
        --bits 2 3 --layers 6 --rival AutoRound
"""

import ctypes
import dataclasses
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load
from experiments.common.results import Results
from experiments.common.timing import Clock
from experiments.quantization import calibrated
from experiments.rate_distortion import peers
from experiments.rate_distortion.models import compared

STATES = 2**16
NAMES = {
    "GLQ": "GLQ, its trellis",
    "AutoRound": "AutoRound, {0.iterations} iterations",
}
OURS = {
    "ours, 128 states": "states=128, shrinkage=0",
    "ours, shrinkage 0.1": "states=128",
    "ours, rounding": "states=0, shrinkage=0",
}
CODED = ("trellis_packed", "SU", "SV", "Wscale")  # of a layer, in GLQ's file


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    rival: str = "GLQ"  # or "AutoRound"
    bits: tuple[int, ...] = (2, 3)
    layers: int = 6  # the first ones
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings,plays"  # further texts to measure on
    calibration: int = 64  # windows
    windows: int = 8  # of each text
    tokens: int = 512  # in a window
    iterations: int = 200  # of AutoRound, for each layer
    viterbi: str = ""  # the compiled library; GLQ's own search where empty
    store: str = ""  # of GLQ's finished layers; what it holds takes no time
    fast: bool = False  # does nothing: the rivals have no fast form
    results: str = "experiments/rate_distortion/results/rivals.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rival at bits that the results lack, and our codes at as many."""
    results = Results(config)
    if config.fast:
        return results.rows
    original = load(config.model)
    tokenizer = original.tokenizer
    calibration, batches = calibrated.texts(config, tokenizer)
    ids = np.concatenate(calibration)
    model, params = jc.models.fewer_layers(
        original.model, original.params, range(config.layers)
    )
    name = NAMES[config.rival].format(config)
    moments = None

    def add(label: dict[str, Any], ready: Any, about: dict[str, Any]) -> None:
        stacked = jc.models.stack_layers(original.params | ready)
        compared(
            results, label, original.scanned, original.dense, stacked, batches, about
        )

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = Path(config.store or folder) / f"float-{config.layers}"
        if not source.exists():
            jc.export.huggingface(source, model, params, tokenizer)
        for bits in config.bits:
            label = {
                "model": original.name,
                "layers": config.layers,
                "calibration_tokens": ids.size,
                "bits": bits,
                "rival": name,
            }
            held = [x for x in results.held if label.items() <= x.items()]
            rates = {x["variant"]: x["bits_per_compressed_weight"] for x in held}
            if name not in rates:
                clock = Clock()
                if config.rival == "AutoRound":
                    dense, packed = peers.autoround(
                        source, work, ids, bits, config.iterations
                    )
                    rates[name] = peers.packed_bits(packed, bits)
                else:
                    coded = source.parent / f"glq-{config.layers}-{bits}"
                    text = tokenizer.decode(ids.reshape(-1))
                    quantize(config, source, coded, text, bits, len(ids))
                    rates[name] = coded_bits(coded, bits)
                    dense = work / f"dense-{bits}"
                    write_dense(source, coded, dense, bits)
                ready = kernels(jc.models.load(dense, scan=False, dtype="float32")[1])
                about = {
                    "bits_per_compressed_weight": rates[name],
                    "compress_processor_seconds": clock.processor_seconds,
                }
                add({**label, "variant": name}, ready, about)
            for variant in [x for x in OURS if x not in rates]:
                moments = moments or jc.collect_moments(model, params, calibration)
                clock = Clock()
                method = f"rate_distortion(rate={rates[name]}, {OURS[variant]})"
                small = jc.compress(params, [(".*kernel", method)], moments)
                about = {"compress_processor_seconds": clock.processor_seconds}
                path = work / "small.safetensors"
                jc.save(path, small)
                loaded = jc.load(path)
                about |= calibrated.stored(path, loaded)
                ready = kernels(jax.jit(jc.materialize)(loaded))
                add({**label, "variant": variant}, ready, about)
    return results.rows


def kernels(params: Any) -> Any:
    """Choose the layers of parameters."""
    return {name: x for name, x in params.items() if name.startswith("layer_")}


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
            tensors[f"{layer}.weight"] = np.ascontiguousarray(weight)  # or it is lost
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    run(parse(Config, __doc__))

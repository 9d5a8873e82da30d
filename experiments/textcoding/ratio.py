"""How small does text become, and where do the bytes go?

Encodes the first bytes of a text with one model and several windows, overlaps and
numbers of lanes, beside other compressors on the same bytes. `--entropy` sums the
integer model's own cross entropy over the same predictions, from its logits in
float64. `--decode` decodes every file, and fails where the text does not come back.

    python -m experiments.textcoding.ratio reference --settings 512/256/1,512/0/1
    python -m experiments.textcoding.ratio SmolLM2.gguf wikitext2-valid.txt \\
        --settings 1024/512/1
"""

import bz2
import dataclasses
import gzip
import importlib
import lzma
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from experiments.common.config import parse
from experiments.common.results import Results
from jaxcompress import textcoding
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.models.loading import load
from jaxcompress.textcoding import pieces, windows
from jaxcompress.tree.compress import compress


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""  # held-out text of the reference model where there is none
    bytes: int = 61440
    settings: str = "512/256/1"  # window/overlap/lanes, separated by commas
    recipe: str = ""  # compress the model first
    entropy: bool = False
    decode: bool = False
    peers: bool = False
    fast: bool = False  # two thousand bytes
    results: str = "experiments/textcoding/results/ratio.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Code a text by each setting and compressor; a row for each."""
    if config.fast:
        config = dataclasses.replace(config, bytes=2000, settings="64/32/2")
    text = Path(config.text).read_bytes() if config.text else b""
    data = (text or heldout_text().encode())[: config.bytes]
    text_name = Path(config.text).name or "heldout"
    results = Results(config, experiment="ratio", text=text_name, bytes=len(data))
    if config.peers or config.fast:
        for row in other_compressors(data):
            results.add(row)
    model, params, tokenizer = load(config.model, scan=False)
    if config.recipe:
        params = compress(params, config.recipe)
    settings = [tuple(map(int, x.split("/"))) for x in config.settings.split(",")]
    context = max(2048, max(window for window, _, _ in settings))
    exact = textcoding.exact(model, params, context=context)
    for window, overlap, lanes in settings:
        clock = time.perf_counter()
        file = textcoding.encode(
            data,
            exact,
            None,
            tokenizer,
            window=window,
            overlap=overlap,
            lanes=lanes,
            verify=False,
        )
        row = {
            "coder": Path(config.model).name,
            "recipe": config.recipe,
            "window": window,
            "overlap": overlap,
            "lanes": lanes,
            "file_bytes": len(file),
            "bits_per_byte": 8 * len(file) / len(data),
            "encode_seconds": time.perf_counter() - clock,
        }
        if config.decode:
            clock = time.perf_counter()
            if textcoding.decode(file, exact, None, tokenizer) != data:
                raise ValueError("the text did not come back")
            row["decode_seconds"] = time.perf_counter() - clock
        if config.entropy:
            bits = cross_entropy(exact, tokenizer, data, window, overlap, lanes)
            allowed = 1.001 * bits / 8 + 96 + 10 * lanes
            row |= {"entropy_bytes": bits / 8, "within": len(file) <= allowed}
        results.add(row)
    return results.rows


@jax.jit
def surprise(model: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute the bits of the targets `[T]` that follow the inputs `[T]`."""
    logits = model.apply(inputs[None])[0]
    logits = (logits - logits.max(-1, keepdims=True)) * (math.log(2) / 4096)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], -1)
    return -chosen[:, 0] / math.log(2)


def cross_entropy(
    exact: Any, tokenizer: Any, data: bytes, window: int, overlap: int, lanes: int
) -> float:
    """Sum the bits of all tokens, each predicted from the context of the coder."""
    ids = pieces.to_pieces(tokenizer, data).ids
    first = next(i for i in (tokenizer.bos_id, tokenizer.eos_id, 0) if i is not None)
    length = -(-len(ids) // lanes)
    exact, total = exact.widen(), 0.0
    for begin in range(0, len(ids), length):
        lane = np.array([first, *ids[begin : begin + length]], np.int32)
        for start, coded, end in windows.cut_windows(len(lane) - 1, window, overlap):
            inputs = np.zeros(window, np.int32)
            targets = np.zeros(window, np.int32)
            inputs[: end - 1 - start] = lane[start : end - 1]
            targets[: end - 1 - start] = lane[start + 1 : end]
            bits = np.asarray(surprise(exact, inputs, targets), np.float64)
            total += bits[coded - 1 - start : end - 1 - start].sum()
    return float(total)


def other_compressors(data: bytes) -> list[dict[str, Any]]:
    """Run the compressors that this machine has, at their best settings."""
    named = {
        "gzip -9": lambda: gzip.compress(data, 9),
        "bzip2 -9": lambda: bz2.compress(data, 9),
        "xz -9e": lambda: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "zstd -19": lambda: zstandard.ZstdCompressor(level=19).compress(data),
        "brotli 11": lambda: importlib.import_module("brotli").compress(data),
        "ppmd H, order 16": lambda: importlib.import_module("pyppmd").compress(
            data, max_order=16, mem_size=1 << 28, variant="H"
        ),
        "zpaq -m5": lambda: outside(data, "zpaq"),
    }
    rows = []
    for name, run_one in named.items():
        clock = time.perf_counter()
        try:
            size = len(run_one())
        except (ImportError, FileNotFoundError):
            continue
        rows.append(
            {
                "coder": name,
                "file_bytes": size,
                "bits_per_byte": 8 * size / len(data),
                "encode_seconds": time.perf_counter() - clock,
            }
        )
    return rows


def outside(data: bytes, program: str) -> bytes:
    """Run zpaq's strongest method; its archive."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_bytes(data)
        command = [program, "add", "text.zpaq", "text", "-m5"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return (Path(folder) / "text.zpaq").read_bytes()


if __name__ == "__main__":
    run(parse(Config, __doc__))

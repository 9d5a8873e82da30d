"""Does llama.cpp compute what we mean, and do our codes beat its own in Q4_0?

Writes a model as GGUF files of several types, has them read back by the gguf package,
bit for bit, and run by llama.cpp on the CPU; the last rows are files that llama.cpp
quantized itself. It rounds activations where weights are quantized: its logits and
those of our dequantized weights differ by that. Rows that the file of results holds are
not computed again. Needs the `readers` extra:

    python -m experiments.export.gguf_files SmolLM2.gguf text.txt
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from jaxcompress.export.named_leaves import dense_tensor
from jaxcompress.models.assembly import foreign_name
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.models.gguf_settings import ARCHITECTURES
from jaxcompress.tree.paths import roots

KERNELS = "layer_.*/kernel"
HALF = "scale_dtype='float16'"
# The embedding is the head too: in 8 bits in every row, llama.cpp's own included.
HEAD = ("embed/embedding", f"symmetric(bits=8, block=32, {HALF})")
ROWS: dict[str, str | None] = {
    "F32": None,
    "Q8_0": f"symmetric(bits=8, block=32, {HALF})",
    "Q4_0, nearest": f"symmetric(bits=4, block=32, full_range=True, {HALF})",
    "Q4_0, gptq": f"gptq(bits=4, block=32, {HALF})",
    "Q4_0, learned": f"learned(bits=4, block=32, {HALF})",
    "Q8_0 of llama.cpp": None,
    "Q4_0 of llama.cpp": None,
}
FAST = ("F32", "Q8_0", "Q4_0, nearest", "Q4_0 of llama.cpp")
GREEDY = 64


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""  # the packaged text by default
    windows: int = 16
    tokens: int = 256  # in a window
    calibration: int = 16  # windows, before the others
    prompt: str = "def read(path):\n"
    only: str = ""  # rows whose name holds this, and F32
    threads: int = 1
    fast: bool = False  # four rows, two windows
    results: str = "experiments/export/results/gguf_files.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Have each file read and run; a row for each that the results lack."""
    if config.fast:
        config = dataclasses.replace(config, windows=2, calibration=2)
    model, params, tokenizer = jc.models.load(config.model, scan=False)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    text = jc.tokenization.read_text(config.text) if config.text else heldout_text()
    calibration, held = windows(text, tokenizer, config)
    names = [x for x in ROWS if x == "F32" or config.only in x]
    names = [x for x in names if x in FAST or not config.fast]
    packages, moments = ("gguf", "llama_cpp_python"), None
    short, tokens = Path(config.model).name, config.windows * config.tokens
    readers = {x: metadata.version(x) for x in packages}
    results = Results(config, model=short, readers=readers)
    names = [x for x in names if not results.holds(model=short, row=x, tokens=tokens)]
    dense = [np.asarray(apply(model, params, x)) for x in held]
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.gguf"
        jc.export.gguf(start, model, params, tokenizer)
        for name in names:
            path, clock = Path(folder) / f"{name}.gguf", time.perf_counter()
            row: dict[str, Any] = {"row": name}
            if "llama.cpp" in name:
                quantize_there(start, path, name.split()[0])
                small = read_back(path, model, params)
            else:
                method = ROWS[name]
                if moments is None and method and method.startswith(("gptq", "lea")):
                    moments = jc.collect_moments(model, params, calibration)
                small = params
                if method:
                    small = jc.compress(params, [HEAD, (KERNELS, method)], moments)
                jc.export.gguf(path, model, small, tokenizer)
                row |= {"method": method, **tensors_differing(path, model, small)}
            row["types"], row["bytes"] = types_of(path), path.stat().st_size
            there = Llama(path, config)
            if name == "F32":
                row["same_greedy_tokens"] = same_text(
                    there, model, small, tokenizer, config.prompt
                )
            row |= scores(model, jc.materialize(small), there, held, dense)
            there.close()
            results.add({**row, "seconds": time.perf_counter() - clock})
            path.unlink()
    return results.rows


def windows(text: str, tokenizer: Any, config: Config) -> tuple[list[Any], list[Any]]:
    """Cut windows [1, tokens] to calibrate on, and the windows after them."""
    count = config.calibration + config.windows
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    step = config.tokens - len(begin)
    ids = np.asarray(tokenizer.encode(text[: 8 * count * config.tokens]), np.int32)
    ids = ids[: count * step].reshape(count, 1, step)
    ids = np.concatenate([np.full((count, 1, len(begin)), begin), ids], axis=-1)
    parts = list(ids.astype(np.int32))
    return parts[: config.calibration], parts[config.calibration :]


def apply(model: Any, params: Any, tokens: np.ndarray) -> jax.Array:
    """Compute logits [tokens, vocabulary] of one window, float32."""
    return _jitted(model)({"params": params}, tokens)[0]


def _jitted(model: Any, kept: dict[Any, Any] = {}) -> Any:  # noqa: B006
    return kept.setdefault(model, jax.jit(model.apply))


class Llama:
    """llama.cpp with one file, giving logits of every token."""

    def __init__(self, path: Path, config: Config):
        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=max(512, config.tokens),
            n_batch=512,
            n_threads=config.threads,
            n_threads_batch=config.threads,
            logits_all=True,
            verbose=False,
        )

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self.model.reset()
        self.model.eval(tokens.tolist())
        return np.array(self.model.scores[: len(tokens)])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest tokens, one after the other."""
        self.model.reset()
        self.model.eval(prompt)
        out: list[int] = []
        for _ in range(count):
            out.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
            self.model.eval(out[-1:])
        return out

    def close(self) -> None:
        self.model.close()


def same_text(
    there: Llama, model: Any, params: Any, tokenizer: Any, prompt: str
) -> int:
    """How many greedy tokens agree, from the first on, of `GREEDY`.

    The prompt is tokenized by llama.cpp, which must agree too.
    """
    ids = there.model.tokenize(prompt.encode(), add_bos=tokenizer.bos_id is not None)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if ids != begin + list(tokenizer.encode(prompt)):
        return -1
    theirs = there.greedy(ids, GREEDY)
    tokens = np.asarray([ids + theirs[:-1]], np.int32)
    # Where all tokens before are theirs and ours, the likeliest next one is ours.
    ours = np.asarray(apply(model, params, tokens)).argmax(1)[len(ids) - 1 :]
    same = [a == b for a, b in zip(theirs, ours, strict=True)]
    return [*same, False].index(False)


def scores(
    model: Any, small: Any, there: Llama, held: list[Any], dense: list[np.ndarray]
) -> dict[str, Any]:
    """Perplexities, agreement of likeliest tokens, and divergences from F32 here."""
    sums: Counter[str] = Counter()
    for tokens, logits in zip(held, dense, strict=True):
        float_ = log_softmax(logits)
        ours = log_softmax(np.asarray(apply(model, small, tokens)))
        theirs = log_softmax(there.logits(tokens[0]))
        labels = tokens[0, 1:, None]
        for name, x in (("float", float_), ("ours", ours), ("theirs", theirs)):
            sums[f"loss_{name}"] -= np.take_along_axis(x[:-1], labels, 1).sum()
        for name, x in (("ours", ours), ("theirs", theirs)):
            sums[f"kl_{name}"] += (np.exp(float_) * (float_ - x)).sum()
        sums["agree"] += (ours.argmax(1) == theirs.argmax(1)).sum()
        sums["scored"] += len(labels)
        sums["tokens"] += len(tokens[0])
    per = {name: float(sums[f"loss_{name}"] / sums["scored"]) for name in
           ("float", "ours", "theirs")}  # fmt: skip
    return {
        "tokens": int(sums["tokens"]),
        "perplexity_float": float(np.exp(per["float"])),
        "perplexity_ours": float(np.exp(per["ours"])),
        "perplexity_llama_cpp": float(np.exp(per["theirs"])),
        "perplexity_ratio": float(np.exp(per["theirs"] - per["ours"])),
        "top1_agreement": float(sums["agree"] / sums["tokens"]),
        "kl_ours": float(sums["kl_ours"] / sums["tokens"]),
        "kl_llama_cpp": float(sums["kl_theirs"] / sums["tokens"]),
    }


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def types_of(path: Path) -> dict[str, int]:
    reader = gguf.GGUFReader(path)
    return dict(Counter(tensor.tensor_type.name for tensor in reader.tensors))


def tensors_differing(path: Path, model: Any, small: Any) -> dict[str, int]:
    """Compare what the gguf package dequantizes with the values of our leaves."""
    reader, differing = gguf.GGUFReader(path), 0
    architecture = ARCHITECTURES[reader.fields["general.architecture"].contents()]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    leaves = list(roots(small))
    for name, value in leaves:
        tensor = tensors.pop(foreign_name(name, architecture.modules))
        want = dense_tensor(name, value).astype(np.float32)
        rotates = re.search("/[qk]_proj/", name) is not None
        if architecture.interleaved and rotates:  # pairs (2i, 2i + 1)
            halves = want.reshape(-1, 2, model.head_size // 2, want.shape[1])
            want = halves.swapaxes(1, 2).reshape(want.shape)
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        differing += not np.array_equal(read.reshape(want.shape), want)
    return {"tensors": len(leaves) + len(tensors), "tensors_differing": differing}


def read_back(path: Path, model: Any, params: Any) -> Any:
    """The weights of a file of llama.cpp, of the shapes and names of `params`."""
    again, found, _ = jc.models.load(path)
    if again != model or jax.tree.structure(found) != jax.tree.structure(params):
        raise ValueError(f"{path} came back as {again}, not as {model}")
    return found


def quantize_there(source: Path, target: Path, kind: str) -> None:
    """Have llama.cpp quantize a file, the embedding in Q8_0 as in our rows."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    q8_0 = int(gguf.GGMLQuantizationType.Q8_0)
    options.token_embedding_type = options.output_tensor_type = q8_0
    with silence():
        failed = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(options)
        )
    if failed:
        raise RuntimeError(f"llama.cpp did not quantize {source} to {kind}")


@contextlib.contextmanager
def silence():
    """Keep what C writes to standard error away."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


if __name__ == "__main__":
    run(parse(Config, __doc__))

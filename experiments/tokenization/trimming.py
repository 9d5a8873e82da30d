"""What does a model lose with the pieces that a domain never uses, and what is saved?

The vocabulary of a model is trimmed to the pieces of the first part of a text, and once
more to those and the pieces that the model itself finds likely there, so that nearly no
probability is cut off. Perplexity is measured on a part of that text, bits per byte on
its end, which was not counted, and on docstrings of the standard library, which are out
of the domain. One JSON line per row; rows that are there are not computed again:

    python -m experiments.tokenization.trimming SmolLM2.gguf text.txt
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import docstrings
from jaxcompress import tokenization
from jaxcompress.evaluation import Apply, LanguageModelMetrics, windows


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""  # by default docstrings
    fraction: float = 0.8  # of the text, in which pieces are counted
    cut_off: str = "none,1,0.001,0.0004"  # probability that may be lost; 1: only used
    windows: int = 8  # of each text
    calibration: int = 16  # windows, of the counted text, for likely pieces
    calibrated: str = "measured"  # they begin with the measured ones; or "other"
    tokens: int = 512  # in a window
    fast: bool = False
    results: str = "experiments/tokenization/results/trimming.jsonl"


def mean_probabilities(model: Any, params: Any, batches: list) -> np.ndarray:
    """Average over tokens what the model predicts for each piece, float64 [V]."""

    @jax.jit
    def total(params, tokens):
        logits = model.apply({"params": params}, tokens)
        return jax.nn.softmax(logits, axis=-1).sum(axis=(0, 1))

    sums = [np.asarray(total(params, b["tokens"]), np.float64) for b in batches]
    found = sum(sums)
    return found / found.sum()


def kept_pieces(used: np.ndarray, likely: np.ndarray, cut_off: float) -> np.ndarray:
    """Choose used pieces, and likely ones until the rest have less than `cut_off`."""
    others = np.flatnonzero(~used)
    others = others[np.argsort(-likely[others])]
    rest = likely[others].sum() - np.cumsum(likely[others])
    more = others[: int((rest >= cut_off).sum()) + 1]
    return (
        np.flatnonzero(used) if cut_off >= 1 else np.union1d(np.flatnonzero(used), more)
    )


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rows that the results lack."""
    if config.fast:
        config = dataclasses.replace(
            config,
            model="reference",
            windows=1,
            calibration=1,
            tokens=128,
            cut_off="none,1,0.01",
        )
    if config.text:
        whole = tokenization.read_text(config.text)
    else:
        whole = docstrings(20_000 if config.fast else 400_000)[
            30_000 * (not config.fast) :
        ]
    start = whole.index("\n", int(len(whole) * config.fraction)) + 1
    texts = {"in_domain": whole[:start], "held_out": whole[start:]}
    texts["out_of_domain"] = docstrings(30_000)
    model, params, tokenizer = jc.models.load(config.model, scan=True)
    counts = tokenization.count_pieces(
        tokenizer, texts["in_domain"].splitlines(keepends=True)
    )
    ids = np.array(tokenizer.encode(texts["in_domain"]))
    # The same text for every row, whatever the number of its tokens there.
    scored = config.windows * (config.tokens - 1) + 1
    parts = {
        name: tokenizer.decode(tokenizer.encode(text)[:scored])
        for name, text in texts.items()
    }
    used = counts > 0
    used[ids] = True
    size = config.calibration * (config.tokens - 1) + 1
    chosen = ids[-size:] if config.calibrated == "other" else ids[:size]
    calibration = windows(chosen, config.tokens, 1, limit=config.calibration)
    labels = {
        "model": Path(config.model).name,
        "text": Path(config.text).stem or "docstrings",
        "windows": config.windows,
        "calibrated": config.calibrated,
        "tokens": config.tokens,
    }
    results = Results(config, experiment="tokenizers_trimming", **labels)
    likely = None
    for cut_off in config.cut_off.split(","):
        if results.holds(cut_off=cut_off, **labels):
            continue
        trimmed, lost = (model, params, tokenizer), 0.0
        if cut_off != "none":
            if likely is None:
                likely = mean_probabilities(model, params, calibration)
            keep = kept_pieces(used, likely, float(cut_off))
            trimmed = jc.models.trim_vocabulary(model, params, tokenizer, keep)
            _, kept = tokenization.trim(tokenizer, keep)
            lost = 1 - likely[kept].sum()
        row = {
            "cut_off": cut_off,
            "lost_probability": lost,
            **measure(*trimmed, parts, config),
        }
        results.add(row)
    return results.rows


def measure(
    model: Any, params: Any, tokenizer: Any, parts: dict, config: Config
) -> dict:
    """Measure sizes, and for each text perplexity, bits per byte, bytes per token."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        jc.models.save(path, model, half, tokenizer)
        file_bytes = path.stat().st_size
    found: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "weights": sum(x.size for x in jax.tree.leaves(params)),
        "embedding_bytes": tokenization.embedding_bytes(tokenizer, model.width),
        "tokenizer_bytes": len(tokenizer.to_bytes()),
        "file_bytes_bfloat16": file_bytes,
    }
    for name, text in parts.items():
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            raise ValueError(f"{name} did not come back from its {len(ids)} ids")
        batches = windows(
            ids,
            config.tokens,
            1,
            token_bytes=tokenizer.token_bytes(ids),
        )
        score = jc.evaluate(LanguageModelMetrics(Apply(model)), params, batches)
        found |= {
            f"{name}_bytes_per_token": len(text.encode()) / len(ids),
            f"{name}_perplexity": float(np.exp(score["loss"])),
            f"{name}_bits_per_byte": score["bits_per_byte"],
        }
    return found


if __name__ == "__main__":
    run(parse(Config, __doc__))

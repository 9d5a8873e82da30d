"""Does our float32 SmolLM2 have the perplexity that Hugging Face transformers gives it?

Loads a model (SmolLM2's `.gguf` file, dequantized, or anything `models.load` takes),
writes it out as a Hugging Face directory, has transformers load that, and evaluates
both on the same windows of tokens from the end of a text. Needs torch, transformers:

    python -m experiments.evaluation.parity SmolLM2.gguf text.txt
"""

import dataclasses
import functools
import tempfile
import time
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import split
from jaxcompress.export import huggingface
from jaxcompress.models.loading import load


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    fraction: float = 0.2  # of the text, counted from its end
    windows: int = 16
    tokens: int = 512  # in a window
    fast: bool = False  # two short windows
    results: str = "experiments/evaluation/results/parity.jsonl"


def text_windows(tokenizer: Any, config: Config) -> np.ndarray:
    """Cut the last part of the text into tokens [windows, tokens].

    Each window begins with the tokenizer's begin mark, where its model expects one.
    """
    parts = split(config.text, also="", fraction=config.fraction)
    (last,) = parts.measured.values()
    wanted = config.windows * config.tokens
    ids = np.asarray(tokenizer.encode(last), np.int32)
    if len(ids) < config.tokens:
        raise ValueError(f"{config.text}: {len(ids)} tokens, a window is more")
    ids = ids[: min(wanted, len(ids) // config.tokens * config.tokens)]
    windows = ids.reshape(-1, config.tokens)
    if tokenizer.bos_id is not None:
        windows = np.insert(windows, 0, tokenizer.bos_id, axis=1)[:, : config.tokens]
    return windows


@functools.partial(jax.jit, static_argnums=0)
def window_losses(model, params, tokens):
    """Compute nats per predicted token, float32 [windows, tokens - 1]."""
    logits = model.apply({"params": params}, tokens[:, :-1])
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]


def torch_losses(reference, tokens: np.ndarray) -> np.ndarray:
    """Compute the same by a transformers model."""
    import torch

    ids = torch.asarray(tokens, dtype=torch.long)
    with torch.inference_mode():
        logits = reference(ids[:, :-1], use_cache=False).logits.float()
        scores = torch.log_softmax(logits, dim=-1)
        return -scores.gather(-1, ids[:, 1:, None])[..., 0].numpy()


def in_transformers(model, params, tokenizer) -> Any:
    """Load the model in transformers, from our export."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as directory:
        huggingface(directory, model, params, tokenizer)
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).eval()


def run(config: Config) -> list[dict[str, Any]]:
    """Measure both perplexities, and how far single losses are apart; one row."""
    start = time.perf_counter()
    if config.fast:
        config = dataclasses.replace(config, windows=2, tokens=64)
    model, params, tokenizer = load(config.model, dtype=jnp.float32)
    windows = text_windows(tokenizer, config)
    reference = in_transformers(model, params, tokenizer)
    ours = np.concatenate([window_losses(model, params, w[None]) for w in windows])
    theirs = np.concatenate([torch_losses(reference, w[None]) for w in windows])
    perplexity = float(np.exp(ours.mean(dtype=np.float64)))
    wanted = float(np.exp(theirs.mean(dtype=np.float64)))
    row = {
        "windows": len(windows),
        "tokens": config.tokens,
        "perplexity": perplexity,
        "perplexity_transformers": wanted,
        "relative_difference": perplexity / wanted - 1,
        "largest_loss_difference": float(np.abs(ours - theirs).max()),
        "seconds": time.perf_counter() - start,
    }
    results = Results(config, experiment="smollm2_parity", **peer_versions())
    results.add(row)
    return results.rows


def peer_versions() -> dict[str, str]:
    """Return the versions of PyTorch and transformers."""
    return {name: metadata.version(name) for name in ("torch", "transformers")}


if __name__ == "__main__":
    run(parse(Config, __doc__))

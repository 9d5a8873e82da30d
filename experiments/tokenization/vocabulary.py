"""What does a vocabulary cost, in bits per byte of text and in bytes of the model?

Small models that differ only in their tokenizer (kind and size) learn the sources of
the standard library with the same number of floating-point operations: a larger
vocabulary sees fewer tokens. Held-out files are scored in bits per byte, which do not
depend on the tokenizer. One JSON line per model is appended as it is finished, and
lines that are there are not computed again:

    python -m experiments.tokenization.vocabulary
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import hold_out, library_files, sha256
from experiments.models.train_reference import Config as Training
from experiments.models.train_reference import (
    batch_at,
    initial_params,
    make_evaluation,
    make_optimizer,
    make_step,
)
from jaxcompress.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Config:
    kinds: str = "bpe,unigram"
    sizes: str = "512,1024,2048,4096,8192"
    seed: int = 0
    operations: float = 3e12  # of the matrix products, forward and backward
    train_bytes: int = 4_000_000
    heldout_bytes: int = 80_000
    width: int = 128
    layers: int = 4
    context: int = 256
    tokens_per_step: int = 2048
    fast: bool = False  # a tiny model, two sizes, a few steps
    results: str = "experiments/tokenization/results/vocabulary.jsonl"


def texts(config: Config) -> tuple[list[str], str]:
    """Read training files in the order of their names' hash, and held-out text."""
    files = library_files(few=config.fast)
    train, held, _ = hold_out(files, config.heldout_bytes)
    chosen, size = [], 0
    for name in sorted(train, key=sha256):
        chosen.append(train[name])
        size += len(train[name].encode())
        if size >= config.train_bytes:
            break
    return chosen, "".join(held.values())


def make_model(config: Config, vocab_size: int) -> Transformer:
    """Build a model of a configuration for a number of pieces."""
    heads = config.width // 32
    return Transformer(
        vocab_size=vocab_size,
        width=config.width,
        layers=config.layers,
        heads=heads,
        kv_heads=heads // 2,
        head_size=32,
        mlp_width=3 * config.width,
        tied=True,
    )


def operations_per_token(config: Config, params: Any) -> int:
    """Count the operations of training on one token: products, scores and head.

    Two for each weight, the tied embedding counted once, as the head; the backward pass
    costs twice the forward one.
    """
    matrices = sum(x.size for x in jax.tree.leaves(params) if x.ndim == 2)
    scores = 2 * config.layers * config.context * config.width
    return 3 * 2 * (matrices + scores)


def train_one(
    config: Config, kind: str, size: int, train: list[str], heldout: str
) -> dict[str, Any]:
    """Train one tokenizer and its model; its row."""
    clock = time.process_time()
    tokenizer = jc.tokenization.train(
        train, kind=kind, vocab_size=size, character_coverage=0.9999
    )
    tokenizer_seconds = time.process_time() - clock
    tokens = np.array(
        [i for text in train for i in (tokenizer.bos_id, *tokenizer.encode(text))],
        np.int32,
    )
    model = make_model(config, tokenizer.vocab_size)
    training = Training(
        seed=config.seed, tokens_per_step=config.tokens_per_step, warmup=20
    )
    params = initial_params(model, config.seed)
    weights = sum(x.size for x in jax.tree.leaves(params))
    each = operations_per_token(config, params)
    steps = max(4, int(config.operations / each / config.tokens_per_step))
    fall = steps // 2
    optimizer = make_optimizer(training)
    state, step_fn = optimizer.init(params), make_step(model, optimizer)
    clock, wall, losses = time.process_time(), time.perf_counter(), []
    for step in range(steps):
        rate = training.rate * min(1.0, (step + 1) / training.warmup)
        rate *= min(1.0, (steps - step) / (steps - fall))
        windows = batch_at(step, tokens, config.context, training)
        params, state, loss = step_fn(params, state, windows, rate)
        losses.append(loss)
        if step % 50 == 49:
            recent = float(np.mean([float(x) for x in losses[-50:]]))
            spent = time.perf_counter() - wall
            print(f"{kind} {size} step {step + 1}/{steps} {recent:.3f} {spent:.0f} s")
    jax.block_until_ready(params)
    seconds = time.process_time() - clock
    evaluate = make_evaluation(model, tokenizer, heldout, config.context)
    small = jc.compress(
        params, jc.chain("symmetric(bits=8)", "entropy_code()", "code_floats()")
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        jc.models.save(path, model, small, tokenizer)
        file_bytes = path.stat().st_size
    seen = steps * config.tokens_per_step
    per_token = len("".join(train).encode()) / len(tokens)
    return {
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "seed": config.seed,
        "weights": weights,
        "embedding_weights": tokenizer.vocab_size * config.width,
        "bytes_float32": jc.nbytes(params),
        "file_bytes_8_bits": file_bytes,
        "tokenizer_bytes": len(tokenizer.to_bytes()),
        "operations": each * seen,
        "steps": steps,
        "tokens_seen": seen,
        "bytes_seen": int(seen * per_token),
        "train_bytes": len("".join(train).encode()),
        "heldout_bytes": len(heldout.encode()),
        "heldout_bytes_per_token": len(heldout.encode())
        / len(tokenizer.encode(heldout)),
        "train_loss": float(np.mean([float(x) for x in losses[-20:]])),
        "bits_per_byte": evaluate(params),
        "bits_per_byte_8_bits": evaluate(jc.materialize(small)),
        "tokenizer_cpu_seconds": tokenizer_seconds,
        "train_cpu_seconds": seconds,
    }


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the models that the results lack; a row for each."""
    if config.fast:
        config = dataclasses.replace(
            config,
            sizes="400,600",
            operations=2e9,
            width=64,
            layers=1,
            context=64,
            tokens_per_step=256,
            train_bytes=200_000,
            heldout_bytes=8_000,
        )
    settings = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key not in ("kinds", "sizes", "results", "seed")
    }
    results = Results(config, experiment="tokenizers_vocabulary", config=settings)
    train, heldout = texts(config)
    for size in map(int, config.sizes.split(",")):
        for kind in config.kinds.split(","):
            labels = {"kind": kind, "vocab_size": size, "seed": config.seed}
            if results.holds(config=settings, **labels):
                continue
            results.add(train_one(config, kind, size, train, heldout))
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

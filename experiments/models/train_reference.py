"""How well does a 3.5-million-weight language model learn Python from its library?

Trains the reference model on the sources of the running interpreter's standard library,
holding out whole files. Writes into `--output`: `params.npz` (float32, names joined by
"/"), `tokenizer.model`, `heldout.txt`, `files.json` (every file with its sha256 digest)
and `state.npz`, from which an interrupted run resumes. Appends one line of results to
`--results`. The learning rate is warmed up, constant, and falls to zero linearly over
the last quarter; `--minutes` decides when the fall begins, and `--steps` and
`--decay_steps`, as recorded in the results, repeat the run without a clock:

    python -m experiments.models.train_reference
"""

import dataclasses
import functools
import json
import lzma
import math
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import hold_out, library_files, sha256
from jaxcompress import tokenization
from jaxcompress.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Config:
    output: str = "reference"
    results: str = "experiments/models/results/train_reference.jsonl"
    minutes: float = 85.0  # of training, the last quarter with a falling rate
    steps: int = 0  # if given, the number of steps instead of minutes
    decay_steps: int = 0
    checkpoint_minutes: float = 4.0
    fast: bool = False
    vocab_size: int = 2048
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    mlp_width: int = 384
    context: int = 256
    decay_context: int = 512  # while the rate falls
    tokens_per_step: int = 4096
    rate: float = 0.02  # of Muon
    adam_rate: float = 0.008  # of the embedding and the norms
    weight_decay: float = 0.05
    warmup: int = 100
    seed: int = 0


def make_model(config: Config) -> Transformer:
    """Build the model of a configuration."""
    names = ("vocab_size", "width", "layers", "heads", "kv_heads")
    names += ("head_size", "mlp_width")
    return Transformer(**{name: getattr(config, name) for name in names}, tied=True)


def initial_params(model: Transformer, seed: int):
    """Draw Linen's own initial values, with each block's last kernels at zero.

    The tied embedding is made smaller too: otherwise the first model is sure that each
    token repeats itself.
    """
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = flatten_dict(model.init(jax.random.key(seed), tokens)["params"], sep="/")
    for name in params:
        if "/o_proj/" in name or "/down_proj/" in name:
            params[name] = jnp.zeros_like(params[name])
    params["embed/embedding"] *= 0.3
    return unflatten_dict(params, sep="/")


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Use Muon for the layers' kernels, Adam for the rest, of rates relative to 1."""

    def dimension(path, x):
        kernel = path[0].key.startswith("layer_") and x.ndim == 2
        return optax.contrib.MuonDimensionNumbers() if kernel else None

    def dimensions(params):
        return jax.tree_util.tree_map_with_path(dimension, params)

    return optax.contrib.muon(
        1.0,
        adam_learning_rate=config.adam_rate / config.rate,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dimensions,
    )


def token_losses(model, params, windows):
    """Compute natural-log losses [B, T] of windows [B, T + 1]."""
    logits = model.apply({"params": params}, windows[:, :-1])
    labels = windows[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_step(model, optimizer):
    """Make a jitted step of training, whose rate is an argument."""

    def step(params, state, windows, rate):
        loss, gradients = jax.value_and_grad(
            lambda params: token_losses(model, params, windows).mean()
        )(params)
        updates, state = optimizer.update(gradients, state, params)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def make_evaluation(model, tokenizer, text, context):
    """Make a function of the parameters: bits per byte of text.

    Windows overlap by half, and only their second half counts (the first also its
    first), so that every token is predicted from at least half a context.
    """
    tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
    half, size = context // 2, len(text.encode())
    starts = range(0, max(len(tokens) - half - 1, 1), half)
    padded = np.concatenate([tokens, np.zeros(2 * context, np.int32)])
    windows = np.stack([padded[start : start + context + 1] for start in starts])
    at = np.stack([np.arange(start, start + context) + 1 for start in starts])
    counted = at < len(tokens)
    counted[1:, :half] = False
    group = 8
    padding = -len(windows) % group
    windows = np.pad(windows, ((0, padding), (0, 0))).reshape(-1, group, context + 1)
    counted = np.pad(counted, ((0, padding), (0, 0))).reshape(-1, group, context)

    @jax.jit
    def total(params):
        def one(pair):
            return (token_losses(model, params, pair[0]) * pair[1]).sum()

        return jax.lax.map(one, (windows, counted)).sum()

    return lambda params: float(total(params)) / math.log(2) / size


def batch_at(step: int, tokens: np.ndarray, context: int, config: Config) -> np.ndarray:
    """Cut windows [B, T + 1] at random places, by the seed and the step."""
    random = np.random.default_rng((config.seed, step))
    batch = config.tokens_per_step // context
    starts = random.integers(0, len(tokens) - context - 1, batch)
    return tokens[starts[:, None] + np.arange(context + 1)]


def save_npz(path: Path, arrays: dict[str, np.ndarray]):
    """Write arrays by name, all or nothing."""
    partial = path.with_suffix(".part")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def save_params(path: Path, params):
    """Write parameters, names joined by "/"."""
    flat = flatten_dict(params, sep="/")
    save_npz(path, {name: np.asarray(value) for name, value in flat.items()})


def save_state(path: Path, tree, numbers: dict[str, float]):
    """Write all from which an interrupted run resumes."""
    leaves = {f"leaf_{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}
    save_npz(path, leaves | {name: np.asarray(x) for name, x in numbers.items()})


def load_state(path: Path, tree, names: tuple[str, ...]):
    """Read what `save_state` wrote: the tree, and the numbers of these names."""
    with np.load(path) as file:
        leaves, structure = jax.tree.flatten(tree)
        saved = [jnp.asarray(file[f"leaf_{i}"]) for i in range(len(leaves))]
        return jax.tree.unflatten(structure, saved), [
            file[name].item() for name in names
        ]


def prepare(config: Config, output: Path):
    """Prepare tokenizer, training tokens and held-out text; write all three down."""
    texts = library_files(few=config.fast)
    train, held, copies = hold_out(texts, 20_000 if config.fast else 160_000)
    heldout = "".join(held.values())
    digests = {
        name: {"sha256": sha256(text), "bytes": len(text.encode())}
        for name, text in texts.items()
    }
    record = {
        "python": platform.python_version(),
        "train": {name: digests[name] for name in train},
        "heldout": {name: digests[name] for name in held},
        "left_out_as_near_copies": {name: digests[name] for name in copies},
        "heldout_text": {"sha256": sha256(heldout), "bytes": len(heldout.encode())},
    }
    (output / "files.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / "heldout.txt").write_bytes(heldout.encode())
    stored = output / "tokenizer.model"
    if stored.exists():
        tokenizer = tokenization.from_bytes(stored.read_bytes())
    else:
        tokenizer = tokenization.train(
            train.values(),
            kind="bpe",
            vocab_size=config.vocab_size,
            character_coverage=0.9999,
        )
        stored.write_bytes(tokenizer.to_bytes())
    tokens = []
    for text in train.values():
        tokens += [tokenizer.bos_id, *tokenizer.encode(text)]
    return tokenizer, np.array(tokens, np.int32), heldout, record


def run(config: Config) -> list[dict[str, Any]]:
    """Train, or resume; one row."""
    begin = time.time()
    if config.fast:
        small = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_size": 16}
        small |= {"mlp_width": 48, "vocab_size": 512, "context": 64, "steps": 60}
        small |= {"decay_context": 128}
        config = dataclasses.replace(config, **small, decay_steps=15, warmup=10)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer, tokens, heldout, record = prepare(config, output)
    size = len(heldout.encode())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    xz = 8 * len(lzma.compress(heldout.encode(), filters=filters)) / size
    model = make_model(config)
    params = initial_params(model, config.seed)
    weights = sum(x.size for x in jax.tree.leaves(params))
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    step_fn = make_step(model, optimizer)
    evaluate = functools.cache(
        lambda context: make_evaluation(model, tokenizer, heldout, context)
    )
    print(
        f"{weights} weights, {len(tokens)} training tokens of {len(record['train'])} "
        f"files, {size} held-out bytes of {len(record['heldout'])} files, "
        f"xz {xz:.4f} bits per byte",
        flush=True,
    )
    # `fall` is the step at which the rate begins to fall, `stop` the last one.
    step, spent, fall, stop = 0, 0.0, math.inf, math.inf
    if config.steps:
        fall, stop = config.steps - config.decay_steps, config.steps
    if (output / "state.npz").exists():
        (params, state), (step, spent, fall, stop) = load_state(
            output / "state.npz",
            (params, state),
            ("step", "spent", "fall", "stop"),
        )
        print(f"resumed at step {step}", flush=True)
    start = last = time.time()
    since, losses = (start, step), []
    while step < stop:
        elapsed = spent + time.time() - start
        if math.isinf(stop) and elapsed >= 0.75 * config.minutes * 60:
            pace = (time.time() - since[0]) / max(step - since[1], 1)
            left = config.minutes * 60 - elapsed
            slower = 1.4 if config.decay_context > config.context else 1.0
            fall, stop = step, step + max(int(0.95 * left / pace / slower), 1)
            print(f"step {step}: the rate falls until step {stop}", flush=True)
        rate = config.rate * min(1.0, (step + 1) / config.warmup)
        if step >= fall:
            rate *= (stop - step) / (stop - fall)
        context = config.context if step < fall else config.decay_context
        windows = batch_at(step, tokens, context, config)
        params, state, loss = step_fn(params, state, windows, rate)
        losses.append(loss)
        step += 1
        if step % 50 == 0:
            mean = float(jnp.stack(losses).mean())
            losses = []
            pace = (time.time() - start) / 60
            print(f"step {step} loss {mean:.4f} minutes {pace:.2f}", flush=True)
        if time.time() - last > 60 * config.checkpoint_minutes:
            save_params(output / "params.npz", params)
            numbers = {"step": step, "fall": fall, "stop": stop}
            numbers["spent"] = spent + time.time() - start
            save_state(output / "state.npz", (params, state), numbers)
            bits = evaluate(context)(params)
            print(
                f"step {step} rate {rate:.5f} held-out {bits:.4f} bits per byte, "
                f"epochs {step * config.tokens_per_step / len(tokens):.2f}",
                flush=True,
            )
            last = time.time()
            since = (last, step)
    save_params(output / "params.npz", params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    save_params(output / "params.bfloat16.npz", rounded)
    row = {
        "config": dataclasses.asdict(config),
        "weights": weights,
        "steps": int(stop),
        "decay_steps": int(stop - fall),
        "training_tokens": len(tokens),
        "epochs": step * config.tokens_per_step / len(tokens),
        "heldout_bytes": size,
        "heldout_sha256": sha256(heldout),
        "tokenizer_sha256": tokenizer.digest,
        "bytes_per_token": size / len(tokenizer.encode(heldout)),
        "bits_per_byte": evaluate(config.decay_context)(params),
        "bits_per_byte_bfloat16": evaluate(config.decay_context)(rounded),
        "bits_per_byte_xz": xz,
        "training_seconds": spent + time.time() - start,
        "seconds": time.time() - begin,
        "optax": metadata.version("optax"),
    }
    results = Results(config, experiment="train_reference")
    results.add(row)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

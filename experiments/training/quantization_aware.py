"""What does training through the rounding gain over rounding what was trained?

Quantizes the layers' kernels of the reference model at 3 and 2 bits: to nearest, with
error feedback and learned (all after training), then trains from the best of these, for
a few hundred steps on the text it was trained on, towards the float model's own
predictions: only the side parameters (scales and norms, codes frozen), or weights and
steps together through the rounding. All are compared on the held-out text, by
divergence from the float model and by bits per byte. One JSON line per row:

    python -m experiments.training.quantization_aware
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import training_tokens
from jaxcompress import reporting
from jaxcompress.evaluation import Apply, divergence, windows
from jaxcompress.models.bundled_text import heldout_text

KERNELS = r"layers/.*kernel"
LAYERS = r"(layers|final_norm)/.*"  # trains with the weights; the embedding stays
SIDE = r".*(scale|zero_point)"  # of quantized kernels, and of norms
MEGABYTE = 10**6


@dataclasses.dataclass(frozen=True)
class Config:
    bits: int = 3
    block: int = 64
    steps: int = 150
    tokens: int = 256  # in a window
    batch: int = 8  # windows in a step
    rate: float = 5e-4  # of Adam on latent weights
    step_rate: float = 5e-5  # on scales and norms, while weights train
    side_rate: float = 3e-4  # on scales and norms, alone
    calibration: int = 64  # windows
    windows: int = 64  # of held-out text
    fast: bool = False  # few steps and windows
    results: str = "experiments/training/results/quantization_aware.jsonl"


def train(
    apply_fn: Any, dense: Any, tree: Any, tokens: np.ndarray, config: Config
) -> tuple[Any, float]:
    """Train a tree towards the dense model: the tree, and processor seconds."""
    side = not any(
        isinstance(x, jc.FakeQuantized)
        for x in jax.tree.leaves(
            tree, is_leaf=lambda x: isinstance(x, jc.FakeQuantized)
        )
    )
    trainable, frozen = jc.partition(tree, SIDE if side else LAYERS)
    stored = jax.tree.map(lambda x: x.dtype, trainable)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)

    def label(path: Any, x: Any) -> str:
        del x
        weight = getattr(path[-1], "name", "") == "weight"
        return "weights" if weight else "side" if side else "steps"

    rates = {
        "weights": config.rate,
        "steps": config.step_rate,
        "side": config.side_rate,
    }
    optimizer = optax.multi_transform(
        {
            name: optax.adam(optax.linear_schedule(rate, 0.0, config.steps))
            for name, rate in rates.items()
        },
        jax.tree_util.tree_map_with_path(label, trainable),
    )

    @jax.jit
    def step(trainable: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, Any]:
        def loss(trainable: Any) -> jax.Array:
            logits = apply_fn(jc.combine(trainable, frozen), batch)
            return divergence(apply_fn(dense, batch), logits).mean()

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, clock = optimizer.init(trainable), time.process_time()
    random = np.random.default_rng(0)
    for _ in reporting.track(range(config.steps), "training"):
        starts = random.integers(0, len(tokens) - config.tokens, config.batch)
        batch = tokens[starts[:, None] + np.arange(config.tokens)]
        trainable, state, _ = step(trainable, state, batch)
    jax.block_until_ready(trainable)
    seconds = time.process_time() - clock
    trainable = jax.tree.map(lambda x, dtype: x.astype(dtype), trainable, stored)
    return jc.qat.convert(jc.combine(trainable, frozen)), seconds


def run(config: Config) -> list[dict[str, Any]]:
    """Measure one number of bits: three rows after training, two trained."""
    if config.fast:
        config = dataclasses.replace(
            config, steps=2, batch=2, tokens=64, calibration=4, windows=4
        )
    model, params, tokenizer = jc.models.load("reference", scan=True)
    apply_fn = Apply(model)
    tokens = training_tokens(tokenizer, MEGABYTE // (20 if config.fast else 1))
    ids = tokenizer.encode(heldout_text())
    heldout = windows(
        ids, 256, 4, token_bytes=tokenizer.token_bytes(ids), limit=config.windows
    )
    seen = tokens[: config.calibration * 256].reshape(-1, 4, 256)
    moments = jc.collect_moments(model, params, list(seen), where=KERNELS)
    layout = jc.find_layouts(model, params, heldout[0]["tokens"])
    results = Results(config)

    def add(name: str, small: Any, seconds: float) -> Any:
        dense = jax.jit(jc.materialize)(small)
        report = jc.compare(apply_fn, params, dense, heldout)
        held = [small["layers"][part] for part in ("attention", "mlp")]
        weights = sum(
            x.size for part in ("attention", "mlp") for x in params_of(params, part)
        )
        results.add(
            {
                "bits": config.bits,
                "block": config.block,
                "method": name,
                "bits_per_weight": 8 * jc.nbytes(held) / weights,
                "kl": report.kl,
                "kl_standard_error": report.kl_standard_error,
                "bits_per_byte": report.small.bits_per_byte,
                "dense_bits_per_byte": report.dense.bits_per_byte,
                "tokens": report.tokens,
                "steps": config.steps if "train" in name else 0,
                "tokens_per_step": config.tokens * config.batch,
                "processor_seconds": seconds,
            }
        )
        return small

    options = f"bits={config.bits}, block={config.block}"
    best = None
    for name in (
        f"asymmetric({options}, search=True)",
        f"gptq({options}, grid='asymmetric')",
        f"learned({options}, grid='asymmetric', steps=40)",
    ):
        clock = time.process_time()
        best = jc.compress(params, [(KERNELS, name)], moments, layouts=layout)
        jax.block_until_ready(best)
        add(name, best, time.process_time() - clock)
    side, seconds = train(apply_fn, params, best, tokens, config)
    add("learned, then scales and norms trained", side, seconds)
    latent = jc.qat.prepare(lambda _: best)(params)
    whole, seconds = train(apply_fn, params, latent, tokens, config)
    add("learned, then weights and steps trained through rounding", whole, seconds)
    return results.rows


def params_of(params: Any, part: str) -> list[jax.Array]:
    """List the kernels of one part of all layers."""
    return [x["kernel"] for x in params["layers"][part].values()]


if __name__ == "__main__":
    run(parse(Config, __doc__))

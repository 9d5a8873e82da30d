"""Does a student learn more from the texts it writes itself than from other people's?

A student of half the layers of the reference model is warmed up on the teacher's
predictions. From there it goes on, for the same number of scored tokens, on the
training text (forward and reverse divergence), on what it writes itself after prompts
of that text (reverse), or on both by halves (Jensen-Shannon). Measured on held-out
text, and on texts that the student itself writes after held-out prompts, where the
teacher's divergence says how far it strays. One JSON line per row:

    python -m experiments.distillation.on_policy
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import batch_at, training_tokens
from jaxcompress import distillation
from jaxcompress.evaluation import Apply, windows
from jaxcompress.models.bundled_text import heldout_text

ROWS = {  # the ratio of own texts, and the loss
    "off-policy, forward": (0.0, distillation.forward_kl),
    "off-policy, reverse": (0.0, distillation.reverse_kl),
    "on-policy, reverse": (1.0, distillation.reverse_kl),
    "half on-policy, Jensen-Shannon": (0.5, distillation.jensen_shannon),
}


@dataclasses.dataclass(frozen=True)
class Config:
    warmup: int = 150  # steps on the training text, before all rows
    steps: int = 80
    batch: int = 16  # texts in a step
    tokens: int = 64  # in a text
    prompt: int = 16  # of them given
    rate: float = 1e-3  # of Adam while warming up
    later_rate: float = 3e-4  # after it, falling to zero
    windows: int = 24  # of held-out text, 256 tokens each
    texts: int = 64  # that the student writes, to be judged
    seed: int = 0
    fast: bool = False  # two steps, two rows
    folder: str = ""  # for checkpoints
    results: str = "experiments/distillation/results/on_policy.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Train a student on each mixture of texts; a row for each, warmed up first."""
    chosen = dict(ROWS)
    if config.fast:
        config = dataclasses.replace(
            config, warmup=2, steps=2, batch=2, tokens=24, prompt=8, windows=2, texts=2
        )
        chosen = {name: ROWS[name] for name in list(ROWS)[1:3]}
    teacher, params, tokenizer = jc.models.load("reference", scan=True)
    student, start = jc.models.fewer_layers(teacher, params, 2)
    teach, learn = Apply(teacher), Apply(student)
    text = training_tokens(tokenizer, 50_000 if config.fast else 2_000_000)
    ids = tokenizer.encode(heldout_text())
    heldout = windows(ids, 256, 4, limit=config.windows)
    prompts = np.asarray(ids[: config.texts * config.tokens], np.int32)
    prompts = prompts.reshape(config.texts, -1)[:, : config.prompt]

    def batch(step: int) -> dict[str, np.ndarray]:
        found = batch_at(step, text, config.tokens, config.batch, config.seed)
        found["mask"][:, : config.prompt] = False  # as many scored in every row
        return found

    @jax.jit
    def strays(params: Any, bound: Any) -> jax.Array:
        """Mean reverse divergence, in nats, on texts that the student writes."""
        length = config.tokens - config.prompt
        tokens, mask = distillation.rollout(
            student, params, prompts, length, key=jax.random.key(9)
        )
        values = distillation.reverse_kl(
            learn(params, tokens)[:, :-1],
            teach(bound, tokens)[:, :-1],
            mask=mask[:, 1:],
        )
        return distillation.mean(values, mask[:, 1:])

    results = Results(config)

    def add(name: str, small: Any, steps: int, seconds: float) -> None:
        report = jc.compare(teach, params, small, heldout, small_apply_fn=learn)
        row = {
            "row": name,
            "steps": steps,
            "scored_tokens": steps * config.batch * (config.tokens - config.prompt),
            "kl": report.kl,
            "kl_standard_error": report.kl_standard_error,
            "loss": report.small.loss,
            "teacher_loss": report.dense.loss,
            "reverse_kl_on_own_texts": float(strays(small, params)),
            "heldout_tokens": report.tokens,
            "own_tokens": config.texts * (config.tokens - config.prompt),
            "processor_seconds": seconds,
            "warmup_steps": config.warmup,
            "seed": config.seed,
        }
        results.add(row)

    def train(
        name: str,
        start: Any,
        first: int,
        steps: int,
        rate: float,
        ratio: float,
        soft: Any,
    ) -> tuple[Any, float]:
        loss = distillation.soft_labels(learn, teach, params, soft=soft)
        loss = (
            distillation.on_policy(loss, student, prompt=config.prompt, ratio=ratio)
            if ratio
            else loss
        )
        optimizer = optax.adam(optax.linear_schedule(rate, 0.0, steps))
        clock = time.process_time()
        state = distillation.train(
            jc.make_train_step(loss, optimizer),
            distillation.init_state(start, optimizer, key=jax.random.key(config.seed)),
            lambda step: batch(first + step),
            steps=steps,
            folder=Path(config.folder) / name if config.folder else None,
            every=40,
            report=lambda number, metrics: (
                print(name, number, round(metrics["loss"], 4), flush=True)
                if number % 20 == 0
                else None
            ),
        )
        return state.params, time.process_time() - clock

    warm, seconds = train(
        "warm", start, 0, config.warmup, config.rate, 0.0, distillation.forward_kl
    )
    add("warmed up", warm, 0, seconds)
    for name, (ratio, soft) in chosen.items():
        small, seconds = train(
            name, warm, config.warmup, config.steps, config.later_rate, ratio, soft
        )
        add(name, small, config.steps, seconds)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

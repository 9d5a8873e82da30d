"""Does a student of half the depth learn more from a teacher than from labels?

Takes every second layer of the reference model as a student and trains it on the text
the teacher was trained on: with labels, with the teacher's predictions, with its hidden
states too, and with its attention maps besides; each the same batches in the same
order. All are measured on the held-out text. One JSON line per row:

    python -m experiments.distillation.depth --folder runs

A row that is interrupted resumes from its folder.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import batch_at, training_tokens
from jaxcompress import distillation, reporting
from jaxcompress.evaluation import Apply, windows
from jaxcompress.models.bundled_text import heldout_text

HIDDEN, MAPS = "layers/hidden", "layers/attention/attention"
ROWS = ("hard", "soft", "soft+hidden", "soft+hidden+attention")
TEXT = 2_000_000  # bytes of training text


@dataclasses.dataclass(frozen=True)
class Config:
    every: int = 2  # of the teacher's layers one is kept
    steps: int = 100
    tokens: int = 128  # in a window
    batch: int = 8  # windows in a step
    rate: float = 1e-3  # of Adam, falling linearly to zero
    hidden_weight: float = 1.0  # of the relative squared error, in nats
    attention_weight: float = 1.0  # of the divergence of maps
    windows: int = 48  # of held-out text, 256 tokens each
    rows: str = ",".join(ROWS)
    seed: int = 0
    fast: bool = False  # two short rows
    folder: str = ""  # for checkpoints
    results: str = "experiments/distillation/results/depth.jsonl"


def inner_loss(
    student: Any,
    teacher: Any,
    config: Config,
    attention: bool,
    bound: Any,
    params: Any,
    batch: Any,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum divergences of predictions, hidden states and, if asked, attention maps."""
    del key
    names = (HIDDEN, MAPS) if attention else (HIDDEN,)
    tokens, mask = batch["tokens"], batch["mask"][:, 1:]
    logits, mine = distillation.capture(student, names)(params, tokens)
    target, theirs = distillation.capture(teacher, names)(bound, tokens)
    values = distillation.forward_kl(logits[:, :-1], target[:, :-1], mask=mask)
    metrics = {"soft": distillation.mean(values, mask)}
    metrics["hidden"] = distillation.over_layers(
        functools.partial(distillation.hidden_states, kind="relative"),
        mine[HIDDEN],
        theirs[HIDDEN],
    ).mean()
    total = metrics["soft"] + config.hidden_weight * metrics["hidden"]
    if attention:
        maps = distillation.over_layers(
            distillation.attention_maps, mine[MAPS], theirs[MAPS]
        )
        metrics["attention"] = maps.mean()
        total += config.attention_weight * metrics["attention"]
    return total, metrics


def objective(row: str, config: Config, student: Any, teacher: Any, bound: Any) -> Any:
    """Make the loss function of a row of the table."""
    if row == "hard":
        return distillation.hard_labels(Apply(student))
    if row == "soft":
        return distillation.soft_labels(Apply(student), Apply(teacher), bound)
    watched = (x.clone(sow_intermediates=True) for x in (student, teacher))
    loss = functools.partial(inner_loss, *watched, config, "attention" in row)
    return jax.tree_util.Partial(loss, bound)


def run(config: Config) -> list[dict[str, Any]]:
    """Train a student by each objective; a row for each, untrained first."""
    if config.fast:
        config = dataclasses.replace(
            config, steps=3, batch=2, tokens=32, windows=2, rows="soft"
        )
    teacher, params, tokenizer = jc.models.load("reference", scan=True)
    student, start = jc.models.fewer_layers(teacher, params, config.every)
    text = training_tokens(tokenizer, TEXT // (40 if config.fast else 1))
    ids = tokenizer.encode(heldout_text())
    heldout = windows(
        ids, 256, 4, token_bytes=tokenizer.token_bytes(ids), limit=config.windows
    )
    results = Results(
        config,
        layers=student.layers,
        weights=reporting.weight_count(start),
        teacher_weights=reporting.weight_count(params),
        tokens_per_step=config.batch * config.tokens,
        seed=config.seed,
        rate=config.rate,
    )

    def add(name: str, small: Any, steps: int, seconds: float) -> None:
        report = jc.compare(
            Apply(teacher), params, small, heldout, small_apply_fn=Apply(student)
        )
        row = {
            "row": name,
            "steps": steps,
            "loss": report.small.loss,
            "bits_per_byte": report.small.bits_per_byte,
            "kl": report.kl,
            "kl_standard_error": report.kl_standard_error,
            "teacher_loss": report.dense.loss,
            "teacher_bits_per_byte": report.dense.bits_per_byte,
            "heldout_tokens": report.tokens,
            "processor_seconds": seconds,
        }
        results.add(row)

    add("before training", start, 0, 0.0)
    for row in config.rows.split(","):
        optimizer = optax.adam(optax.linear_schedule(config.rate, 0.0, config.steps))
        step = jc.make_train_step(
            objective(row, config, student, teacher, params), optimizer
        )
        state = distillation.init_state(start, optimizer, key=jax.random.key(0))
        clock = time.process_time()

        def say(number: int, metrics: dict[str, float]) -> None:
            if number % 20 == 0:
                brief = {k: round(x, 4) for k, x in metrics.items()}
                print(number, brief, flush=True)

        state = distillation.train(
            step,
            state,
            lambda number: batch_at(
                number, text, config.tokens, config.batch, config.seed
            ),
            steps=config.steps,
            folder=Path(config.folder) / row if config.folder else None,
            every=25,
            report=say,
        )
        jax.block_until_ready(state)
        add(row, state.params, config.steps, time.process_time() - clock)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

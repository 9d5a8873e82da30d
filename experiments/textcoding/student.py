"""How fast is a small model, and how small does it make text?

Keeps the layers of the reference model that serve best without the others, trains them
on the teacher's predictions of its own training text, and writes the student with its
tokenizer (`--output`). `experiments.textcoding.rates` measures it.

    python -m experiments.textcoding.student --output student.safetensors
"""

import dataclasses
import itertools
import time
from typing import Any

import jax
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import batch_at, training_tokens
from experiments.models import train_reference
from jaxcompress import distillation, reporting
from jaxcompress.evaluation import Apply, windows
from jaxcompress.models.bundled_text import heldout_text


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 3  # that are kept
    steps: int = 1000
    tokens: int = 256  # in a window
    batch: int = 4  # windows in a step
    rate: float = 0.01  # of Muon, falling linearly to zero
    text_bytes: int = 6_000_000  # bytes of training text
    windows: int = 48  # of held-out text, 256 tokens each
    output: str = "student.safetensors"
    fast: bool = False  # three steps
    results: str = "experiments/textcoding/results/student.jsonl"


def keep_layers(model: Any, params: Any, kept: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the model of these layers alone."""
    small = {k: v for k, v in params.items() if not k.startswith("layer_")}
    small |= {f"layer_{new}": params[f"layer_{old}"] for new, old in enumerate(kept)}
    return model.clone(layers=len(kept)), small


def choose_layers(model: Any, params: Any, count: int, tokens: Any) -> tuple[int, ...]:
    """Return the layers of smallest loss on tokens `[B, T]`."""
    small = keep_layers(model, params, tuple(range(count)))[0]

    @jax.jit
    def loss(params: Any) -> jax.Array:
        logits = small.apply({"params": params}, tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        ).mean()

    choices = itertools.combinations(range(model.layers), count)
    return min(
        choices, key=lambda kept: float(loss(keep_layers(model, params, kept)[1]))
    )


def run(config: Config) -> list[dict[str, Any]]:
    """Distil the student; rows before and after."""
    if config.fast:
        config = dataclasses.replace(
            config, steps=3, batch=2, tokens=32, windows=2, text_bytes=40_000, layers=1
        )
    clock = time.process_time()
    teacher, params, tokenizer = jc.models.load("reference", scan=False)
    text = training_tokens(tokenizer, config.text_bytes)

    def batches(number: int) -> Any:
        return batch_at(number, text, config.tokens, config.batch, 0)

    first = np.asarray(batches(0)["tokens"])
    kept = choose_layers(teacher, params, config.layers, first)
    student, start = keep_layers(teacher, params, kept)
    ids = tokenizer.encode(heldout_text())
    heldout = windows(
        ids, 256, 4, token_bytes=tokenizer.token_bytes(ids), limit=config.windows
    )
    results = Results(
        config,
        experiment="student",
        layers=list(kept),
        weights=reporting.weight_count(start),
        tokens_per_step=config.batch * config.tokens,
    )

    def add(small: Any, steps: int) -> None:
        report = jc.compare(
            Apply(teacher), params, small, heldout, small_apply_fn=Apply(student)
        )
        results.add(
            {
                "steps": steps,
                "bits_per_byte": report.small.bits_per_byte,
                "kl": report.kl,
                "teacher_bits_per_byte": report.dense.bits_per_byte,
                "processor_seconds": time.process_time() - clock,
            }
        )

    add(start, 0)
    optimizer = optax.chain(
        train_reference.make_optimizer(train_reference.Config()),
        optax.scale_by_schedule(optax.linear_schedule(config.rate, 0.0, config.steps)),
    )
    loss = distillation.soft_labels(Apply(student), Apply(teacher), params)
    step = jc.make_train_step(loss, optimizer)
    state = distillation.init_state(start, optimizer, key=jax.random.key(0))

    def say(number: int, metrics: dict[str, float]) -> None:
        if number % 20 == 0:
            seconds = time.process_time() - clock
            print(number, metrics, f"{seconds:.0f} s", flush=True)

    state = distillation.train(step, state, batches, steps=config.steps, report=say)
    add(state.params, config.steps)
    jc.models.save(config.output, student, state.params, tokenizer)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

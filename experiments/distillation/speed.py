"""What does a step of distillation cost beside one of plain training?

A student of half the layers of the reference model: processor time of a step with
labels, with the teacher in the same step, with a cached teacher, with hidden states and
attention maps too, in turns in one process. Then the same steps on one device and on
two fake ones, and how far their losses are apart. One JSON line per row:

    python -m experiments.distillation.speed
"""

import dataclasses
import os
import time
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import numpy as np
import optax
from jax.sharding import AxisType

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import batch_at, training_tokens
from experiments.distillation.depth import Config as DepthConfig
from experiments.distillation.depth import objective
from jaxcompress import distillation
from jaxcompress.evaluation import Apply

KINDS = ("hard", "soft", "cached", "soft+hidden", "soft+hidden+attention")


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 7
    batch: int = 4
    tokens: int = 128
    kept: int = 16  # of the cached teacher's tokens
    steps: int = 5  # on one and on two devices
    fast: bool = False  # one round, two kinds, short texts
    results: str = "experiments/distillation/results/speed.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Time each kind of step, then compare devices; a row for each."""
    kinds = KINDS
    if config.fast:
        config = dataclasses.replace(config, rounds=1, batch=2, tokens=16, steps=2)
        kinds = KINDS[:2]
    teacher, params, tokenizer = jc.models.load("reference", scan=True)
    student, start = jc.models.fewer_layers(teacher, params, 2)
    text = training_tokens(tokenizer, 100_000)

    def batch(step: int) -> dict[str, np.ndarray]:
        return batch_at(step, text, config.tokens, config.batch, 0)

    optimizer = optax.adam(1e-3)
    cached = distillation.top_k(
        Apply(teacher)(params, batch(0)["tokens"])[:, :-1], config.kept
    )
    steps, states, batches = {}, {}, {}
    for kind in kinds:
        loss = (
            distillation.cached_labels(Apply(student))
            if kind == "cached"
            else objective(kind, DepthConfig(), student, teacher, params)
        )
        steps[kind] = jc.make_train_step(loss, optimizer)
        states[kind] = distillation.init_state(start, optimizer, key=jax.random.key(0))
        batches[kind] = batch(0) | ({"teacher": cached} if kind == "cached" else {})
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(config.rounds + 1):  # the first compiles
        for kind in kinds:
            clock = time.process_time()
            states[kind], _ = steps[kind](states[kind], batches[kind])
            jax.block_until_ready(states[kind])
            if turn:
                times[kind].append(time.process_time() - clock)
    results = Results(
        config,
        tokens_per_step=config.batch * config.tokens,
        student_layers=student.layers,
        teacher_layers=teacher.layers,
    )
    labels = np.array(times[kinds[0]])
    for kind in kinds:
        results.add(
            {
                "row": kind,
                "processor_seconds": float(np.median(times[kind])),
                "ratio": float(np.median(np.array(times[kind]) / labels)),
                "rounds": config.rounds,
            }
        )
    loss = objective("soft", DepthConfig(), student, teacher, params)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    one = distillation.init_state(start, optimizer, key=jax.random.key(0))
    for axis, name in ((None, "copied"), ("data", "sharded")):
        two = distillation.place(
            distillation.init_state(start, optimizer, key=jax.random.key(0)),
            mesh,
            axis=axis,
        )
        one = distillation.init_state(start, optimizer, key=jax.random.key(0))
        step = jc.make_train_step(loss, optimizer)
        apart = []
        for number in range(config.steps):
            one, first = steps["soft"](one, batch(number))
            two, second = step(two, distillation.shard_batch(batch(number), mesh))
            jax.block_until_ready(two)
            first, second = float(first["loss"]), float(second["loss"])
            apart.append(abs(second - first) / first)
        results.add(
            {
                "row": f"one device against two, parameters {name}",
                "steps": config.steps,
                "largest_relative_difference_of_losses": max(apart),
            }
        )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

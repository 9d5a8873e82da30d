"""What is gained where levels move after, or while, a model is coded?

The linear layers by planned `rate_distortion`, then each way to change levels at the
same coded size: divergence on the end of the bundled text and on other texts, by
window, so that differences have paired errors. One JSON line per row and text; rows
that the results hold are left out:

    python -m experiments.rate_distortion.levels --also docstrings,plays

A variant is stages joined by ", "; N is a number of training steps:

- `coded`: as planned, without shrinkage; `shrunk`: with that of 0.1.
- `tuned N`: steps and norms trained, levels held.
- `in turn N`: one kernel of all layers after the other is coded, and those that are not
  coded yet are trained in between to compensate.
- `alternating N`: latent weights are trained through the quantizer's errors, held
  fixed, and all are coded again towards them; twice.
- `walks N`: trellis walks with the largest predicted gain are changed, a small share at
  a time, where the divergence on held-out windows falls.
- `curvatures again`: measured on the coded model, then plan and coding again.
- `drift 0.5`: targets half of the way to the original outputs, block by block; "shrunk
  drift 0.5" with shrinkage.
"""

import dataclasses
import functools
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load
from experiments.common.results import Results
from experiments.common.texts import cut, digest, split
from experiments.common.timing import Clock
from experiments.quantization import calibrated
from experiments.rate_distortion import walks
from experiments.rate_distortion.models import KERNELS, SIDE, looped_moments
from jaxcompress import distillation
from jaxcompress.evaluation import Apply
from jaxcompress.models.stacking import stack_layers
from jaxcompress.running.decode_once import code_again, decode_once
from jaxcompress.shrinking.fitting import replace_roots
from jaxcompress.tree.paths import roots

SHRINKAGE = 0.1
KINDS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    rates: str = "2.05"
    variants: str = "coded;tuned 192;in turn 64, tuned 128"
    states: int = 32
    calibration: int = 96  # windows
    curvature: int = 96  # sequences of 128 tokens
    tokens: int = 256  # in a window
    windows: int = 64  # of each text, at most
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    batch: int = 2  # windows in a step
    rate: float = 1e-3  # of dense weights, relative to their size
    seed: int = 0  # draws the windows, the curvatures and the training
    fast: bool = False  # few tokens and states
    results: str = "experiments/rate_distortion/results/levels.jsonl"


@dataclasses.dataclass(frozen=True)
class Task:
    """What all variants start from."""

    config: Config
    original: Any
    moments: Mapping[str, jc.Moments]
    layouts: Mapping[str, Any]
    windows: np.ndarray

    @property
    def dense(self) -> Any:
        return self.original.dense

    @functools.cached_property
    def apply(self) -> Any:
        return Apply(self.original.scanned)

    @functools.cached_property
    def divergence(self) -> Any:
        """The function of teacher, parameters and tokens, to each window's mean."""

        def nats(teacher: Any, params: Any, tokens: jax.Array) -> jax.Array:
            return walks.mean_nats(self.apply, teacher, params, tokens, axis=1)

        return jax.jit(nats)

    def batches(self) -> list[dict[str, Any]]:
        size = self.config.batch
        count = len(self.windows) // size * size
        return [{"tokens": self.windows[i : i + size]} for i in range(0, count, size)]

    def code(self, name: str, value: Any, method: str) -> Any:
        """Code one leaf as the plan says, towards other weights."""
        rule = [(re.escape(name), method)]
        moments = {name: self.moments[name]}
        layouts = {name: self.layouts[name]}
        return jc.compress({name: value}, rule, moments, layouts=layouts)[name]


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rates and variants that the results lack; a row for each text."""
    if config.fast:
        config = dataclasses.replace(
            config,
            variants="coded;tuned 8;in turn 6, tuned 8",
            states=8,
            calibration=8,
            curvature=8,
            windows=4,
        )
    original = load(config.model)
    parts = split(config.text, also=config.also, fraction=config.fraction, packaged=0.2)
    measured = {
        name: cut(original.tokenizer, text, tokens=config.tokens, limit=config.windows)
        for name, text in parts.measured.items()
    }
    task = prepare(config, original, parts.calibration)
    results = Results(config, hide=("windows",), model=original.name)
    for rate in map(float, config.rates.split(",")):
        held: dict[str, Any] = {}
        for variant in config.variants.split(";"):
            label = {"variant": variant, "rate": rate, "seed": config.seed}
            if results.holds(model=original.name, **label):
                continue
            clock, looped = Clock(), "drift" in variant
            small = make(task, variant, rate, held)
            steps = sum(map(int, re.findall(r"(?<=[a-z] )[0-9]+(?![.0-9])", variant)))
            about = {
                "processor_seconds": clock.processor_seconds,  # what is held is free
                "training_tokens": steps * config.batch * config.tokens,
                "calibration_tokens": task.windows.size,
                "states": config.states,
            }
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "small.safetensors"
                model = original.model if looped else original.scanned
                jc.models.save(path, model, small, original.tokenizer, {})
                loaded = jc.models.load(path)[1]
                about |= calibrated.stored(path, loaded)
            ready = jax.jit(jc.materialize)(loaded)
            ready = stack_layers(ready) if looped else ready
            for text, batches in measured.items():
                full = [x["tokens"] for x in batches if x["mask"][0, 1:].all()]
                nats = walks.divergences(task, ready, np.concatenate(full))
                found = {
                    "kl": float(nats.mean()),
                    "kl_standard_error": float(nats.std(ddof=1) / nats.size**0.5),
                    "windows": [float(f"{x:.5g}") for x in nats],
                }
                which = {"text": text, "digest": digest(parts.measured[text])}
                results.add({**label, **which, **found, **about})
    return results.rows


def prepare(config: Config, original: Any, text: str) -> Task:
    """Draw windows of the text, and measure moments and curvatures on them."""
    ids = np.asarray(original.tokenizer.encode(text), np.int32)
    rows = ids[: ids.size // config.tokens * config.tokens].reshape(-1, config.tokens)
    draw = np.random.default_rng(config.seed).permutation(len(rows))
    rows = rows[draw[: config.calibration]]
    model, params = original.scanned, original.dense
    batches = [{"tokens": rows[i : i + 8]} for i in range(0, len(rows), 8)]
    layouts = jc.find_layouts(model, params, {"tokens": rows[:1]})
    moments = jc.collect_moments(model, params, batches)
    task = Task(config, original, moments, layouts, rows)
    return dataclasses.replace(task, moments=with_curvatures(task, params, 0))


def with_curvatures(task: Task, params: Any, fold: int) -> dict[str, jc.Moments]:
    """Measure curvatures of these parameters."""
    ids = task.windows.reshape(-1, 128)
    ids = ids[:: max(1, len(ids) // task.config.curvature)][: task.config.curvature]
    return jc.measure_curvatures(
        task.apply,
        params,
        [{"tokens": ids}],
        task.moments,
        layouts=task.layouts,
        key=jax.random.fold_in(jax.random.key(task.config.seed), fold),
    )


def plan(
    task: Task,
    moments: Mapping[str, jc.Moments],
    rate: float,
    looped: bool = False,
    shrinkage: float = 0.0,
) -> list[Any]:
    """Share a rate out over the linear layers."""
    return jc.planning.plan_rates(
        task.original.params if looped else task.dense,
        looped_moments(moments) if looped else moments,
        bits_per_weight=rate,
        layouts=None if looped else task.layouts,
        where=KERNELS,
        states=task.config.states,
        shrinkage=shrinkage,
    )


def make(task: Task, variant: str, rate: float, held: dict[str, Any]) -> Any:
    """Return the compressed tree of a variant; `held` has the trees of others."""
    if variant in held:
        return held[variant]
    base, _, last = variant.rpartition(", ")
    stage, _, number = last.removeprefix("shrunk ").rpartition(" ")
    shrinkage = SHRINKAGE if "shrunk" in last else 0.0
    rules = plan(task, task.moments, rate, shrinkage=shrinkage)
    original = task.original
    if stage == "in turn":
        small = in_turn(task, rules, int(number))
    elif stage == "drift":
        small = jc.compress_blockwise(
            original.model,
            original.params,
            plan(task, task.moments, rate, looped=True, shrinkage=shrinkage),
            [{"tokens": x} for x in task.windows.reshape(-1, 8, task.config.tokens)],
            moments=looped_moments(task.moments),
            drift=float(number),
        )
    elif last in ("coded", "shrunk"):
        small = jc.compress(task.dense, rules, task.moments, layouts=task.layouts)
    else:
        start = make(task, base or "coded", rate, held)
        if stage == "tuned":
            small = tune(task, start, int(number))
        elif stage == "alternating":
            small = alternate(task, rules, start, int(number))
        elif stage == "walks":
            small = walks.change_walks(task, start, int(number))
        elif last == "curvatures again":
            moments = with_curvatures(task, jc.materialize(start), 1)
            rules = plan(task, moments, rate)
            small = jc.compress(task.dense, rules, moments, layouts=task.layouts)
        else:
            raise ValueError(f"unknown variant {variant!r}")
    held[variant] = small
    return small


def tune(task: Task, small: Any, steps: int) -> Any:
    """Train steps and norms towards the predictions; levels stay."""
    looped = "layers" not in small
    apply = Apply(task.original.model) if looped else task.apply
    teacher = task.original.params if looped else task.dense
    pattern = SIDE.replace("layers/", "layer.*/") if looped else SIDE
    inner = jc.optimizers.relative_adam(3e-3, steps)
    optimizer = jc.optimizers.by_name([(pattern, inner), (".*", None)])
    start, batches = decode_once(small), task.batches()

    def loss(teacher: Any, params: Any, batch: Any, key: jax.Array) -> Any:
        return walks.mean_nats(apply, teacher, params, batch["tokens"], None), {}

    state = distillation.train(
        jc.make_train_step(jax.tree_util.Partial(loss, teacher), optimizer),
        distillation.init_state(
            start, optimizer, dtype=jnp.float32, key=jax.random.key(task.config.seed)
        ),
        lambda number: batches[number % len(batches)],
        steps=steps,
    )
    return code_again(distillation.cast_like(state.params, start), small)


class Trainer:
    """Trains the dense weights that are free; one compilation for any choice."""

    def __init__(self, task: Task) -> None:
        self.task, self.number, self.batches = task, 0, task.batches()
        self.optimizer = optax.scale_by_adam(b2=0.99)

        @jax.jit
        def step(params: Any, state: Any, rates: Any, tokens: jax.Array) -> Any:
            gradients = jax.grad(
                lambda p: walks.mean_nats(task.apply, task.dense, p, tokens, None)
            )(params)
            moved, state = self.optimizer.update(gradients, state)
            return jax.tree.map(lambda p, m, r: p - r * m, params, moved, rates), state

        self.step = step

    def train(self, params: Any, free: set[str], steps: int) -> Any:
        """Take steps on the leaves of these names, at a rate relative to their size."""
        state = self.optimizer.init(params)
        rates = {
            name: self.task.config.rate * jnp.sqrt(jnp.square(x).mean())
            if name in free
            else jnp.float32(0)
            for name, x in roots(params)
        }
        for _ in range(steps):
            tokens = self.batches[self.number % len(self.batches)]["tokens"]
            rates_tree = replace_roots(params, rates)
            params, state = self.step(params, state, rates_tree, tokens)
            self.number += 1
        return params


def methods_of(rules: Sequence[Any]) -> dict[str, str]:
    """Return the method of each name."""
    return {re.sub(r"\\(.)", r"\1", name): method for name, method in rules}


def in_turn(task: Task, rules: Sequence[Any], steps: int) -> Any:
    """Code one kernel after the other, and train the rest in between."""
    methods = methods_of(rules)
    names = sorted(methods, key=lambda name: KINDS.index(name.split("/")[-2]))
    free = set(names) | {n for n, _ in roots(task.dense) if re.fullmatch(SIDE, n)}
    params, trainer, coded = task.dense, Trainer(task), {}
    for i, name in enumerate(names):
        if i:
            params = trainer.train(params, free, steps // (len(names) - 1))
        coded[name] = task.code(name, dict(roots(params))[name], methods[name])
        free -= {name}
        params = replace_roots(params, {name: coded[name].materialize()})
    return replace_roots(params, coded)


def alternate(task: Task, rules: Sequence[Any], small: Any, steps: int) -> Any:
    """Train latent weights under fixed errors of the quantizer, and code them again."""
    methods = methods_of(rules)
    latent = {n: x for n, x in roots(task.dense) if n in methods}
    trainer = Trainer(task)
    for _ in range(2):
        before = jc.materialize(small)
        after = dict(roots(trainer.train(before, set(methods), steps // 2)))
        start = dict(roots(before))
        latent = {n: x + after[n] - start[n] for n, x in latent.items()}
        coded = {n: task.code(n, x, methods[n]) for n, x in latent.items()}
        small = replace_roots(small, coded)
    return small


if __name__ == "__main__":
    run(parse(Config, __doc__))

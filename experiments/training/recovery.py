"""How much of what compression lost does distillation bring back?

Starts from what the best method after training leaves of the reference model (kernels
of the layers at 2 bits, in codes of one width or in coded levels; half of the weights
at zero; a fifth of the neurons removed; thin factors of eight tenths of the weights),
or of a model and text that are given (2 bits), and trains it towards the float model's
predictions: the side parameters only (scales, zero points, steps and norms; codes
fixed), or all parameters of the layers, quantized weights through the rounding. The
embedding stays. Measured on text not trained on, and on docstrings: divergence from the
float model before and after, and the part of it that came back, for each seed of the
batches. One JSON line per row, appended as it is done; rows that the results hold
already are not run again:

    python -m experiments.training.recovery
    python -m experiments.training.recovery SmolLM2.gguf text.txt \\
        --batch 1 --steps 64 --only "2 bits coded, side"
"""

import dataclasses
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import batch_at, cut, split, training_tokens
from experiments.pruning import pruned
from jaxcompress import distillation, models
from jaxcompress.evaluation import Apply
from jaxcompress.running.decode_once import code_again, decode_once

KERNELS = pruned.KERNELS
READERS = r"layer_\d+/mlp/down_proj/kernel"
SIDE = r".*(scale|zero_point|steps)"  # of quantized kernels, and of norms
ROWS = (
    "2 bits, side",
    "2 bits, all",
    "2 bits coded, side",
    "half of the weights, all",
    "four fifths of the neurons, all",
    "rank, all",
)
STARTS = {  # the methods to choose the best from, for as many bytes
    "2 bits": (
        "gptq(bits=2, block=64, grid='asymmetric')",
        "learned(bits=2, block=64, grid='asymmetric', steps=40)",
    ),
    "half of the weights": ("alps(sparsity=0.5)",),
}


@dataclasses.dataclass(frozen=True)
class Config(pruned.Config):
    steps: int = 240
    batch: int = 4  # windows in a step
    rate: float = 5e-4  # of Adam, falling linearly to zero
    side_rate: float = 1e-3  # on scales and norms, alone
    coded_rate: float = 3e-3  # the same beside coded levels, relative to their size
    step_rate: float = 5e-5  # on scales and norms, while weights train
    seeds: int = 3
    folder: str = ""  # for checkpoints
    results: str = "experiments/training/results/recovery.jsonl"


def start_of(
    kind: str, model: Any, params: Any, moments: Any, seen: Any, measure: Any
) -> tuple[Any, Any, str]:
    """Compress by the best method: the model, its parameters, and the recipe."""
    if kind == "four fifths of the neurons":
        groups = models.neuron_groups(model)
        scores = jc.structured.score_units(moments, groups, params=params)
        keep = jc.structured.choose_units(scores, 0.2, scope="group")
        small = jc.structured.remove_units(params, groups, keep, moments)
        return models.resized(model, small), small, "remove_units, by loss"
    if kind in ("rank", "2 bits coded"):
        curved = pruned.curved(model, params, seen, moments, KERNELS)
    if kind == "2 bits coded":
        plan = jc.planning.plan_rates(
            params, curved, bits_per_weight=2.25, where=KERNELS
        )
        return model, jc.compress(params, plan, curved), "plan_rates(rate=2.25)"
    if kind == "rank":
        options = {"moments": curved, "where": KERNELS}
        plan = jc.planning.plan_ranks(params, fraction=0.8, **options)
        return model, jc.compress(params, plan, curved), "plan_ranks, curvatures"
    found = []
    for method in STARTS[kind]:
        small = jc.compress(params, [(KERNELS, method)], moments)
        # Layers are alike still: one compilation of a layer serves all.
        small, scanned = models.stack_layers(small), model.clone(scan=True)
        found.append((measure(scanned, small).kl, scanned, small, method))
        print(method, found[-1][0], flush=True)
    return min(found, key=lambda each: each[0])[1:]


def optimizer_of(way: str, config: Config) -> optax.GradientTransformation:
    """Make the optimizer of what a row trains."""

    def adam(rate: float) -> optax.GradientTransformation:
        return optax.adam(optax.linear_schedule(rate, 0.0, config.steps))

    if way == "coded side":
        rate = optax.linear_schedule(config.coded_rate, 0.0, config.steps)
        rules = [(SIDE, jc.optimizers.relative(optax.adam(rate))), (".*", None)]
    elif way == "side":
        rules = [(SIDE, adam(config.side_rate)), (".*", None)]
    else:
        side = (SIDE, adam(config.step_rate))
        rules = [("embed.*", None), side, (".*", adam(config.rate))]
    return jc.optimizers.by_name(rules)


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rows that the results lack, in order."""
    if config.fast:
        config = dataclasses.replace(
            config, steps=2, batch=2, tokens=32, calibration=4, windows=2, seeds=1
        )
    name = Path(config.model).name
    tokens = config.steps * config.batch * config.tokens
    results = Results(config)
    todo = [
        (row, seed)
        for row in (ROWS[:1] if config.fast and not config.only else ROWS)
        for seed in range(config.seeds)
        if config.only in row
        and not results.holds(model=name, row=row, seed=seed, training_tokens=tokens)
    ]
    if not todo:
        return []
    model, params, tokenizer = models.load(config.model, scan=False)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    parts = split(config.text, fraction=config.fraction)
    if config.text:
        text = np.asarray(tokenizer.encode(parts.calibration), np.int32)
    else:
        text = training_tokens(tokenizer, 50_000 if config.fast else 2_000_000)
    heldout, other = (
        cut(tokenizer, each, tokens=config.tokens, limit=config.windows, batch=2)
        for each in parts.measured.values()
    )
    seen = text[: config.calibration // 2 * 2 * config.tokens]
    seen = seen.reshape(-1, 2, config.tokens)
    scanned, stacked = model.clone(scan=True), models.stack_layers(params)
    teach = Apply(scanned)

    def measure(less: Any, small: Any, batches: Any = heldout) -> Any:
        ready = jax.jit(jc.materialize)(small)
        return jc.compare(teach, stacked, ready, batches, small_apply_fn=Apply(less))

    made: dict[str, Any] = {}
    for row, seed in todo:
        kind, way = row.rsplit(", ", 1)
        if kind not in made:
            select = READERS if "neurons" in kind else KERNELS
            moments = jc.collect_moments(model, params, seen, where=select)
            less, small, recipe = start_of(kind, model, params, moments, seen, measure)
            reports = measure(less, small), measure(less, small, other)
            made = {kind: (less, small, recipe, *reports)}
        less, start, recipe, before, before_other = made[kind]
        tree = start
        if way == "all" and kind == "2 bits":
            tree = jc.qat.prepare(lambda _, small=start: small)(stacked)
        coded = kind == "2 bits coded"
        if coded:
            tree = decode_once(start)
        optimizer = optimizer_of(f"coded {way}" if coded else way, config)
        loss = distillation.soft_labels(Apply(less), teach, stacked)
        clock = time.process_time()
        key = jax.random.key(seed)
        state = distillation.train(
            jc.make_train_step(loss, optimizer),
            distillation.init_state(tree, optimizer, dtype=jnp.float32, key=key),
            functools.partial(
                batch_at,
                tokens=text,
                length=config.tokens,
                batch=config.batch,
                seed=seed,
            ),
            steps=config.steps,
            folder=Path(config.folder) / row / str(seed) if config.folder else None,
            every=40,
            report=lambda number, metrics: (
                print(number, round(metrics["loss"], 4), flush=True)
                if number % 20 == 0
                else None
            ),
        )
        seconds = time.process_time() - clock
        small = jc.qat.convert(distillation.cast_like(state.params, tree))
        small = code_again(small, start) if coded else small
        after, after_other = measure(less, small), measure(less, small, other)
        back = (before.kl - after.kl) / before.kl
        results.add(
            {
                "model": name,
                "row": row,
                "seed": seed,
                "recipe": recipe,
                "bytes": jc.nbytes(small),
                "bytes_before": jc.nbytes(start),
                "dense_bytes": jc.nbytes(params),
                "file_bytes": file_bytes(small),
                "file_bytes_before": file_bytes(start),
                "kl_before": before.kl,
                "kl_after": after.kl,
                "kl_standard_error": after.kl_standard_error,
                "perplexity_before": before.small.perplexity,
                "perplexity_after": after.small.perplexity,
                "dense_perplexity": before.dense.perplexity,
                "fraction_recovered": back,
                "fraction_per_million_tokens": back / tokens * 1e6,
                "docstrings_kl_before": before_other.kl,
                "docstrings_kl_after": after_other.kl,
                "training_tokens": tokens,
                "calibration_tokens": seen.size,
                "tokens": after.tokens,
                "rates": [
                    config.rate,
                    config.side_rate,
                    config.step_rate,
                    config.coded_rate,
                ],
                "processor_seconds": seconds,
            }
        )
    return results.rows


def file_bytes(params: Any) -> int:
    """Count the bytes of the file of a tree."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        jc.save(path, params)
        return path.stat().st_size


if __name__ == "__main__":
    run(parse(Config, __doc__))

"""What are codes at the rate-distortion bound worth on a model?

File bytes and quality on the end of a text and on a second text, by rate and by what
is switched on; a variant that is a method is taken as it stands, at rate 0. One JSON
line per row; rows that are there are left out:

    python -m experiments.rate_distortion.models SmolLM2.gguf text.txt --rates 3.05,2.05
    python -m experiments.rate_distortion.models SmolLM2.gguf text.txt --rates 0 \\
        --variants "gptq(bits=3, block=128, grid='asymmetric')"
"""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load, quality
from experiments.common.results import Results
from experiments.common.timing import Clock
from experiments.quantization import calibrated
from jaxcompress import distillation, reporting
from jaxcompress.evaluation import Apply
from jaxcompress.running.decode_once import code_again, decode_once
from jaxcompress.tree.equality import same_bits

KERNELS = r".*layer.*kernel"
SHRINKAGE = 0.1
SIDE = r"layers/.*(steps|scale)"  # of rows, and of norms
VARIANTS = (
    "rounding",  # equal rates
    "trellis",
    "by leaf",  # a rate for each
    "planned, apart",  # and outputs that do more coded finer
    "planned, apart, shrunk",  # and correlations weakened
    "planned",  # and errors fed from output to output
    "planned, blockwise",
    "planned, apart, blockwise, drift 0.5",
    "planned, tuned",
)


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    rates: str = "4.05,3.05,2.55,2.05,1.6"
    variants: str = ";".join(VARIANTS)
    states: int = 128
    embedding: float = 0.0  # rate of the embedding; 0: left as it is; -1: planned too
    calibration: int = 64  # windows
    curvature: int = 96  # windows of 128 tokens
    windows: int = 8  # of each text
    tokens: int = 512  # in a window
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    tuning: int = 64  # windows to tune on, one in a step
    tuning_rate: float = 3e-3
    cache: str = ""  # directory for moments
    fast: bool = False  # the reference model and little text
    results: str = "experiments/rate_distortion/results/models.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rates and variants that the results lack; a row for each text."""
    if config.fast:
        config = dataclasses.replace(
            config,
            model="reference",
            rates="2.05",
            variants="planned;planned, tuned",
            states=8,
            calibration=8,
            curvature=4,
            windows=2,
            tokens=256,
            tuning=4,
        )
    original = load(config.model)
    model, params, tokenizer = original.model, original.params, original.tokenizer
    scanned, dense = original.scanned, original.dense
    calibration, batches = calibrated.texts(config, tokenizer)
    results, clock = Results(config), Clock()
    plain = stack(calibrated.one_shot(config, model, params, calibration))
    measuring = {"moments_seconds": clock.seconds}
    layout = jc.find_layouts(scanned, dense, calibration[0][:1])
    pattern = KERNELS if config.embedding >= 0 else None
    measured, clock = plain, Clock()
    if "planned" in config.variants or "by leaf" in config.variants:
        measured = with_curvatures(config, scanned, dense, plain, calibration, layout)
        measuring["curvature_seconds"] = clock.seconds
    apart = {
        name: dataclasses.replace(x, joint_curvatures=None)
        for name, x in measured.items()
    }
    by_leaf = {name: averaged(x) for name, x in apart.items()}
    latest: Any = None  # what was compressed last, and the time it took
    for rate in map(float, config.rates.split(",")):
        for variant in config.variants.split(";"):
            fixed = "(" in variant
            label = {
                "model": Path(config.model).name,
                "variant": variant,
                "rate": rate,
                "embedding": config.embedding,
                "states": 0 if variant == "rounding" or fixed else config.states,
                "calibration_tokens": config.calibration * config.tokens,
            }
            if results.holds(**label):
                continue
            looped = fixed or "blockwise" in variant
            planned = variant.startswith(("planned", "by leaf"))
            known_of = plain
            if planned:
                known_of = by_leaf if variant.startswith("by leaf") else measured
                known_of = apart if "apart" in variant else known_of
            if looped:
                known_of = looped_moments(known_of)
            tree = params if looped else dense
            shrinkage = SHRINKAGE if "shrunk" in variant else 0.0
            options = f"states={label['states']}, shrinkage={shrinkage}"
            method = f"rate_distortion(rate={rate}, {options})"
            recipe: list[Any] = [(KERNELS, variant if fixed else method)]
            clock = Clock()
            base = variant.removesuffix(", tuned")
            if latest is None or latest[0] != (base, rate):
                latest = None
                if planned:
                    recipe = jc.planning.plan_rates(
                        tree,
                        known_of,
                        bits_per_weight=rate,
                        layouts=None if looped else layout,
                        where=pattern,
                        states=config.states,
                        shrinkage=shrinkage,
                    )
                if config.embedding > 0:
                    method = f"rate_distortion(rate={config.embedding}, {options})"
                    recipe.append((".*embedding", method))
                drift = re.search(r"drift ([\d.]+)", variant)
                if "blockwise" in variant:
                    small = jc.compress_blockwise(
                        model,
                        params,
                        recipe,
                        calibration,
                        moments=known_of,
                        drift=float(drift[1]) if drift else 0.0,
                        progress=True,
                    )
                else:
                    small = jc.compress(
                        tree,
                        recipe,
                        known_of,
                        layouts=None if looped else layout,
                        progress=lambda names: reporting.track(names, "compressing"),
                    )
                before = clock.seconds, clock.processor_seconds
                latest = (base, rate), small, before
                clock = Clock()
            _, small, before = latest
            if variant != base:
                small = tuned(config, scanned, dense, small, calibration)
            took = {
                "curvature_tokens": config.curvature * 128 if planned else 0,
                "compress_seconds": before[0] + clock.seconds,
                "compress_processor_seconds": before[1] + clock.processor_seconds,
            }
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "small.safetensors"
                jc.models.save(path, model if looped else scanned, small, tokenizer, {})
                clock = Clock()
                loaded = jc.models.load(path)[1]
                took["load_seconds"] = clock.seconds
                if not same_bits(small, loaded):
                    raise ValueError("the file did not come back bit for bit")
                sizes = calibrated.stored(path, loaded)
            clock = Clock()
            ready = jax.block_until_ready(jc.materialize(loaded))
            took["decode_seconds"] = clock.seconds
            took["decode_processor_seconds"] = clock.processor_seconds
            if looped:
                ready = jc.models.stack_layers(ready)
            more = sizes | took | ({} if config.cache else measuring)
            compared(results, label, scanned, dense, ready, batches, more)
    return results.rows


def compared(
    results: Results,
    label: dict[str, Any],
    model: Any,
    dense: Any,
    ready: Any,
    batches: dict[str, list],
    more: dict[str, Any],
) -> None:
    """Add a row for each text."""
    for text, each in batches.items():
        each = reporting.track(each, label["variant"])
        found = jc.compare(Apply(model), dense, ready, each)
        peak = {"peak_bytes": reporting.peak_memory()}
        results.add({**label, "text": text, **quality(found), **more, **peak})


def stack(moments: dict[str, jc.Moments]) -> dict[str, jc.Moments]:
    """Stack moments of the looped model as those of the scanned one."""
    places: dict[str, dict[int, str]] = {}
    for name in moments:
        found = re.match(r"layer_(\d+)/", name)
        if found:
            number = int(found[1])
            places.setdefault(f"layers/{name[found.end() :]}", {})[number] = name
    whole = {name: x for name, x in moments.items() if not name.startswith("layer_")}
    for name, layers in places.items():
        each = [moments[layers[i]] for i in range(len(layers))]
        whole[name] = jax.tree.map(lambda *x: jnp.stack(x), *each)
    return whole


def with_curvatures(
    config: Config,
    model: Any,
    dense: Any,
    moments: dict[str, jc.Moments],
    calibration: list[np.ndarray],
    layout: Any,
) -> dict[str, jc.Moments]:
    """Measure curvatures, which the cache keeps for the next run."""
    each = config.variants.split(";")
    joint = any(x.startswith("planned") and "apart" not in x for x in each)
    size = f"{config.calibration}-{config.curvature}"
    name = f"{Path(config.model).stem}-joint-curvatures-{size}.npz"
    path = Path(config.cache) / name if config.cache else None
    joint = joint or path is not None
    if path is not None and path.exists():
        with np.load(path) as file:
            kept = {key.replace("|", "/"): jnp.asarray(file[key]) for key in file}
        return {
            key: dataclasses.replace(
                x,
                curvatures=kept.get(key),
                joint_curvatures=kept.get(f"{key}, joint"),
            )
            for key, x in moments.items()
        }
    ids = np.concatenate(calibration).reshape(-1, 128)
    ids = ids[:: max(1, len(ids) // config.curvature)][: config.curvature]
    found = jc.measure_curvatures(
        Apply(model),
        dense,
        [{"tokens": ids}],
        moments,
        layouts=layout,
        joint=joint,
        key=jax.random.key(0),
        progress=lambda rows: reporting.track(rows, "curvatures"),
    )
    if path is not None:
        known = {key: x.curvatures for key, x in found.items()}
        known |= {f"{key}, joint": x.joint_curvatures for key, x in found.items()}
        np.savez(
            path,
            **{k.replace("/", "|"): x for k, x in known.items() if x is not None},
        )
    return found


def looped_moments(moments: dict[str, jc.Moments]) -> dict[str, jc.Moments]:
    """Split moments of the scanned model as those of the looped one."""
    found = {}
    for name, value in moments.items():
        if name.startswith("layers/"):
            rest = name.removeprefix("layers/")
            for i in range(value.count.shape[0]):
                each = jax.tree.map(lambda x, i=i: x[i], value)
                found[f"layer_{i}/{rest}"] = each
        else:
            found[name] = value
    return found


def averaged(moments: jc.Moments) -> jc.Moments:
    """Average the curvatures of all outputs of a leaf."""
    found = moments.curvatures
    if found is None:
        return moments
    mean = jnp.broadcast_to(found.mean(axis=-1, keepdims=True), found.shape)
    return dataclasses.replace(moments, curvatures=mean)


def tuned(
    config: Config, model: Any, dense: Any, small: Any, calibration: list[np.ndarray]
) -> Any:
    """Train steps and norms towards the predictions; levels stay."""
    optimizer = jc.optimizers.relative(
        optax.adam(optax.cosine_decay_schedule(config.tuning_rate, config.tuning))
    )
    optimizer = jc.optimizers.by_name([(SIDE, optimizer), (".*", None)])
    windows = np.concatenate(calibration)
    mask = np.arange(windows.shape[1])[None] > 0
    start = decode_once(small)
    state = distillation.train(
        jc.make_train_step(
            distillation.soft_labels(Apply(model), Apply(model), dense), optimizer
        ),
        distillation.init_state(
            start, optimizer, dtype=jnp.float32, key=jax.random.key(0)
        ),
        lambda number: {"tokens": windows[[number % len(windows)]], "mask": mask},
        steps=config.tuning,
        report=lambda number, metrics: print(number, metrics["loss"], flush=True),
    )
    return code_again(distillation.cast_like(state.params, start), small)


if __name__ == "__main__":
    run(parse(Config, __doc__))

"""What does a model of another size cost: curvatures, plan and codes, block by block?

Made-up weights of a given shape: each linear layer and embedding is white noise of the
size that training leaves, `1 / sqrt(inputs)`, so that time and memory are those of real
weights and quality means nothing. They are stored in bfloat16; embedding and norms stay
as they are. One stage a process; each resumes from the store, and needs the one before:

    python -m experiments.calibration.larger --shape 1b --store DIR --stage weights
    python -m experiments.calibration.larger --shape 1b --store DIR --stage curvatures
    python -m experiments.calibration.larger --shape 1b --store DIR --stage plan
    python -m experiments.calibration.larger --shape 1b --store DIR --stage compress
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import Clock
from jaxcompress import reporting
from jaxcompress.tree.paths import roots

STAGES = ("weights", "curvatures", "plan", "compress")
WHERE = ".*kernel"
SHAPES = {
    # as SmolLM2-135M and Llama 3.2 1B have it
    "135m": {
        "vocab_size": 49152,
        "width": 576,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "head_size": 64,
        "mlp_width": 1536,
    },
    "1b": {
        "vocab_size": 128256,
        "width": 2048,
        "layers": 16,
        "heads": 32,
        "kv_heads": 8,
        "head_size": 64,
        "mlp_width": 8192,
    },
    "tiny": {
        "vocab_size": 256,
        "width": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_size": 32,
        "mlp_width": 128,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "1b"
    stage: str = "weights"  # or all, of a small model
    store: str = ""
    sequences: int = 8
    tokens: int = 128  # in a sequence
    rate: float = 3.0  # bits per weight of the linear layers
    blocks: int = 0  # compress so many and stop, embedding included; 0: all
    fast: bool = False  # a tiny model, every stage
    results: str = "experiments/calibration/results/larger.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure seconds and the peak of memory of a stage; a row for each."""
    if config.fast:
        with tempfile.TemporaryDirectory() as folder:
            small = {"shape": "tiny", "sequences": 2, "tokens": 64, "results": ""}
            config = dataclasses.replace(config, store=folder, **small)
            return [row for name in STAGES for row in _stage(config, name)]
    return _stage(config, config.stage)


def _stage(config: Config, stage: str) -> list[dict[str, Any]]:
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; one of {', '.join(STAGES)} is wanted")
    if not config.store:
        raise ValueError("pass --store DIR, a directory for what the stages leave")
    folder = Path(config.store)
    folder.mkdir(parents=True, exist_ok=True)
    model = jc.models.Transformer(**SHAPES[config.shape], dtype=jnp.float32)
    results = Results(config, experiment="larger")
    before, clock = reporting.peak_memory(), Clock()
    weights = _work(stage, config, model, folder)
    row = {
        "shape": config.shape,
        "stage": stage,
        "weights": weights,
        "calibration_tokens": config.sequences * config.tokens,
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "peak_bytes": reporting.peak_memory(),
        "peak_bytes_before": before,
    }
    results.add(row)
    return [row]


def _work(stage: str, config: Config, model: Any, folder: Path) -> int:
    """Do what a stage does, to the end; return the number of weights it is about."""
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    )["params"]
    sizes = {name: x.size for name, x in roots(shapes)}
    file, recipe = folder / "model.safetensors", folder / "recipe.json"
    if stage == "weights":
        _write(file, shapes)
        return sum(sizes.values())
    tokens = np.random.default_rng(1).integers(
        0, model.vocab_size, (config.sequences, 1, config.tokens), np.int32
    )
    batches = [{"tokens": row} for row in tokens]
    with jc.open_checkpoint(file) as weights:
        moments = measured(model, weights, batches, folder, progress=True)
        if stage == "plan":
            rules = jc.planning.plan_rates(
                weights, moments, where=WHERE, bits_per_weight=config.rate
            )
            recipe.write_text(json.dumps(rules))
        if stage == "compress":
            done: list[str] = []
            try:
                stop = functools.partial(_first, config.blocks, done)
                code(model, weights, batches, moments, folder, progress=stop)
            except Stopped:
                return sum(sizes[name] for name in done)
    return sum(size for name, size in sizes.items() if name.endswith("kernel"))


def measured(
    model: Any, weights: Any, batches: list[Any], folder: Path, *, progress: Any = False
) -> Any:
    """Measure moments and curvatures of the kernels, or read them from the folder."""
    return jc.measure_curvatures_blockwise(
        model,
        weights,
        batches,
        where=WHERE,
        store=folder / "curvatures",
        key=jax.random.key(0),
        progress=progress,
    )


def code(
    model: Any,
    weights: Any,
    batches: list[Any],
    moments: Any,
    folder: Path,
    *,
    progress: Any = False,
) -> None:
    """Compress by the folder's recipe, and write the file."""
    rules = json.loads((folder / "recipe.json").read_text())
    small = jc.compress_blockwise(
        model,
        weights,
        [tuple(rule) for rule in rules],
        batches,
        moments=moments,
        store=folder / "blocks",
        progress=progress,
    )
    jc.save(folder / "small.safetensors", {"params": small})


class Stopped(Exception):
    """As many blocks as were asked for are compressed."""


def _first(count: int, done: list[str], parts: Iterable[Any]) -> Iterator[Any]:
    """Pass blocks on, note their kernels, and stop after the first `count`."""
    for number, part in enumerate(parts, start=1):
        print(f"block {number}: {part.label}", flush=True)
        done += [row.name for row in part.reports if row.name.endswith("kernel")]
        if number == count:
            raise Stopped
        yield part


def _write(path: Path, shapes: Any) -> None:
    """Write made-up weights."""
    generator = np.random.default_rng(0)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) < 2:
            return np.ones(shape, ml_dtypes.bfloat16)
        inputs = shape[-1] if name.endswith("embedding") else shape[0]
        noise = generator.standard_normal(shape, np.float32)
        return (noise / np.sqrt(inputs)).astype(ml_dtypes.bfloat16)

    arrays = {name: one(name, x.shape) for name, x in roots(shapes)}
    structure = jax.tree.structure(shapes)
    tree = jax.tree.unflatten(structure, list(arrays.values()))
    jc.save(path, {"params": tree}, coding="none")


if __name__ == "__main__":
    run(parse(Config, __doc__))

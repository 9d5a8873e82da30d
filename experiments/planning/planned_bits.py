"""What does choosing the bits of each layer by measurement gain, at equal bytes?

Measures how sensitive a model is to noise in each kernel, one after another, on windows
from the beginning of a text, or the curvatures of its divergence, all at once; plans
the bits of every kernel within the bytes that uniform bits take; and compares both with
the original on the end of the text and on a second text. Sensitivities are kept in a
file, so that plans can be made again without measuring. One JSON line per row:

    python -m experiments.planning.planned_bits SmolLM2.gguf text.txt
"""

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load, quality
from experiments.common.results import Results
from experiments.common.texts import cut, split
from experiments.pruning.pruned import curved
from jaxcompress import reporting
from jaxcompress.evaluation import Apply, divergence

KERNELS = r".*layer_\d+.*kernel"
METHODS = {
    "nearest": "symmetric(bits={bits}, block=128, full_range=True)",
    "gptq": "gptq(bits={bits}, block=128, grid='asymmetric')",
}


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    method: str = "nearest"  # or gptq, which is calibrated first
    fraction: float = 0.2  # of the text, counted from its end, is measured on
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    noise: float = 0.15  # relative size
    noise_windows: int = 2
    noise_tokens: int = 128  # in a window
    calibration: int = 32  # windows of 512, for gptq
    windows: int = 12  # of each text
    tokens: int = 512  # in a window
    curvatures: bool = False  # in place of noise
    sensitivities: str = ""  # file to read, or to write where there is none
    fast: bool = False  # the reference model, one rate, a few windows
    results: str = "experiments/planning/results/planned_bits.jsonl"


def measured(
    model: Any, params: Any, ids: np.ndarray, config: Config, moments: Any
) -> dict[str, float]:
    """Measure the sensitivity of each kernel, in nats per relative squared error."""
    path = Path(config.sensitivities) if config.sensitivities else None
    if path is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    tokens = ids[: config.noise_windows * config.noise_tokens]
    tokens = jnp.asarray(tokens.reshape(config.noise_windows, -1))
    target = jax.jit(Apply(model))(params, tokens)

    @jax.jit
    def loss(tree: Any) -> jax.Array:
        return divergence(target, Apply(model)(tree, tokens)).mean()

    found = jc.measure_sensitivities(
        loss,
        params,
        sizes=(config.noise,),
        moments=moments,
        where=KERNELS,
        key=jax.random.key(0),
        progress=lambda names: reporting.track(names, "measuring", unit="leaves"),
    )
    if path is not None:
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def run(config: Config) -> list[dict[str, Any]]:
    """Compare uniform and planned bits; a row for each rate and text."""
    rates = (4, 3)
    if config.fast:
        config = dataclasses.replace(
            config, model="reference", windows=2, tokens=128, noise_tokens=32
        )
        rates = (3,)
    original = load(config.model)
    model, params, tokenizer = original.model, original.params, original.tokenizer
    parts = split(config.text, also=config.also, fraction=config.fraction)
    ids = np.asarray(tokenizer.encode(parts.calibration), np.int32)
    batches = {
        name: cut(tokenizer, text, tokens=config.tokens, limit=config.windows)
        for name, text in parts.measured.items()
    }
    moments = None
    if config.method == "gptq" or config.curvatures:
        size = 64 if config.fast else 512
        seen = ids[: config.calibration * size].reshape(-1, 2, size)
        moments = jc.collect_moments(model, params, list(seen), where=KERNELS)
    clock = time.process_time()
    if config.curvatures:
        sensitivities = None
        moments = curved(model, params, seen, moments, KERNELS)
    else:
        sensitivities = measured(model, params, ids, config, moments)
    seconds = time.process_time() - clock
    method = METHODS[config.method]
    candidates = [method.format(bits=bits) for bits in range(2, 7)]
    results = Results(
        config,
        model=original.name,
        method=config.method,
        measuring_processor_seconds=seconds,
    )
    for rate in rates:
        uniform = [(KERNELS, method.format(bits=rate))]
        small = jc.compress(params, uniform, moments)
        kernels = {
            name: x for name, x in leaves(small).items() if isinstance(x, jc.Leaf)
        }
        budget = jc.nbytes(list(kernels.values()))
        weights = sum(x.size for x in kernels.values())
        clock = time.process_time()
        planned = jc.planning.plan_bits(
            params,
            nbytes=budget,
            sensitivities=sensitivities,
            candidates=candidates,
            moments=moments,
            where=KERNELS,
            progress=lambda names: reporting.track(names, "planning", unit="leaves"),
        )
        planning = time.process_time() - clock
        plan = "planned by curvatures" if config.curvatures else "planned"
        for name, recipe in (("uniform", uniform), (plan, planned)):
            if recipe is planned:
                small = jc.compress(params, planned, moments)
            held = leaves(small)
            size = jc.nbytes([held[leaf] for leaf in kernels])
            ready = jc.models.stack_layers(jax.jit(jc.materialize)(small))
            for text, some in batches.items():
                report = jc.compare(
                    Apply(original.scanned), original.dense, ready, some
                )
                results.add(
                    {
                        "bits": name,
                        "rate": rate,
                        "chosen": dict(chosen(recipe, len(kernels))),
                        "text": text,
                        "kernel_bytes": size,
                        "bits_per_kernel_weight": 8 * size / weights,
                        **quality(report),
                        "planning_processor_seconds": planning,
                    }
                )
            del ready
    return results.rows


def leaves(params: Any) -> dict[str, Any]:
    """Collect leaves and arrays by their path."""
    flat = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, jc.Leaf)
    )
    return {jax.tree_util.keystr(path): x for path, x in flat}


def chosen(recipe: list[tuple[str, str]], count: int) -> Counter[str]:
    """Count the kernels of each number of bits."""
    bits = [method.split("bits=")[1].split(",")[0] for _, method in recipe]
    return Counter(bits * (count if len(bits) == 1 else 1))


if __name__ == "__main__":
    run(parse(Config, __doc__))

"""What does a checkpoint take when the one it came from is at hand?

The reference model (bfloat16 weights) is trained a little by Adam, in float32, on
docstrings; each checkpoint is packed alone and against the first, as float32 and as
bfloat16. Every file is unpacked and compared.

    python -m experiments.storage.delta
"""

import dataclasses
import filecmp
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import docstrings
from experiments.models.train_reference import make_step
from jaxcompress import storage
from jaxcompress.tree.paths import roots


@dataclasses.dataclass(frozen=True)
class Config:
    steps: str = "1,4,16,64"  # checkpoints after so many
    rates: str = "1e-6,1e-5,1e-4"  # of Adam
    context: int = 128
    batch: int = 4
    kinds: str = "float32,bfloat16"
    fast: bool = False  # one step, one rate
    results: str = "experiments/storage/results/delta.jsonl"


def write(folder: Path, params: Any, kind: str) -> int:
    """Write a directory with one file of all weights; returns how many there are."""
    folder.mkdir()
    found = {
        name: np.asarray(x).astype(jnp.dtype(kind))
        for name, x in dict(roots(params)).items()
    }
    save_file(found, folder / "model.safetensors")
    return sum(x.size for x in found.values())


def row(folder: Path, base: Path, later: Path, count: int) -> dict[str, Any]:
    """Pack alone and against the base: bits per weight and seconds."""
    alone = storage.pack(later, folder / "alone")
    clock = time.process_time()
    against = storage.pack(later, folder / "against", base=base)
    packing = time.process_time() - clock
    clock = time.process_time()
    storage.unpack(folder / "against", folder / "back", base=base)
    unpacking = time.process_time() - clock
    name = "model.safetensors"
    if not filecmp.cmp(folder / "back" / name, later / name, shallow=False):
        raise ValueError("the checkpoint did not come back")
    return {
        "bits_alone": 8 * alone["packed"] / count,
        "bits_against_base": 8 * against["packed"] / count,
        "parts": against["parts"],
        "differences": against["differences"],
        "pack_processor_seconds": packing,
        "unpack_processor_seconds": unpacking,
    }


def run(config: Config) -> list[dict[str, Any]]:
    """Train and pack; a row for each rate, number of steps and dtype."""
    if config.fast:
        config = dataclasses.replace(config, steps="1", rates="1e-5", batch=1)
    model, first, tokenizer = jc.models.load("reference")
    first = jax.tree.map(lambda x: x.astype(jnp.float32), jc.materialize(first))
    tokens = np.array(tokenizer.encode(docstrings(400_000)), np.int32)
    random = np.random.default_rng(0)
    marks = [int(x) for x in config.steps.split(",")]
    places = random.integers(
        0, tokens.size - config.context - 1, (max(marks), config.batch)
    )
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
    step = make_step(model, optimizer)
    results = Results(config, experiment="lossless_delta")
    for rate in map(float, config.rates.split(",")):
        params = jax.tree.map(jnp.copy, first)
        state = optimizer.init(params)
        for number, place in enumerate(places, 1):
            windows = tokens[place[:, None] + np.arange(config.context + 1)]
            params, state, loss = step(params, state, windows, rate)
            if number not in marks:
                continue
            for kind in config.kinds.split(","):
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    write(folder / "base", first, kind)
                    count = write(folder / "later", params, kind)
                    found = row(folder, folder / "base", folder / "later", count)
                results.add(
                    {
                        "kind": kind,
                        "rate": rate,
                        "steps": number,
                        "loss": float(loss),
                        "weights": count,
                        **found,
                    }
                )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

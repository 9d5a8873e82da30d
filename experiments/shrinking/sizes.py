"""What does one call to `shrink` make of a model at a given size?

Bytes of the file, divergence and perplexity on the end of a text and on other texts, by
size and by what it is calibrated on: a text that the model writes ("own"), the
beginning of the given one ("text"), or that, program code and dialogue in equal parts
("mixture"). Windows of a mixture, and those of seeds above 0, are drawn at random; text
of seed 0 is cut by `shrink` itself. The file is written, loaded again and measured. One
JSON line per row and text; sizes that the results hold are left out:

    python -m experiments.shrinking.sizes SmolLM2.gguf text.txt --store DIR
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load, quality
from experiments.common.results import Results
from experiments.common.texts import cut, digest, drawn, kinds, split
from experiments.common.timing import Clock
from jaxcompress import reporting
from jaxcompress.evaluation import Apply
from jaxcompress.shrinking.efforts import choose_effort
from jaxcompress.tree.equality import same_bits


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    sizes: str = "60MB,42MB"
    efforts: str = "good"
    calibrations: str = "own,text"  # or "mixture"
    fraction: float = 0.2  # of the text, counted from its end, is measured on
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    windows: int = 32  # of each text
    tokens: int = 512  # in a window
    store: str = ""  # of finished steps; what it holds takes no time
    seed: int = 0
    fast: bool = False  # the reference model by effort "quick", little text
    results: str = "experiments/shrinking/results/sizes.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Shrink to each size by each effort and calibration; a row for each text."""
    if config.fast:
        config = dataclasses.replace(
            config,
            model="reference",
            sizes="1.6MB",
            efforts="quick",
            calibrations="none",
            windows=2,
            tokens=128,
        )
    original = load(config.model)
    scanned, dense = original.scanned, original.dense
    parts = split(config.text, also=config.also, fraction=config.fraction)
    batches = {
        name: cut(original.tokenizer, text, tokens=config.tokens, limit=config.windows)
        for name, text in parts.measured.items()
    }
    results = Results(config, hide=("stages", "candidates"), model=original.name)
    for effort in config.efforts.split(","):
        for calibration in config.calibrations.split(","):
            for size in config.sizes.split(","):
                label = {
                    "size": size,
                    "effort": effort,
                    "calibration": "none" if effort == "quick" else calibration,
                    "seed": config.seed,
                }
                if results.holds(model=original.name, **label):
                    continue
                given = calibrated_on(
                    calibration, parts.calibration, original.tokenizer, effort, config
                )
                clock = Clock()
                small = jc.shrink(
                    scanned,
                    dense,
                    original.tokenizer,
                    size=size,
                    effort=effort,
                    text=given,
                    store=config.store or None,
                    key=jax.random.key(config.seed),
                    progress=not config.fast,
                )
                took = {
                    "seconds": clock.seconds,
                    "processor_seconds": clock.processor_seconds,
                    "peak_bytes": reporting.peak_memory(),
                    "stages": small.stages,
                }
                ready, written = reloaded(small)
                about = {
                    "file_bytes": written,
                    "bits_per_weight": small.bits_per_weight,
                    "predicted_kl": small.predicted_kl,
                    "calibrated_kl": small.kl,  # on its own held-out windows
                    "candidates": small.candidates,
                    "notes": list(small.notes),
                }
                for name, some in batches.items():
                    some = reporting.track(some, f"{size}, {name}")
                    found = jc.compare(Apply(scanned), dense, ready, some)
                    measured = {"text": name, "digest": digest(parts.measured[name])}
                    results.add(
                        {**label, **measured, **quality(found), **about, **took}
                    )
    return results.rows


def calibrated_on(
    calibration: str, text: str, tokenizer: Any, effort: str, config: Config
) -> Any:
    """Return what `shrink` takes as `text`: None, a text, or windows of tokens."""
    if calibration in ("own", "none"):
        return None
    if calibration == "text" and config.seed == 0:
        return text
    return drawn(
        tokenizer,
        kinds(text) if calibration == "mixture" else [text],
        count=choose_effort(effort).texts,
        tokens=choose_effort(effort).length,
        seed=config.seed,
    )


def reloaded(small: Any) -> tuple[Any, int]:
    """Return dense parameters of the file, and its bytes.

    Raises:
        ValueError: if the file holds other bits, or is not as long as was said.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        small.save(path)
        loaded = jc.models.load(path)[1]
        size = path.stat().st_size
    if not same_bits(small.params, loaded) or size != small.file_bytes:
        raise ValueError("the file is not what shrink said")
    return jax.block_until_ready(jax.jit(jc.materialize)(loaded)), size


if __name__ == "__main__":
    run(parse(Config, __doc__))

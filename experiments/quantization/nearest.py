"""What does rounding to nearest cost a real model, in file bytes and in quality?

Compresses a model by each recipe, codes it without loss, saves it, loads it back, and
compares it with the original on the end of a text and on others (`common/texts.py`).
One JSON line per row:

    python -m experiments.quantization.nearest SmolLM2.gguf text.txt
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
from experiments.common.texts import cut, digest, split
from experiments.common.timing import Clock
from jaxcompress import reporting
from jaxcompress.evaluation import Apply
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tree.equality import same_bits

EMBEDDING = (".*embedding", "symmetric(bits=8)")  # tied to the head: it matters most
RECIPES = (
    ["symmetric(bits=8)"],
    [EMBEDDING, (".*kernel", "symmetric(bits=4, block=128)")],
    [EMBEDDING, (".*kernel", "symmetric(bits=4, block=128, full_range=True)")],
    [EMBEDDING, (".*kernel", "symmetric(bits=4, block=128, search=True)")],
    ["symmetric(bits=4, block=128, search=True)"],
    [EMBEDDING, (".*kernel", "symmetric(bits=3, block=128, full_range=True)")],
    [EMBEDDING, (".*kernel", "symmetric(bits=3, block=128, search=True)")],
    [EMBEDDING, (".*kernel", "symmetric(bits=2, block=128, full_range=True)")],
)


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    fraction: float = 0.2  # of the text, counted from its end
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    windows: int = 16  # of each text
    tokens: int = 512  # in a window
    fast: bool = False  # the reference model, one recipe, two windows
    only: str = ""  # recipes whose text holds this
    results: str = "experiments/quantization/results/nearest.jsonl"


def run(config: Config) -> list[dict[str, Any]]:
    """Measure each recipe on each text; a row for each, float32 first."""
    recipes = [rules for rules in RECIPES if config.only in str(rules)]
    if config.fast:
        config = dataclasses.replace(config, model="reference", windows=2, tokens=128)
        recipes = RECIPES[1:2]
    loaded = load(config.model)
    parts = split(config.text, also=config.also, fraction=config.fraction)
    batches = {
        name: cut(loaded.tokenizer, text, tokens=config.tokens, limit=config.windows)
        for name, text in parts.measured.items()
    }
    results = Results(config, model=loaded.name)
    for rules in recipes:
        recipe = rules[0] if isinstance(rules[0], str) else rules
        clock = Clock()
        coded = jc.compress(
            loaded.params,
            jc.chain(recipe, "entropy_code()", "code_floats()"),
            progress=lambda names: reporting.track(names, "compressing", unit="leaves"),
        )
        seconds = clock.seconds
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            jc.models.save(
                path, loaded.model, coded, loaded.tokenizer, {"recipe": recipe}
            )
            back = jc.models.load(path)[1]
            if not same_bits(coded, back):
                raise ValueError(f"{recipe}: the file did not come back bit for bit")
            size = reporting.measure(back, path)
        ready = jax.jit(jc.materialize)(jc.models.stack_layers(decode_once(back)))
        for name, some in batches.items():
            report = jc.compare(
                Apply(loaded.scanned), loaded.dense, ready, reporting.track(some, name)
            )
            text = {"text": name, "text_digest": digest(parts.measured[name])}
            if rules is recipes[0]:
                results.add(
                    {
                        "recipe": "float32",
                        **text,
                        "tokens": report.tokens,
                        "file_bytes": jc.nbytes(loaded.params),
                        "bits_per_weight": 32.0,
                        "perplexity": report.dense.perplexity,
                        "bits_per_byte": report.dense.bits_per_byte,
                    }
                )
            results.add(
                {
                    "recipe": recipe,
                    **text,
                    "file_bytes": size.file_bytes,
                    "bits_per_weight": size.bits_per_weight,
                    **quality(report),
                    "compress_seconds": seconds,
                }
            )
        del coded, back, ready
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

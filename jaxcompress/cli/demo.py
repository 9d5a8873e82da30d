"""The first thing to run: the reference model at 8, 4, 3 and 2 bits, measured."""

import time
from pathlib import Path
from typing import Any

from jaxcompress import reporting, storage
from jaxcompress.evaluation import Apply, Report, compare, windows
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.models.generation import generate
from jaxcompress.models.loading import load
from jaxcompress.models.saved import save
from jaxcompress.models.stacking import stack_layers
from jaxcompress.running.decode_once import decode_once
from jaxcompress.tree.compress import chain, compress
from jaxcompress.tree.equality import same_bits
from jaxcompress.types import Params

RECIPES = (
    "symmetric(bits=8)",
    "symmetric(bits=4, block=64, search=True)",
    "symmetric(bits=3, block=64, search=True)",
    "symmetric(bits=2, block=64, full_range=True, search=True)",
)
SHOWN = 1  # the recipe whose text is printed
PROMPT = "def read_lines(path):\n"
LENGTH, BATCH = 512, 2


def run(
    folder: Path,
    *,
    limit: int = 32,
    recipes: tuple[str, ...] = RECIPES,
) -> list[dict[str, Any]]:
    """Compress the reference model by each recipe, save, load, check and compare.

    Args:
      folder: where the files are written; it must exist.
      limit: windows of held-out text to compare on.
      recipes: methods for all large kernels and embeddings.

    Returns:
      The rows of the table. Raises ValueError where a file is not restored bit for
      bit.
    """
    start = time.perf_counter()
    model, params, tokenizer = load("reference", scan=False)
    scanned, dense = model.clone(scan=True), stack_layers(params)
    weights = reporting.weight_count(params)
    _say(
        f"reference model: {reporting.grouped(weights)} weights, {model.layers} layers"
    )
    ids = tokenizer.encode(heldout_text())
    batches = windows(
        ids, LENGTH, BATCH, token_bytes=tokenizer.token_bytes(ids), limit=limit
    )
    dense_path = folder / "reference-float32.safetensors"
    save(dense_path, model, params, tokenizer, coding="none")
    rows, texts, report = [], [], None
    for i, recipe in enumerate(recipes):
        small = compress(params, chain(recipe, "entropy_code()", "code_floats()"))
        path = folder / f"reference-{recipe.split('bits=')[1][0]}bit.safetensors"
        save(path, model, small, tokenizer, {"recipe": recipe})
        storage.verify(path)
        loaded = load(path)[1]
        if not same_bits(small, loaded):
            raise ValueError(f"{path} was not read back bit for bit; please report it")
        ready = stack_layers(decode_once(loaded))
        report = compare(Apply(scanned), dense, ready, reporting.track(batches, recipe))
        rows.append(row(recipe, path, loaded, report))
        if i == min(SHOWN, len(recipes) - 1):
            texts.append(sample(scanned, ready, tokenizer))
    first = {
        "recipe": "float32",
        **dict.fromkeys(rows[0]),
        **{"file bytes": dense_path.stat().st_size, "bits/weight": 32.0},
        "perplexity": report.dense.perplexity,
        "bits/byte": report.dense.bits_per_byte,
    }
    rows.insert(0, first | {"recipe": "float32"})
    _say("", reporting.table(rows), "")
    _say(f"{report.tokens} tokens of held-out text; every file came back bit for bit")
    texts.insert(0, sample(scanned, dense, tokenizer))
    for name, text in zip(("before", "after "), texts, strict=False):
        _say(f"{name} {PROMPT.strip()} -> {text!r}")
    seconds = time.perf_counter() - start
    _say(f"{seconds:.0f} s")
    return rows


def _say(*items: Any) -> None:
    print(reporting.render(*items), flush=True)


def row(recipe: str, path: Path, params: Params, report: Report) -> dict[str, Any]:
    """Return a row of the table: what one recipe's file takes, and what it costs."""
    size = reporting.measure(params, path)
    return {
        "recipe": recipe,
        "file bytes": size.file_bytes,
        "bits/weight": size.bits_per_weight,
        "perplexity": report.small.perplexity,
        "bits/byte": report.small.bits_per_byte,
        "KL": report.kl,
        "top-1 the same": report.agreement,
    }


def sample(model: Any, params: Params, tokenizer: Any) -> str:
    """Return what the model writes after the prompt."""
    return generate(model, params, tokenizer, PROMPT, max_tokens=24)

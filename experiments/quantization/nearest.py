"""What does rounding to nearest cost a real model, in file bytes and in quality?

Compresses a model by each recipe, codes it without loss, saves it, loads it back, and
compares it with the original on the end of one text and on a second text: the
docstrings of the running interpreter's standard library. One JSON line per row:

    python -m experiments.quantization.nearest SmolLM2.gguf text.txt
"""

import ast
import dataclasses
import json
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments.common.command import commit, parse
from jaxcompress import reporting
from jaxcompress.evaluation import Apply, windows
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
    windows: int = 16  # of each text
    tokens: int = 512  # in a window
    fast: bool = False  # the reference model, one recipe, two windows
    only: str = ""  # recipes whose text holds this
    results: str = "experiments/quantization/results/nearest.jsonl"


def docstrings(count: int = 120_000) -> str:
    """Docstrings of the standard library's modules, in order of their names."""
    library, found, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted(library.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) > 200:
                found.append(text)
                size += len(text)
        if size > count:
            break
    return "\n\n".join(found)[:count]


def run(config: Config) -> list[dict[str, Any]]:
    """The rows of the table, one per recipe and text; float32 first."""
    recipes = [rules for rules in RECIPES if config.only in str(rules)]
    if config.fast:
        config = dataclasses.replace(config, model="reference", windows=2, tokens=128)
        recipes = RECIPES[1:2]
    model, params, tokenizer = jc.models.load(config.model, scan=False)
    scanned = model.clone(scan=True)
    dense = jc.models.stack_layers(params)
    texts = {"docstrings": docstrings()}
    if config.text:
        whole = jc.tokenization.read_text(config.text)
        start = int(len(whole) * (1 - config.fraction))
        texts = {Path(config.text).stem: whole[start:], **texts}
    batches = {}
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        batches[name] = windows(
            ids,
            config.tokens,
            1,
            token_bytes=tokenizer.token_bytes(ids),
            limit=config.windows,
        )
    rows: list[dict[str, Any]] = []
    for rules in recipes:
        recipe = rules[0] if isinstance(rules[0], str) else rules
        clock = time.perf_counter()
        coded = jc.compress(
            params,
            jc.chain(recipe, "entropy_code()", "code_floats()"),
            progress=lambda names: reporting.track(names, "compressing", unit="leaves"),
        )
        seconds = time.perf_counter() - clock
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            jc.models.save(path, model, coded, tokenizer, {"recipe": recipe})
            loaded = jc.models.load(path)[1]
            if not same_bits(coded, loaded):
                raise ValueError(f"{recipe}: the file did not come back bit for bit")
            size = reporting.measure(loaded, path)
        ready = jax.jit(jc.materialize)(jc.models.stack_layers(decode_once(loaded)))
        for name in texts:
            report = jc.compare(
                Apply(scanned), dense, ready, reporting.track(batches[name], name)
            )
            if rules is recipes[0]:
                rows.append(_dense_row(config, name, report, params))
            rows.append(
                {
                    "model": Path(config.model).name,
                    "recipe": recipe,
                    "text": name,
                    "tokens": report.tokens,
                    "file_bytes": size.file_bytes,
                    "bits_per_weight": size.bits_per_weight,
                    "perplexity": report.small.perplexity,
                    "bits_per_byte": report.small.bits_per_byte,
                    "kl": report.kl,
                    "kl_standard_error": report.kl_standard_error,
                    "top1_agreement": report.agreement,
                    "compress_seconds": seconds,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        del coded, loaded, ready
    about = {
        "commit": commit(),
        "jax": metadata.version("jax"),
        "flax": metadata.version("flax"),
        "device": jax.devices()[0].device_kind,
    }
    return [row | about for row in rows]


def _dense_row(config: Config, name: str, report: Any, params: Any) -> dict[str, Any]:
    return {
        "model": Path(config.model).name,
        "recipe": "float32",
        "text": name,
        "tokens": report.tokens,
        "file_bytes": jc.nbytes(params),
        "bits_per_weight": 32.0,
        "perplexity": report.dense.perplexity,
        "bits_per_byte": report.dense.bits_per_byte,
    }


if __name__ == "__main__":
    config = parse(Config, __doc__)
    reporting.append_lines(config.results, run(config))

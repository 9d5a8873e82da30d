"""What does zeroing half of a real model's weights cost, and who makes up for it best?

Prunes the kernels of all layers (not the embedding, which is also the head) by each
method and setting, and measures perplexity and KL on text that was not used for
calibration, and the loss of every layer (the expected squared change of its output) on
the moments of both texts. One JSON line per row, appended as it is done; rows that the
results hold already are not run again. A last row per setting says how often the order
of the methods holds layer by layer, and where it does not:

    python -m experiments.pruning.pruned
    python -m experiments.pruning.pruned SmolLM2.gguf text.txt \\
        --kernels "layer_.?[05]/.*kernel"
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from experiments.common.command import about, parse, rows_of
from jaxcompress import reporting
from jaxcompress.calibration.error_feedback import layer_loss
from jaxcompress.evaluation import Apply, windows
from jaxcompress.models.bundled_text import heldout_text

KERNELS = r"layer_\d+/.*kernel"
METHODS = ("magnitude", "wanda", "sparsegpt", "alps")  # worst first
SETTINGS = ("sparsity=0.5", "sparsity=0.7", "nm='2:4'")


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""  # the packaged held-out text, for the reference model
    fraction: float = 0.2  # of the text, from its end, to measure on; else calibration
    calibration: int = 64  # windows
    windows: int = 32  # to measure on
    tokens: int = 256  # in a window
    only: str = ""  # rows whose recipe holds this
    kernels: str = KERNELS  # to be pruned; others stay dense
    fast: bool = False
    results: str = "experiments/pruning/results/pruned.jsonl"


def texts(config: Config) -> tuple[str, str]:
    """Calibration text and the text to measure on, which follows it."""
    whole = jc.tokenization.read_text(config.text) if config.text else heldout_text()
    start = int(len(whole) * (1 - (config.fraction if config.text else 0.5)))
    return whole[:start], whole[start:]


def cut(tokenizer: Any, text: str, config: Config, limit: int) -> list[dict[str, Any]]:
    """Windows of the beginning of a text, in batches of two."""
    ids = tokenizer.encode(text[: 8 * config.tokens * limit])
    sizes = tokenizer.token_bytes(ids)
    return windows(ids, config.tokens, 2, token_bytes=sizes, limit=limit)


def calibration(tokenizer: Any, text: str, config: Config) -> np.ndarray:
    """Full windows from the start of a text, two in a batch: `[batches, 2, tokens]`."""
    ids = tokenizer.encode(text[: 8 * config.tokens * config.calibration])
    batches = min(len(ids) // config.tokens, config.calibration) // 2
    ids = np.asarray(ids[: 2 * batches * config.tokens], np.int32)
    return ids.reshape(-1, 2, config.tokens)


def curved(model: Any, params: Any, ids: Any, moments: Any, pattern: str) -> Any:
    """The moments with curvatures, of 32 windows of 128 tokens spread over `ids`."""
    short = np.asarray(ids).reshape(-1, 128)
    short = short[:: max(1, len(short) // 32)][:32]
    return jc.measure_curvatures(
        Apply(model),
        params,
        [{"tokens": short}],
        moments,
        where=pattern,
        key=jax.random.key(0),
    )


@jax.jit
def _losses(params: Any, small: Any, seconds: dict[str, jax.Array]) -> dict[str, Any]:
    before, after = dict(kernels(params)), dict(kernels(small))
    return {
        name: layer_loss(before[name], after[name], second)
        for name, second in seconds.items()
    }


def kernels(params: Any) -> list[tuple[str, jax.Array]]:
    """Name and array of the kernels of all layers, dense."""
    return [
        (f"{layer}/{part}/{name}/kernel", arrays["kernel"])
        for layer, parts in params.items()
        if layer.startswith("layer_")
        for part in ("attention", "mlp")
        for name, arrays in parts[part].items()
        if "kernel" in arrays
    ]


def layer_losses(params: Any, small: Any, moments: Any) -> dict[str, float]:
    """The loss of each layer, by the name of its kernel."""
    seconds = {name: known.second for name, known in moments.items()}
    found = _losses(params, small, seconds)
    return {name: float(f"{float(loss):.5g}") for name, loss in found.items()}


def pruned_kernels(row: dict[str, Any]) -> str:
    """The pattern of the kernels that a row pruned."""
    return row.get("kernels", KERNELS)


def orders(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and setting with all methods: how often each beats the one before.

    On the losses with the moments of the text that was measured on.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        if row.get("method") in METHODS:
            key = (row["model"], row["setting"], pruned_kernels(row))
            found.setdefault(key, {})[row["method"]] = row
    summary = []
    for (model, setting, names), by_method in found.items():
        if set(by_method) != set(METHODS):
            continue
        line = {"model": model, "setting": setting, "kernels": names}
        line["summary"] = "order of layer losses"
        for which in ("layer_losses", "heldout_layer_losses"):
            pairs = {}
            for worse, better in itertools.pairwise(METHODS):
                a, b = by_method[worse][which], by_method[better][which]
                wrong = [name for name in a if b[name] >= a[name]]
                pairs[f"{better} < {worse}"] = {
                    "sums": [sum(b.values()), sum(a.values())],
                    "layers": len(a) - len(wrong),
                    "of": len(a),
                    "exceptions": wrong,
                }
            line[which] = pairs
        summary.append(line)
    return summary


def run(config: Config) -> list[dict[str, Any]]:
    """New rows of the table, in order; appends each to the results as it is done."""
    if config.fast:
        config = dataclasses.replace(
            config, model="reference", text="", calibration=4, windows=4, tokens=128
        )
    path = Path(config.results)
    done = rows_of(path)
    name = Path(config.model).name
    held = {(row["model"], row.get("recipe"), pruned_kernels(row)) for row in done}
    recipes = [
        (method, setting, f"{method}({setting})")
        for setting in SETTINGS[-1 if config.fast else 0 :]
        for method in METHODS
    ]
    todo = [
        (method, setting, recipe)
        for method, setting, recipe in recipes
        if config.only in recipe and (name, recipe, config.kernels) not in held
    ]
    rows: list[dict[str, Any]] = []
    if todo:
        rows = _measure(config, name, todo, path)
    before = {
        (row["model"], row["setting"], pruned_kernels(row))
        for row in done
        if "summary" in row
    }
    for line in orders(done + rows):
        if (line["model"], line["setting"], pruned_kernels(line)) not in before:
            rows.append(line)
            reporting.append_lines(path, [line])
    return rows


def _measure(
    config: Config, name: str, todo: list[tuple[str, str, str]], path: Path
) -> list[dict[str, Any]]:
    model, params, tokenizer = jc.models.load(config.model, scan=False)
    learned_from, measured_on = texts(config)
    inputs = calibration(tokenizer, learned_from, config)
    batches = cut(tokenizer, measured_on, config, config.windows)
    moments = jc.collect_moments(model, params, inputs, where=config.kernels)
    heldout = jc.collect_moments(
        model, params, [batch["tokens"] for batch in batches], where=config.kernels
    )
    scanned, dense = model.clone(scan=True), jc.models.stack_layers(params)
    rows = []
    for method, setting, recipe in todo:
        clock = time.process_time()
        small = jc.compress(params, [(config.kernels, recipe)], moments)
        small = jax.block_until_ready(jax.jit(jc.materialize)(small))
        seconds = time.process_time() - clock
        report = jc.compare(
            Apply(scanned), dense, jc.models.stack_layers(small), batches
        )
        kept = [np.count_nonzero(x) / x.size for n, x in kernels(small) if n in moments]
        losses = layer_losses(params, small, moments)
        others = layer_losses(params, small, heldout)
        row = {
            "model": name,
            "recipe": recipe,
            "method": method,
            "setting": setting,
            "kernels": config.kernels,
            "zeros": 1 - float(np.mean(kept)),
            "tokens": report.tokens,
            "dense_perplexity": report.dense.perplexity,
            "perplexity": report.small.perplexity,
            "ratio": report.small.perplexity / report.dense.perplexity,
            "bits_per_byte": report.small.bits_per_byte,
            "kl": report.kl,
            "kl_standard_error": report.kl_standard_error,
            "layer_loss": sum(losses.values()),
            "heldout_layer_loss": sum(others.values()),
            "prune_processor_seconds": seconds,
            "calibration_tokens": inputs.size,
            **about(),
            "layer_losses": losses,
            "heldout_layer_losses": others,
        }
        reporting.append_lines(path, [row])
        shown = {key: value for key, value in row.items() if "losses" not in key}
        print(json.dumps(shown), flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    for row in run(parse(Config, __doc__)):
        if "summary" in row:
            print(json.dumps(row))

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
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from experiments.common.config import OnText, parse
from experiments.common.models import quality
from experiments.common.results import Results
from experiments.common.texts import cut, full_windows, split
from jaxcompress.calibration.error_feedback import layer_loss
from jaxcompress.evaluation import Apply

KERNELS = r"layer_\d+/.*kernel"
METHODS = ("magnitude", "wanda", "sparsegpt", "alps")  # worst first
SETTINGS = ("sparsity=0.5", "sparsity=0.7", "nm='2:4'")


@dataclasses.dataclass(frozen=True)
class Config(OnText):
    kernels: str = KERNELS  # to be pruned; others stay dense
    results: str = "experiments/pruning/results/pruned.jsonl"


def inputs_of(
    tokenizer: Any, config: OnText
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Cut windows to calibrate on, `[batches, 2, tokens]`, and batches to measure on.

    Args:
        tokenizer: of the model.
        config: says which text, how many windows of each part, and how many tokens.
    """
    parts = split(config.text, also="", fraction=config.fraction)
    (measured,) = parts.measured.values()
    tokens = config.tokens
    return (
        full_windows(
            tokenizer, parts.calibration, tokens=tokens, limit=config.calibration
        ),
        cut(tokenizer, measured, tokens=tokens, limit=config.windows, batch=2),
    )


def curved(model: Any, params: Any, ids: Any, moments: Any, pattern: str) -> Any:
    """Measure curvatures on 32 windows of 128 tokens spread over `ids`."""
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
    """List name and array of the kernels of all layers, dense."""
    return [
        (f"{layer}/{part}/{name}/kernel", arrays["kernel"])
        for layer, parts in params.items()
        if layer.startswith("layer_")
        for part in ("attention", "mlp")
        for name, arrays in parts[part].items()
        if "kernel" in arrays
    ]


def layer_losses(params: Any, small: Any, moments: Any) -> dict[str, float]:
    """Compute the loss of each layer, by the name of its kernel."""
    seconds = {name: known.second for name, known in moments.items()}
    found = _losses(params, small, seconds)
    return {name: float(f"{float(loss):.5g}") for name, loss in found.items()}


def pruned_kernels(row: dict[str, Any]) -> str:
    """Return the pattern of the kernels that a row pruned."""
    return row.get("kernels", KERNELS)


def orders(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count how often each method beats the one before, by model and setting.

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
    """Measure the rows that the results lack, in order."""
    if config.fast:
        config = dataclasses.replace(
            config, model="reference", text="", calibration=4, windows=4, tokens=128
        )
    results = Results(config, hide=("layer_losses", "heldout_layer_losses"))
    done, name = results.held, Path(config.model).name
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
    if todo:
        _measure(config, name, todo, results)
    before = {
        (row["model"], row["setting"], pruned_kernels(row))
        for row in done
        if "summary" in row
    }
    for line in orders(done + results.rows):
        if (line["model"], line["setting"], pruned_kernels(line)) not in before:
            results.add(line)
    return results.rows


def _measure(
    config: Config, name: str, todo: list[tuple[str, str, str]], results: Results
) -> None:
    model, params, tokenizer = jc.models.load(config.model, scan=False)
    inputs, batches = inputs_of(tokenizer, config)
    moments = jc.collect_moments(model, params, inputs, where=config.kernels)
    heldout = jc.collect_moments(
        model, params, [batch["tokens"] for batch in batches], where=config.kernels
    )
    scanned, dense = model.clone(scan=True), jc.models.stack_layers(params)
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
            **quality(report),
            "layer_loss": sum(losses.values()),
            "heldout_layer_loss": sum(others.values()),
            "prune_processor_seconds": seconds,
            "calibration_tokens": inputs.size,
            "layer_losses": losses,
            "heldout_layer_losses": others,
        }
        results.add(row)


if __name__ == "__main__":
    run(parse(Config, __doc__))

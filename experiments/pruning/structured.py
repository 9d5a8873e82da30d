"""What does a language model lose with a tenth to a third of its neurons or heads?

Removes neurons (the same number in every layer), key/value heads with the queries that
share them (those of all layers compete), and whole layers; the first two by the loss of
the layers that read them, without and with these making up for what goes. Measures the
rise of the loss on text that was not used for calibration, parameters, bytes, and the
processor time of a forward pass beside that of the dense model, in turns. One JSON line
per row, appended as it is done; rows that the results hold already are not run again:

    python -m experiments.pruning.structured
    python -m experiments.pruning.structured SmolLM2.gguf text.txt
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments.common.command import about, parse, rows_of
from experiments.pruning import pruned
from jaxcompress import models, reporting
from jaxcompress.evaluation import Apply

READERS = r"layer_\d+/.*(down|o)_proj/kernel"


@dataclasses.dataclass(frozen=True)
class Config(pruned.Config):
    by: str = "loss"  # or "activation"
    results: str = "experiments/pruning/results/structured.jsonl"


def forward_seconds(runs: list[tuple[Any, Any]], tokens: Any, turns: int) -> list:
    """Least processor time of each model's forward pass, measured in turns."""
    functions = [jax.jit(Apply(model)) for model, _ in runs]
    least = [float("inf")] * len(runs)
    for turn in range(turns + 1):  # the first compiles
        for i, (function, (_, params)) in enumerate(zip(functions, runs, strict=True)):
            clock = time.process_time()
            function(params, tokens).block_until_ready()
            if turn:
                least[i] = min(least[i], time.process_time() - clock)
    return least


def run(config: Config) -> list[dict[str, Any]]:
    """New rows of the table, in order; appends each to the results as it is done."""
    fractions = (0.1, 0.2, 0.3)
    if config.fast:
        config = dataclasses.replace(
            config, model="reference", text="", calibration=8, windows=4, tokens=128
        )
        fractions = fractions[-1:]
    path = Path(config.results)
    done = rows_of(path)
    keys = ("model", "kind", "by", "fraction", "made_up")
    held = {tuple(row[key] for key in keys) for row in done}
    model, params, tokenizer = models.load(config.model, scan=False)
    learned_from, measured_on = pruned.texts(config)
    inputs = pruned.calibration(tokenizer, learned_from, config)
    batches = pruned.cut(tokenizer, measured_on, config, config.windows)
    rows: list[dict[str, Any]] = []

    def measure(kind: str, fraction: float, small: Any, less: Any, **more: Any) -> None:
        report = jc.compare(
            Apply(model), params, small, batches, small_apply_fn=Apply(less)
        )
        tokens = batches[0]["tokens"]
        seconds = forward_seconds([(model, params), (less, small)], tokens, 5)
        row = {
            "model": Path(config.model).name,
            "kind": kind,
            "fraction": fraction,
            **more,
            "tokens": report.tokens,
            "dense_loss": report.dense.loss,
            "loss": report.small.loss,
            "rise": report.small.loss - report.dense.loss,
            "perplexity": report.small.perplexity,
            "kl": report.kl,
            "parameters": reporting.weight_count(small),
            "dense_parameters": reporting.weight_count(params),
            "bytes": jc.nbytes(small),
            "dense_bytes": jc.nbytes(params),
            "forward_processor_seconds": seconds[1],
            "dense_forward_processor_seconds": seconds[0],
            "calibration_tokens": inputs.size,
            **about(),
        }
        reporting.append_lines(path, [row])
        print(json.dumps(row), flush=True)
        rows.append(row)

    moments = None
    kinds = {
        "neurons": (models.neuron_groups(model), "group"),
        "heads": (models.head_groups(model), "global"),
    }
    name = Path(config.model).name
    for kind, (groups, scope) in kinds.items():
        todo = [
            (fraction, made_up)
            for fraction in fractions
            for made_up in (False, True)
            if config.only in kind
            and (name, kind, config.by, fraction, made_up) not in held
        ]
        if not todo:
            continue
        if moments is None:
            moments = jc.collect_moments(model, params, inputs, where=READERS)
        scores = jc.structured.score_units(moments, groups, params=params, by=config.by)
        for fraction, made_up in todo:
            keep = jc.structured.choose_units(scores, fraction, scope=scope)
            known = moments if made_up else None
            small = jc.structured.remove_units(params, groups, keep, known)
            less = models.resized(model, small)
            measure(kind, fraction, small, less, by=config.by, made_up=made_up)
    scanned, stacked = model.clone(scan=True), models.stack_layers(params)
    for fraction in fractions:
        key = (name, "layers", "influence", fraction, False)
        if config.only not in "layers" or key in held:
            continue
        scores = models.layer_influence(scanned, stacked, inputs)
        groups = models.layer_groups(scanned)
        keep = {"layers": jc.structured.choose_units(scores, fraction)}
        small = models.unstack_layers(jc.structured.remove_units(stacked, groups, keep))
        less = models.resized(model, small)
        measure("layers", fraction, small, less, by="influence", made_up=False)
    return rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

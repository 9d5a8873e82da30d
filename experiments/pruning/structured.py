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
import functools
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.timing import interleaved
from experiments.pruning import pruned
from jaxcompress import models, reporting
from jaxcompress.evaluation import Apply

READERS = r"layer_\d+/.*(down|o)_proj/kernel"


@dataclasses.dataclass(frozen=True)
class Config(pruned.Config):
    by: str = "loss"  # or "activation"
    results: str = "experiments/pruning/results/structured.jsonl"


def forward_seconds(runs: list[tuple[Any, Any]], tokens: Any, turns: int) -> list:
    """Time each model's forward pass in turns: the least, of the processor."""
    calls = [
        functools.partial(jax.jit(Apply(model)), params, tokens)
        for model, params in runs
    ]
    return interleaved(calls, turns)[..., 1].min(axis=0).tolist()


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rows that the results lack, in order."""
    fractions = (0.1, 0.2, 0.3)
    if config.fast:
        config = dataclasses.replace(
            config, model="reference", text="", calibration=8, windows=4, tokens=128
        )
        fractions = fractions[-1:]
    name, results = Path(config.model).name, Results(config)

    def held(kind: str, by: str, fraction: float, made_up: bool) -> bool:
        return results.holds(
            model=name, kind=kind, by=by, fraction=fraction, made_up=made_up
        )

    model, params, tokenizer = models.load(config.model, scan=False)
    inputs, batches = pruned.inputs_of(tokenizer, config)

    def measure(kind: str, fraction: float, small: Any, less: Any, **more: Any) -> None:
        report = jc.compare(
            Apply(model), params, small, batches, small_apply_fn=Apply(less)
        )
        tokens = batches[0]["tokens"]
        seconds = forward_seconds([(model, params), (less, small)], tokens, 5)
        row = {
            "model": name,
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
        }
        results.add(row)

    moments = None
    kinds = {
        "neurons": (models.neuron_groups(model), "group"),
        "heads": (models.head_groups(model), "global"),
    }
    for kind, (groups, scope) in kinds.items():
        todo = [
            (fraction, made_up)
            for fraction in fractions
            for made_up in (False, True)
            if config.only in kind and not held(kind, config.by, fraction, made_up)
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
        if config.only not in "layers" or held("layers", "influence", fraction, False):
            continue
        scores = models.layer_influence(scanned, stacked, inputs)
        groups = models.layer_groups(scanned)
        keep = {"layers": jc.structured.choose_units(scores, fraction)}
        small = models.unstack_layers(jc.structured.remove_units(stacked, groups, keep))
        less = models.resized(model, small)
        measure("layers", fraction, small, less, by="influence", made_up=False)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

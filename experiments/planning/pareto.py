"""Which methods, alone or combined, stand on the front of size and quality?

Compresses a language model by single methods and by combinations, from eight bits to
one: quantize, prune, factorize, trim the vocabulary, remove layers or neurons; codes
and levels are always entropy coded in the file. Every row is a file that was written,
tokenizer included, and loaded again; divergence and bits per byte are measured on the
end of a text and on others. What a trimmed vocabulary says has no divergence: its rows
hold bits per byte alone. Of an encoder, given as its folder, structure and vocabulary
stay, its files hold no tokenizer, and the embeddings of held-out sentences judge it.
One JSON line per row and text; rows that the results hold are left out:

    python -m experiments.planning.pareto
    python -m experiments.planning.pareto SmolLM2.gguf text.txt --only "planned;prune"
    python -m experiments.planning.pareto all-MiniLM-L6-v2 text.txt
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import OnText, parse
from experiments.common.models import Loaded, load
from experiments.common.results import Results
from experiments.common.texts import cut, digest, full_windows, split
from experiments.common.timing import Clock
from experiments.pruning.pruned import curved
from experiments.rate_distortion import original as originals
from jaxcompress import models
from jaxcompress.evaluation import Apply, LanguageModelMetrics, totals
from jaxcompress.models.saved import cast

STATES = 8  # of the trellis; more would make every row of rates better alike
COMPRESSED = ".*(kernel|embedding)"
STRUCTURE = "trim", "drop"  # groups of rows that an encoder has not


@dataclasses.dataclass(frozen=True)
class Config(OnText):
    windows: int = 32  # of each text
    only: str = ""  # rows whose group and setting hold this, or one of "this;that"
    also: str = "docstrings"  # or "docstrings,plays": further texts to measure on
    results: str = "experiments/planning/results/pareto.jsonl"


@dataclasses.dataclass(frozen=True)
class Small:
    """A model to write: its parts, and the tokenizer that belongs to it."""

    model: Any
    params: Any
    tokenizer: Any


class Makers:
    """What methods need of a model: moments and curvatures, by key of a structure.

    Those of the model itself have the key "", and may be given.
    """

    def __init__(self, start: Small, inputs: Any, measured: Any = None) -> None:
        self.start, self.inputs = start, inputs
        self._measured: dict[str, Any] = {} if measured is None else {"": measured}

    def moments(self, small: Small, key: str = "") -> Any:
        """Return moments with curvatures of a model, by the key of its structure."""
        if key not in self._measured:
            inputs = self.inputs
            if small.tokenizer is not self.start.tokenizer:  # other ids of this text
                ids = small.tokenizer.encode(
                    self.start.tokenizer.decode(inputs.ravel().tolist())
                )
                count = len(ids) // inputs.shape[-1] // inputs.shape[1]
                size = count * inputs.shape[1] * inputs.shape[2]
                inputs = np.asarray(ids[:size], np.int32).reshape(
                    count, *inputs.shape[1:]
                )
            seen = jc.collect_moments(small.model, small.params, list(inputs))
            self._measured[key] = curved(
                small.model, small.params, inputs, seen, COMPRESSED
            )
        return self._measured[key]

    def recipe(self, *stages: Any, dtype: Any = jnp.float32) -> Small:
        """Compress by stages, with moments."""
        params = cast(self.start.params, dtype)
        small = jc.compress(params, jc.chain(*stages), self.moments(self.start))
        return dataclasses.replace(self.start, params=small)

    def planned(self, rate: float, small: Small | None = None, key: str = "") -> Small:
        """Compress at planned rates."""
        small = self.start if small is None else small
        moments = self.moments(small, key)
        rules = jc.planning.plan_rates(
            small.params, moments, bits_per_weight=rate, states=STATES
        )
        return dataclasses.replace(
            small, params=jc.compress(small.params, rules, moments)
        )

    def factorized(self, share: float, *stages: Any, dtype: Any = jnp.float32) -> Small:
        """Keep a share of the weights in factors, which further stages compress."""
        ranks = jc.planning.plan_ranks(
            self.start.params, self.moments(self.start), fraction=share
        )
        return self.recipe(ranks, *stages, dtype=dtype)

    def trimmed(self, rate: float, text: str) -> Small:
        """Drop pieces that the calibration text lacks; planned rates for the rest."""
        keep = sorted({int(i) for i in self.start.tokenizer.encode(text)})
        start = self.start
        parts = models.trim_vocabulary(start.model, start.params, start.tokenizer, keep)
        small = Small(*parts)
        return self.planned(rate, small, "trimmed")

    def one_layer_less(self, rate: float) -> Small:
        """Remove the layer that changes its inputs least; planned rates."""
        model, params = self.start.model, self.start.params
        scores = models.layer_influence(model, params, self.inputs)
        keep = {"layers": jc.structured.choose_units(scores, 1 / model.layers)}
        params = jc.structured.remove_units(params, models.layer_groups(model), keep)
        looped = models.unstack_layers(params)
        less = models.resized(model.clone(scan=False), looped).clone(scan=True)
        return self.planned(
            rate, dataclasses.replace(self.start, model=less, params=params), "layers"
        )

    def fewer_neurons(self, rate: float, share: float) -> Small:
        """Remove neurons, the others compensating; planned rates."""
        model = self.start.model.clone(scan=False)
        params = models.unstack_layers(self.start.params)
        groups = models.neuron_groups(model)
        readers = r"layer_\d+/.*down_proj/kernel"
        moments = jc.collect_moments(model, params, list(self.inputs), where=readers)
        scores = jc.structured.score_units(moments, groups, params=params)
        keep = jc.structured.choose_units(scores, share)
        params = jc.structured.remove_units(params, groups, keep, moments)
        less = models.resized(model, params).clone(scan=True)
        params = models.stack_layers(params)
        return self.planned(
            rate, dataclasses.replace(self.start, model=less, params=params), "neurons"
        )


def variants(make: Makers, text: str) -> dict[tuple[str, str], Callable[[], Small]]:
    """Name group and setting of each row, and how it is made; nothing is made yet."""
    rows: dict[tuple[str, str], Callable[[], Small]] = {}

    def add(group: str, setting: str, maker: Callable[..., Small], *args: Any) -> None:
        rows[group, setting] = functools.partial(maker, *args)

    recipe, factors = make.recipe, ".*/(left|right)"
    for bits in (8, 6, 4, 3, 2):
        method = f"symmetric(bits={bits}, block=64, full_range=True)"
        add("round to nearest", f"{bits} bits", recipe, method)
    for bits in (4, 3, 2):
        method = f"gptq(bits={bits}, block=64, grid='asymmetric')"
        add("gptq", f"{bits} bits", recipe, method)
    for rate in (6, 4, 3, 2, 1.5, 1):
        method = f"rate_distortion(rate={rate}, states={STATES})"
        add("rate_distortion, equal rates", f"{rate} bits", recipe, method)
        add("rate_distortion, planned", f"{rate} bits", make.planned, rate)
    half = functools.partial(recipe, dtype=jnp.bfloat16)
    for drop in (0.3, 0.5, 0.7):
        add("prune", f"{drop:.0%} zero, bfloat16", half, f"alps(sparsity={drop})")
    for drop, bits in ((0.3, 4), (0.5, 4), (0.5, 3)):
        stages = f"alps(sparsity={drop})", f"gptq(bits={bits}, block=64)"
        add("prune, gptq", f"{drop:.0%} zero, {bits} bits", recipe, *stages)
    for drop, rate in ((0.3, 3), (0.3, 2), (0.5, 2), (0.5, 1.5)):
        levels = f"rate_distortion(rate={rate / (1 - drop):.4f}, states=0)"
        stages = f"alps(sparsity={drop})", levels
        add("prune, rates", f"{drop:.0%} zero, {rate} bits", recipe, *stages)
    keep = functools.partial(make.factorized, dtype=jnp.bfloat16)
    for share in (0.75, 0.5):
        add("factorize", f"{share:.0%} of the weights, bfloat16", keep, share)
    for share, rate in ((0.75, 4), (0.75, 2.5), (0.5, 4)):
        levels = f"rate_distortion(rate={rate}, states={STATES})"  # of all weights
        name = f"{share:.0%} of the weights, {rate} bits"
        add("factorize, rates", name, make.factorized, share, levels)
    for bits in (3, 2):
        base = f"gptq(bits={bits}, block=64, grid='asymmetric')"
        stages = f'corrected(base="{base}", rank=8)', [(factors, "symmetric(bits=8)")]
        add("gptq, low-rank correction", f"{bits} bits, rank 8", recipe, *stages)
    for rate in (3, 2, 1.5):
        add("trim, planned rates", f"{rate} bits", make.trimmed, rate, text)
    for rate in (4, 2.5, 1.5):
        add("drop a layer, planned rates", f"{rate} bits", make.one_layer_less, rate)
    for rate in (4, 2.5, 1.5):
        name = f"20% fewer, {rate} bits"
        add("drop neurons, planned rates", name, make.fewer_neurons, rate, 0.2)
    return rows


def run(config: Config) -> list[dict[str, Any]]:
    """Write, load and measure each row that the results lack."""
    if config.fast:
        only = config.only or "2 bits"
        config = dataclasses.replace(
            config, model="reference", calibration=8, windows=2, tokens=128, only=only
        )
    part = encoder if Path(config.model).is_dir() else language
    make, text, judge = part(config)
    name = Path(config.model).name
    results = Results(config, model=name)
    for (group, setting), maker in variants(make, text).items():
        label = {"group": group, "setting": setting}
        if not any(x in f"{group}, {setting}" for x in config.only.split(";")):
            continue
        if part is encoder and group.startswith(STRUCTURE):
            continue
        if results.holds(model=name, **label):
            continue
        clock = Clock()
        small = maker()
        made = {"processor_seconds": clock.processor_seconds}
        loaded, size = written(small)
        for row in judge(loaded):
            results.add({**label, **row, "file_bytes": size, **made})
    return results.rows


Judge = Callable[[Small], list[dict[str, Any]]]


def language(config: Config) -> tuple[Makers, str, Judge]:
    """Load a language model: what is made of it, of which text, and how it is judged.

    The judge returns a row for each text that is measured on.
    """
    original = load(config.model)
    parts = split(config.text, also=config.also, fraction=config.fraction)
    inputs = full_windows(
        original.tokenizer,
        parts.calibration,
        tokens=config.tokens,
        limit=config.calibration,
    )
    start = Small(original.scanned, original.dense, original.tokenizer)

    def judge(small: Small) -> list[dict[str, Any]]:
        return [
            {
                **measure(original, small, text, config),
                "text": name,
                "digest": digest(text),
                "calibration_tokens": inputs.size,
            }
            for name, text in parts.measured.items()
        ]

    return Makers(start, inputs), parts.calibration, judge


def encoder(config: Config) -> tuple[Makers, str, Judge]:
    """Load an encoder, as `language` does; the text stays unused."""
    subject = originals.encoder(
        originals.Config(config.model, config.text, also=config.also)
    )
    start = Small(*models.load(config.model, scan=True))
    seen = jc.collect_moments(subject.model, start.params, subject.batches)
    curves = jc.measure_curvatures(
        subject.scores,
        start.params,
        [{"tokens": subject.sequences}],
        seen,
        where=COMPRESSED,
        key=jax.random.key(0),
    )
    return Makers(start, None, curves), "", lambda small: subject.judge(small.params)


def written(small: Small) -> tuple[Small, int]:
    """Return what a file holds, materialized, and its bytes.

    An encoder's file holds its parameters alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        if isinstance(small.model, models.Transformer):
            models.save(path, small.model, small.params, small.tokenizer)
            small = Small(*models.load(path))
        else:
            jc.save(path, small.params)
            small = dataclasses.replace(small, params=jc.load(path))
        size = path.stat().st_size
    ready = jax.jit(jc.materialize)(small.params)
    return dataclasses.replace(small, params=ready), size


def measure(
    original: Loaded, small: Small, text: str, config: Config
) -> dict[str, Any]:
    """Compare with the original, or score alone what has another vocabulary."""
    options = {"tokens": config.tokens, "limit": config.windows}
    if small.tokenizer.digest != original.tokenizer.digest:
        batches = cut(small.tokenizer, text, **options, batch=2)
        sums = totals(LanguageModelMetrics(Apply(small.model)), small.params, batches)
        return {
            "kl": None,
            "bits_per_byte": sums["bits_per_byte"][0] / sums["bits_per_byte"][1],
            "tokens": int(sums["loss"][1]),
        }
    report = jc.compare(
        Apply(original.scanned),
        original.dense,
        small.params,
        cut(original.tokenizer, text, **options, batch=2),
        small_apply_fn=Apply(small.model),
    )
    return {
        "kl": report.kl,
        "kl_standard_error": report.kl_standard_error,
        "bits_per_byte": report.small.bits_per_byte,
        "dense_bits_per_byte": report.dense.bits_per_byte,
        "tokens": report.tokens,
    }


if __name__ == "__main__":
    run(parse(Config, __doc__))

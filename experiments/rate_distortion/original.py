"""What do bits cost models whose weights are known at their original precision?

The reference model and all-MiniLM-L6-v2, whose weights are float32 and never were
coded: rows above 3 bits rank methods here. Every kernel and embedding is compressed,
the file written, loaded again and measured: a language model by its divergence on three
texts, an encoder by the cosine between embeddings of the same sentence, and by how
often the nearest neighbour among the sentences stays the same. One JSON line per row;
rows that the results hold are left out:

    python -m experiments.rate_distortion.original
    python -m experiments.rate_distortion.original all-MiniLM-L6-v2 text.txt
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load, quality
from experiments.common.results import Results
from experiments.common.texts import cut, digest, full_windows, split
from experiments.common.timing import Clock
from experiments.distillation.sentences import encoded, sentences
from jaxcompress import models, reporting
from jaxcompress.evaluation import Apply
from jaxcompress.tree.equality import same_bits

KERNELS, TABLES = ".*kernel", "(embed|positions)/embedding"
BLOCK = 64  # inputs of a step
VARIANTS = ("nearest", "gptq", "equal rates", "planned")
SHARPNESS = 20.0  # of the softmax over cosines, as MiniLM was trained


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"  # or the folder of an encoder
    text: str = ""  # the packaged held-out text, for the reference model
    bits: tuple[int, ...] = (8, 6, 4, 3, 2)
    variants: str = ";".join(VARIANTS)
    states: int = 128
    also: str = "docstrings,plays"  # further texts to measure on
    calibration: int = 64  # windows, of 256 tokens; or as many batches of sentences
    curvature: int = 64  # sequences of 128 tokens; or as many sentences
    windows: int = 32  # of each text
    sentences: int = 2000  # in equal parts from each text
    tokens: int = 256  # in a window
    length: int = 64  # pieces of a sentence; longer ones are cut
    fast: bool = False  # the reference model at 3 bits, little text
    results: str = "experiments/rate_distortion/results/original.jsonl"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model in its scanned form, what it is calibrated on and how it is judged.

    Args:
        model: of Flax, or a function of parameters and a batch.
        params: of its scanned form.
        batches: to collect moments on.
        scores: parameters and tokens to logits, of which curvatures are measured.
        sequences: tokens `[sequences, T]` for curvatures, none of them padding.
        judge: rows of results for parameters, one for each text.
    """

    model: Any
    params: Any
    batches: list[Any]
    scores: Callable[..., jax.Array]
    sequences: np.ndarray
    judge: Callable[[Any], list[dict[str, Any]]]


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the bits and variants that the results lack; a row for each text."""
    if config.fast:
        config = dataclasses.replace(
            config,
            model="reference",
            bits=(3,),
            states=8,
            also="docstrings",
            calibration=8,
            curvature=8,
            windows=4,
        )
    subject = encoder(config) if Path(config.model).is_dir() else language(config)
    params = subject.params
    results = Results(config, model=Path(config.model).name)
    weights = reporting.weight_count(params)
    moments = jc.collect_moments(subject.model, params, subject.batches)
    if "planned" in config.variants.split(";"):
        curved = jc.measure_curvatures(
            subject.scores,
            params,
            [{"tokens": subject.sequences}],
            moments,
            key=jax.random.key(0),
        )
    for bits in config.bits:
        for variant in config.variants.split(";"):
            label = {"variant": variant, "bits": bits}
            if results.holds(model=Path(config.model).name, **label):
                continue
            planned = variant == "planned"
            known = curved if planned else moments
            clock = Clock()
            recipe = recipe_of(config, params, variant, bits, known)
            small = jc.compress(params, recipe, known)
            seconds = clock.processor_seconds
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "small.safetensors"
                jc.save(path, small)
                loaded = jc.load(path)
                if not same_bits(small, loaded):
                    raise ValueError(f"{variant}, {bits} bits: the file holds others")
                size = path.stat().st_size
            about = {
                "weights": weights,
                "file_bytes": size,
                "bits_per_weight": 8 * size / weights,
                "states": config.states if variant in VARIANTS[2:] else 0,
                "compress_processor_seconds": seconds,
            }
            for row in subject.judge(jax.jit(jc.materialize)(loaded)):
                results.add({**label, **row, **about})
    return results.rows


def recipe_of(
    config: Config, params: Any, variant: str, bits: int, known: Any
) -> list[Any]:
    """Choose methods for kernels and for tables that are looked up."""
    nearest = f"asymmetric(bits={bits}, block={BLOCK}, search=True)"
    coded = f"rate_distortion(rate={bits}, states={config.states})"
    if variant == "nearest":
        return [(KERNELS, nearest), (TABLES, nearest)]
    if variant == "gptq":
        fed_back = f"gptq(bits={bits}, block={BLOCK}, grid='asymmetric')"
        return [(KERNELS, fed_back), (TABLES, nearest)]
    if variant == "equal rates":
        return [(KERNELS, coded), (TABLES, coded)]
    return jc.planning.plan_rates(
        params,
        known,
        bits_per_weight=bits,
        where=f"{KERNELS}|{TABLES}",
        states=config.states,
    )


def language(config: Config) -> Subject:
    """Load a language model, judged by its divergence on each text."""
    original = load(config.model)
    model, dense, tokenizer = original.scanned, original.dense, original.tokenizer
    parts = split(config.text, also=config.also)
    calibration = full_windows(
        tokenizer,
        parts.calibration,
        tokens=config.tokens,
        limit=config.calibration,
        batch=min(16, config.calibration),
    )
    batches = {
        name: cut(tokenizer, text, tokens=config.tokens, limit=config.windows)
        for name, text in parts.measured.items()
    }
    digests = {name: digest(text) for name, text in parts.measured.items()}

    def judge(ready: Any) -> list[dict[str, Any]]:
        return [
            {"text": name, "digest": digests[name]}
            | quality(jc.compare(Apply(model), dense, ready, each))
            for name, each in batches.items()
        ]

    sequences = calibration.reshape(-1, 128)
    sequences = sequences[:: max(1, len(sequences) // config.curvature)]
    return Subject(
        model,
        dense,
        list(calibration),
        Apply(model),
        sequences[: config.curvature],
        judge,
    )


def encoder(config: Config) -> Subject:
    """Load an encoder, judged by its embeddings of held-out sentences.

    Curvatures are those of a softmax over the cosines with sentences of the calibration
    text, as if each were retrieved among them.
    """
    model, params, tokenizer = models.load(config.model, scan=True)
    parts = split(config.text, also=config.also)
    each = -(-config.sentences // len(parts.measured))
    held = {name: sentences(text)[:each] for name, text in parts.measured.items()}
    texts = [x for some in held.values() for x in some]
    if len(texts) < config.sentences:
        counts = {name: len(some) for name, some in held.items()}
        raise ValueError(
            f"{counts} sentences, {each} of each text wanted; name more texts in --also"
        )
    known, count = sentences(parts.calibration), 16 * config.calibration
    known = known[:: max(1, len(known) // count)][:count]
    learned = encoded(tokenizer, known, config.length)
    measured = by_length(encoded(tokenizer, texts, config.length))

    def states(params: Any, batch: Any) -> jax.Array:
        return model.apply({"params": params}, batch["tokens"], batch["mask"])

    @jax.jit
    def embed(params: Any, batch: Any) -> jax.Array:
        return models.sentence_embeddings(states(params, batch), batch["mask"])

    def embeddings(params: Any, groups: list[tuple[np.ndarray, Any]]) -> np.ndarray:
        found = np.concatenate([embed(params, batch) for _, batch in groups])
        return found[np.argsort(np.concatenate([rows for rows, _ in groups]))]

    target = embeddings(params, measured)
    bank = jnp.asarray(embeddings(params, by_length(learned)))
    lengths = learned["mask"].sum(axis=1)
    longest = np.argsort(-lengths, kind="stable")[: config.curvature]
    sequences = learned["tokens"][longest, : lengths[longest].min()]

    def scores(params: Any, tokens: jax.Array) -> jax.Array:
        whole = {"tokens": tokens, "mask": jnp.ones(tokens.shape, bool)}
        return SHARPNESS * (embed(params, whole) @ bank.T)[:, None]

    about = {
        "text": ",".join(parts.measured),
        "digest": digest("\n".join(texts)),
        "sentences": len(texts),
    }

    def judge(ready: Any) -> list[dict[str, Any]]:
        return [about | agreement(embeddings(ready, measured), target)]

    batches = [batch for _, batch in by_length(learned)]
    return Subject(states, params, batches, scores, sequences, judge)


def by_length(
    batch: dict[str, np.ndarray], size: int = 64
) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Group sentences of similar length, so that little is padded, with their rows."""
    lengths = batch["mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    groups = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = -(-int(lengths[rows].max()) // 16) * 16
        groups.append((rows, {key: x[rows, :longest] for key, x in batch.items()}))
    return groups


def agreement(mine: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Compare embeddings `[sentences, width]` of length 1 with the original ones."""
    cosines = (mine * target).sum(axis=1)
    return {
        "cosine": float(cosines.mean()),
        "cosine_5th_percentile": float(np.percentile(cosines, 5)),
        "nearest_neighbour_agreement": float((nearest(mine) == nearest(target)).mean()),
    }


def nearest(x: np.ndarray) -> np.ndarray:
    """Find each sentence's nearest neighbour among the others."""
    likeness = x @ x.T
    np.fill_diagonal(likeness, -np.inf)
    return likeness.argmax(axis=1)


if __name__ == "__main__":
    run(parse(Config, __doc__))

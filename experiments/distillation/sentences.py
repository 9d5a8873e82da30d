"""How close does a sentence encoder of half the depth come to its teacher?

Takes every second layer of all-MiniLM-L6-v2, trains it on the sentences of a text to
have the teacher's hidden states, relations among tokens (MiniLMv2) and embeddings, and
compares embeddings of other sentences with the teacher's: mean cosine, and how often a
sentence's nearest neighbour among them is the teacher's. One JSON line per row:

    python -m experiments.distillation.sentences all-MiniLM-L6-v2 text.txt

Without a text: docstrings of the standard library.
"""

import dataclasses
import functools
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import docstrings
from jaxcompress import distillation, models, reporting

HIDDEN = "layers/hidden"
STATES = tuple(f"layers/attention/{name}_proj" for name in "qkv")


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = ""  # the directory
    text: str = ""
    steps: int = 150
    batch: int = 16  # sentences in a step
    tokens: int = 32  # of a sentence; longer ones are cut
    heads: int = 12  # of the relations
    rate: float = 5e-4  # of Adam, falling linearly to zero
    heldout: int = 256  # sentences
    seed: int = 0
    fast: bool = False  # two steps
    folder: str = ""  # for checkpoints
    results: str = "experiments/distillation/results/sentences.jsonl"


def sentences(text: str) -> list[str]:
    """Split a text into sentences of 20 characters or more, each once, in order."""
    found = (" ".join(x.split()) for x in re.split(r"(?<=[.!?])\s+|\n\n+", text))
    return list(dict.fromkeys(x for x in found if 20 <= len(x) <= 400))


def encoded(tokenizer: Any, texts: list[str], length: int) -> dict[str, np.ndarray]:
    """Encode texts between the marks of the model's vocabulary, with the mask."""
    first, last = tokenizer.encode("[CLS]")[0], tokenizer.encode("[SEP]")[0]
    tokens = np.zeros((len(texts), length), np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        ids = [first, *tokenizer.encode(text)[: length - 2], last]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return {"tokens": tokens, "mask": mask}


def loss(
    student: Any,
    teacher: Any,
    heads: int,
    bound: Any,
    params: Any,
    batch: Any,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum the relative errors of hidden states, relations and embeddings."""
    del key
    tokens, mask = batch["tokens"], batch["mask"]
    names = (HIDDEN, *STATES)
    mine, inner = distillation.capture(student, names)(params, tokens, mask)
    theirs, outer = distillation.capture(teacher, names)(bound, tokens, mask)
    hidden = distillation.over_layers(
        functools.partial(distillation.hidden_states, kind="relative"),
        inner[HIDDEN],
        outer[HIDDEN],
        mask=mask,
    )
    related = sum(
        distillation.relations(inner[x][-1], outer[x][-1], heads=heads, mask=mask)
        for x in STATES
    )
    mine, theirs = (models.sentence_embeddings(x, mask) for x in (mine, theirs))
    metrics = {
        "hidden": distillation.mean(hidden, mask),
        "relations": distillation.mean(related, mask),
        "cosine": (mine * theirs).sum(axis=-1).mean(),
    }
    total = metrics["hidden"] + metrics["relations"] + 1 - metrics["cosine"]
    return total, metrics


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the student before and after training; two rows."""
    if config.fast:
        config = dataclasses.replace(config, steps=2, batch=2, tokens=16, heldout=8)
    teacher, params, tokenizer = models.load(config.model, scan=True)
    student, start = models.fewer_layers(teacher, params, 2)
    text = jc.tokenization.read_text(config.text) if config.text else docstrings()
    found = sentences(text)
    held = encoded(tokenizer, found[-config.heldout :], config.tokens)
    learned = encoded(tokenizer, found[: -config.heldout], config.tokens)

    def embeddings(model: Any, params: Any) -> np.ndarray:
        states = jax.jit(model.apply)({"params": params}, held["tokens"], held["mask"])
        return np.asarray(models.sentence_embeddings(states, jnp.asarray(held["mask"])))

    target = embeddings(teacher, params)

    def nearest(x: np.ndarray) -> np.ndarray:
        likeness = x @ x.T
        np.fill_diagonal(likeness, -np.inf)
        return likeness.argmax(axis=1)

    results = Results(config)

    def add(name: str, small: Any, steps: int, seconds: float) -> None:
        mine = embeddings(student, small)
        row = {
            "row": name,
            "steps": steps,
            "cosine": float((mine * target).sum(axis=1).mean()),
            "nearest_neighbour_agreement": float(
                (nearest(mine) == nearest(target)).mean()
            ),
            "heldout_sentences": len(target),
            "training_sentences": len(learned["tokens"]),
            "text": Path(config.text).stem or "docstrings",
            "layers": student.layers,
            "weights": reporting.weight_count(start),
            "teacher_weights": reporting.weight_count(params),
            "sentences_per_step": config.batch,
            "tokens": config.tokens,
            "seed": config.seed,
            "processor_seconds": seconds,
        }
        results.add(row)

    def batch_at(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((config.seed, step))
        rows = random.integers(0, len(learned["tokens"]), config.batch)
        return {name: x[rows] for name, x in learned.items()}

    add("every second layer", start, 0, 0.0)
    # The embedding stays: it is most of the weights, and the teacher's own.
    optimizer = jc.optimizers.by_name(
        [
            ("(embed|positions|types)/.*", None),
            (".*", optax.adam(optax.linear_schedule(config.rate, 0.0, config.steps))),
        ]
    )
    watched = (x.clone(sow_intermediates=True) for x in (student, teacher))
    bound = jax.tree_util.Partial(
        functools.partial(loss, *watched, config.heads), params
    )
    step = jc.make_train_step(bound, optimizer)
    clock = time.process_time()

    def say(number: int, metrics: dict[str, float]) -> None:
        if number % 10 == 0:
            print(number, {k: round(x, 4) for k, x in metrics.items()}, flush=True)

    state = distillation.train(
        step,
        distillation.init_state(start, optimizer, key=jax.random.key(0)),
        batch_at,
        steps=config.steps,
        folder=config.folder or None,
        every=50,
        report=say,
    )
    add("distilled", state.params, config.steps, time.process_time() - clock)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

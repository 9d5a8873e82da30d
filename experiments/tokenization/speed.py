"""How fast is text encoded, beside SentencePiece alone and Hugging Face's tokenizers?

The sources of the standard library, file by file: tokenizers of one size are trained on
a part of them, and encode the rest in one process and in two. Processor time counts all
threads and processes; wall time depends on what else the machine does. Then one
sentence of growing length: the best segmentation, found by dynamic programming, beside
the greedy one. One JSON line per row:

    python -m experiments.tokenization.speed
"""

import dataclasses
import functools
import os
import random
import resource
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import sentencepiece
import tokenizers

from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import library_files, sha256
from jaxcompress import reporting, tokenization
from jaxcompress.tokenization import unigrams


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = 8192
    train_bytes: int = 2_000_000
    encode_bytes: int = 8_000_000
    repeats: int = 3  # of each measurement, interleaved; the median is kept
    lengths: str = "100,1000,10000,100000"  # characters of one sentence
    fast: bool = False
    results: str = "experiments/tokenization/results/speed.jsonl"


def seconds() -> float:
    """Count processor time of this process and of children that have ended."""
    usage = [
        resource.getrusage(who)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def timed(work: Callable[[], int]) -> tuple[float, float, int]:
    """Time work in this process and in its children: processor, passed, tokens."""
    cpu, wall = seconds(), time.perf_counter()
    tokens = work()
    return seconds() - cpu, time.perf_counter() - wall, tokens


def engines(train: list[str], texts: list[str], size: int) -> dict[str, Callable]:
    """Make calls that encode all texts and return the number of ids, by name."""
    found: dict[str, Callable[[], int]] = {}
    for kind in ("bpe", "unigram"):
        stored = tokenization.train(train, kind=kind, vocab_size=size).to_bytes()
        plain = sentencepiece.SentencePieceProcessor()
        plain.LoadFromSerializedProto(stored)
        for processes in (1, 2):

            def ours(stored=stored, processes=processes) -> int:
                fresh = tokenization.from_bytes(stored)  # knows no word yet
                many = tokenization.encode_many(fresh, texts, processes=processes)
                return sum(len(ids) for ids in many)

            def theirs(plain=plain, processes=processes) -> int:
                many = plain.Encode(texts, out_type=int, num_threads=processes)
                return sum(len(ids) for ids in many)

            found[f"jaxcompress {kind}, {processes}"] = ours
            found[f"SentencePiece {kind}, {processes}"] = theirs
    for kind in ("wordpiece", "dictionary"):
        tokenizer = tokenization.train(train, kind=kind, vocab_size=size)
        found[f"jaxcompress {kind}, 1"] = lambda tokenizer=tokenizer: sum(
            len(ids) for ids in tokenization.encode_many(tokenizer, texts)
        )
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    built.pre_tokenizer = level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=level.alphabet(), show_progress=False
    )
    built.train_from_iterator(train, trainer)

    def one() -> int:
        return sum(len(built.encode(text).ids) for text in texts)

    def batch() -> int:
        return sum(len(found.ids) for found in built.encode_batch_fast(texts))

    found["HF byte-level bpe, 1"] = one
    found[f"HF byte-level bpe, {os.cpu_count()} threads"] = batch
    return found


def sentence_rows(train: list[str], lengths: list[int]) -> list[dict[str, Any]]:
    """Time Viterbi and greedy segmentation of one sentence without spaces."""
    tokenizer = tokenization.train(train, kind="unigram", vocab_size=2000)
    scores = {p.text: p.score for p in tokenizer.table if p.type == 1}
    longest = max(map(len, scores))
    plain = sentencepiece.SentencePieceProcessor()
    plain.LoadFromSerializedProto(tokenizer.to_bytes())
    letters = "".join(c for c in "".join(train) if c.isalpha() and c in scores)
    ways = {
        "viterbi": functools.partial(unigrams.viterbi, scores=scores, longest=longest),
        "greedy": functools.partial(unigrams.greedy, pieces=scores, longest=longest),
        "sentencepiece": plain.EncodeAsPieces,
    }
    rows = []
    for length in lengths:
        text = letters[:length]
        row: dict[str, Any] = {"sentence": length}
        for name, work in ways.items():
            clock = time.process_time()
            parts = work(text)
            row[f"{name}_cpu_seconds"] = time.process_time() - clock
            row[f"{name}_tokens"] = len(parts)
            row[f"{name}_nats"] = -sum(scores[part] for part in parts)
        rows.append(row)
    return rows


def run(config: Config) -> list[dict[str, Any]]:
    """Time each engine, and each length of a sentence; a row for each."""
    if config.fast:
        config = dataclasses.replace(
            config,
            vocab_size=800,
            train_bytes=100_000,
            encode_bytes=100_000,
            repeats=1,
            lengths="100,1000",
        )
    files = library_files(few=config.fast)
    names = sorted(files, key=sha256)
    train, texts, size = [], [], 0
    for name in names:
        part = train if size < config.train_bytes else texts
        if size >= config.train_bytes + config.encode_bytes:
            break
        part.append(files[name])
        size += len(files[name].encode())
    megabytes = len("".join(texts).encode()) / 1e6
    packages = ("sentencepiece", "tokenizers")
    results = Results(
        config,
        hide=("config",),
        experiment="tokenizers_speed",
        config=dataclasses.asdict(config),
        versions={name: metadata.version(name) for name in packages},
    )
    work = engines(train, texts, config.vocab_size)
    times: dict[str, list] = {name: [] for name in work}
    order = [name for name in work for _ in range(config.repeats)]
    random.Random(0).shuffle(order)
    for name in reporting.track(order, "encoding", unit="runs"):
        times[name].append(timed(work[name]))
    for name, found in times.items():
        cpu, wall, tokens = sorted(found)[len(found) // 2]
        results.add(
            {
                "engine": name,
                "megabytes": megabytes,
                "texts": len(texts),
                "tokens": tokens,
                "cpu_seconds": cpu,
                "wall_seconds": wall,
                "mb_per_cpu_second": megabytes / cpu,
                "mb_per_second": megabytes / wall,
            }
        )
    for row in sentence_rows(train, [int(x) for x in config.lengths.split(",")]):
        results.add(row)
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

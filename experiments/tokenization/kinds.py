"""How do kinds of tokenizers compare, and which of them lose nothing?

Every kind at several sizes, trained on the first part of a text and measured on its end
(in domain) and on docstrings of the standard library (out of domain), beside plain
SentencePiece with its defaults and Hugging Face's tokenizers. With `--fuzz`, random
strings and bytes are encoded and decoded too. One JSON line per row; rows that are
there are not computed again:

    python -m experiments.tokenization.kinds text.txt
"""

import dataclasses
import io
import random
import re
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from experiments.common.config import parse
from experiments.common.results import Results
from experiments.common.texts import docstrings
from jaxcompress import tokenization

KINDS = {
    "bpe": {},
    "bpe across spaces": {"split_words": False, "split_scripts": False},
    "unigram": {"kind": "unigram"},
    "wordpiece": {"kind": "wordpiece"},
    "dictionary": {"kind": "dictionary"},
    "word": {"kind": "word"},
    "char": {"kind": "char"},
}
PEERS = ("SentencePiece bpe", "SentencePiece unigram", "HF bpe", "HF unigram")
RESERVED = [
    *("<unk>", "<s>", "</s>", "<pad>", "<0x0A>", "<0xE2>", "▁", "▁▁", "\u2581the"),
    *("<|endoftext|>", "[UNK]", "##s", "Ġ", "\ufffd", "\ufeff", "\uffff", "\x7f"),
    *("\0", "\x01", "\x1b", "\x85", "\u00a0", "\u2028", "\u200b", "\u202e", "\u0301"),
    *(
        " ",
        "    ",
        "\t",
        "\t\t",
        "\n",
        "\r\n",
        "\n\n\n",
        " \n ",
        "the ",
        " of",
        "12345",
    ),
]


@dataclasses.dataclass(frozen=True)
class Config:
    text: str = ""  # by default the first docstrings, so that out of domain is missing
    fraction: float = 0.8  # of the text, for training
    sizes: str = "1024,4096,8192,32768"
    kinds: str = ",".join((*KINDS, *PEERS))
    fuzz: int = 100_000  # strings, for tokenizers without loss of the second size
    fast: bool = False
    results: str = "experiments/tokenization/results/kinds.jsonl"


def fuzz_texts(count: int, seed: int) -> Iterator[str]:
    """Draw strings of any code points but surrogates, controls, reserved pieces."""
    draw = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(1, 14)):
            choice = draw.random()
            if choice < 0.4:
                parts.append(draw.choice(RESERVED))
            elif choice < 0.6:
                parts.append(chr(draw.randrange(0x250)))
            else:
                point = draw.randrange(draw.choice((0x3000, 0x10000, 0x110000)))
                parts.append("" if 0xD800 <= point < 0xE000 else chr(point))
        yield "".join(parts)


def failures(tokenizer: tokenization.Tokenizer, count: int) -> dict[str, int]:
    """Count random strings, and random bytes, that do not come back."""
    strings = sum(
        tokenizer.decode(tokenizer.encode(text)) != text
        for text in fuzz_texts(count, seed=1)
    )
    draw, wrong = random.Random(2), 0
    for _ in range(count // 10):
        data = draw.randbytes(draw.randrange(1, 24)) + draw.choice(RESERVED).encode()
        ids = tokenization.encode_bytes(tokenizer, data)
        wrong += tokenization.decode_bytes(tokenizer, ids) != data
    return {"fuzz_strings": count, "fuzz_failures": strings, "byte_failures": wrong}


class Plain:
    """SentencePiece as it comes, for `measure`."""

    def __init__(self, lines: list[str], kind: str, size: int):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=size,
            num_threads=1,
            minloglevel=2,
        )
        other = tokenization.from_bytes(model.getvalue())
        self.vocab_size, self.pieces, self.byte_ids = (
            other.vocab_size,
            other.pieces,
            None,
        )
        self.token_bytes, self.encode, self.decode = (
            other.token_bytes,
            other.encode,
            other.decode,
        )


def huggingface(lines: list[str], kind: str, size: int) -> tokenization.Tokenizer:
    """Train byte-level BPE, or Unigram with SentencePiece's spaces, of `tokenizers`."""
    if kind == "bpe":
        built = tokenizers.Tokenizer(tokenizers.models.BPE())
        level = tokenizers.pre_tokenizers.ByteLevel
        built.pre_tokenizer = level(add_prefix_space=False)
        built.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=level.alphabet(), show_progress=False
        )
    else:
        built = tokenizers.Tokenizer(tokenizers.models.Unigram())
        built.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        built.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=size,
            special_tokens=["<unk>"],
            unk_token="<unk>",
            show_progress=False,
        )
    built.train_from_iterator(lines, trainer)
    return tokenization.from_huggingface_json(built.to_str())


def build(name: str, lines: list[str], size: int) -> Any:
    """Train a tokenizer, as large as asked for or as the corpus carries."""
    family, _, kind = name.partition(" ")
    if family == "HF":
        return huggingface(lines, kind, size)
    while True:
        try:
            if family == "SentencePiece":
                return Plain(lines, kind, size)
            text = ["".join(lines)]
            return tokenization.train(text, vocab_size=size, **KINDS[name])
        except (ValueError, RuntimeError) as error:
            largest = re.search(r"at most (\d+)|<= *(\d+)", str(error))
            if not largest:
                raise
            size = int(largest[1] or largest[2])


def row(name: str, size: int, lines, inside, outside, fuzz: int) -> dict[str, Any]:
    """Train one tokenizer and measure it on both texts; its row."""
    clock = time.process_time()
    tokenizer = build(name, lines, size)
    training = time.process_time() - clock
    clock = time.process_time()
    for line in inside:
        tokenizer.encode(line)
    encoding = time.process_time() - clock
    found: dict[str, Any] = {
        "tokenizer": name,
        "asked": size,
        "vocab_size": tokenizer.vocab_size,
        "train_bytes": len("".join(lines).encode()),
        "train_cpu_seconds": training,
        "encode_mb_per_cpu_second": len("".join(inside).encode()) / 1e6 / encoding,
    }
    for where, texts in (("in", inside), ("out", outside)):
        if texts:
            measures = dataclasses.asdict(tokenization.measure(tokenizer, texts))
            found |= {f"{where}_{key}": value for key, value in measures.items()}
    if fuzz and name in KINDS:
        found |= failures(tokenizer, fuzz)
    return found


def run(config: Config) -> list[dict[str, Any]]:
    """Measure the rows that the results lack."""
    if config.fast:
        config = dataclasses.replace(config, sizes="600", fuzz=300)
    if config.text:
        whole = tokenization.read_text(config.text)
        outside = docstrings().splitlines(keepends=True)
    else:
        whole, outside = docstrings(40_000 if config.fast else 400_000), []
    cut = whole.index("\n", int(len(whole) * config.fraction)) + 1
    lines = whole[:cut].splitlines(keepends=True)
    inside = whole[cut:].splitlines(keepends=True)
    name_of = Path(config.text).stem or "docstrings"
    packages = ("sentencepiece", "tokenizers")
    results = Results(
        config,
        experiment="tokenizers_kinds",
        text=name_of,
        versions={name: metadata.version(name) for name in packages},
    )
    sizes = [int(size) for size in config.sizes.split(",")]
    for name in config.kinds.split(","):
        for size in sizes:
            if results.holds(text=name_of, tokenizer=name, asked=size):
                continue
            fuzz = config.fuzz if size == sizes[min(1, len(sizes) - 1)] else 0
            results.add(row(name, size, lines, inside, outside, fuzz))
    return results.rows


if __name__ == "__main__":
    run(parse(Config, __doc__))

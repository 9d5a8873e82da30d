"""Measures of what a tokenizer does to a text."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from jaxcompress.tokenization.dictionaries import WORDS
from jaxcompress.tokenization.encoding import encode_many
from jaxcompress.tokenization.tokenizer import Tokenizer

RENYI = 2.5  # the order that agreed best with quality in the source


@dataclasses.dataclass(frozen=True)
class Measures:
    """Counts and rates of one tokenizer on some texts.

    Attributes:
      bytes: UTF-8 bytes of the texts.
      tokens: ids they became.
      words: runs of letters, single digits, runs of other signs, by `WORDS["rules"]`;
        spaces alone are none.
      bytes_per_token: of text.
      tokens_per_word: also called fertility.
      coverage: fraction of the bytes of text that are in known pieces.
      unknown_rate: fraction of tokens that are not: single bytes (in a byte-level
        vocabulary, which has nothing else, parts of a character) or the unknown id.
      vocabulary_use: fraction of the vocabulary that occurs.
      renyi_efficiency: Renyi entropy of order 2.5 of the ids over the logarithm of the
        vocabulary, 1 where all are equally frequent (Zouhar et al., 2023, arXiv
        2306.16842).
      exact: whether every text was restored.

    Example:
      >>> measures = jc.tokenization.measure(tokenizer, ["a small text"])
    """

    bytes: int
    tokens: int
    words: int
    bytes_per_token: float
    tokens_per_word: float
    coverage: float
    unknown_rate: float
    vocabulary_use: float
    renyi_efficiency: float
    exact: bool


def count_pieces(
    tokenizer: Tokenizer, texts: Iterable[str], *, processes: int = 1
) -> np.ndarray:
    """Return how often each id occurs in the texts, int64 [vocabulary].

    Args:
      tokenizer: that encodes.
      texts: to encode.
      processes: that encode them.

    Example:
      >>> counts = jc.tokenization.count_pieces(tokenizer, ["a small text"])
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for ids in encode_many(tokenizer, texts, processes=processes):
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
    return counts


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Measures:
    """Encode, decode and count. Raises ValueError where the texts are empty.

    Args:
      tokenizer: that encodes.
      texts: to encode.

    Example:
      >>> measures = jc.tokenization.measure(tokenizer, ["a small text"])
    """
    if isinstance(texts, str):
        raise ValueError("texts is one string; pass a list of texts")
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    size = words = 0
    exact = True
    for text in texts:
        ids = tokenizer.encode(text)
        exact &= tokenizer.decode(ids) == text
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        size += len(text.encode("utf-8", "surrogatepass"))
        words += sum(not word.isspace() for word in WORDS["rules"].findall(text))
    tokens = int(counts.sum())
    if not tokens:
        raise ValueError("the texts are empty; there is nothing to measure")
    unknown = _unknown(tokenizer)
    regular = np.flatnonzero(~unknown)
    covered = min(size, int(counts[regular] @ tokenizer.token_bytes(regular)))
    return Measures(
        bytes=size,
        tokens=tokens,
        words=words,
        bytes_per_token=size / tokens,
        tokens_per_word=tokens / max(words, 1),
        coverage=covered / size,
        unknown_rate=float(counts[unknown].sum()) / tokens,
        vocabulary_use=float((counts > 0).mean()),
        renyi_efficiency=renyi_entropy(counts) / math.log(tokenizer.vocab_size),
        exact=exact,
    )


def renyi_entropy(counts: np.ndarray, order: float = RENYI) -> float:
    """Compute the Renyi entropy in nats of the distribution of counts; order 1 is
    Shannon's.

    Args:
      counts: of each id.
      order: of the entropy, above 0.

    Example:
      >>> float(jc.tokenization.renyi_entropy(np.array([1, 1]), order=1))
      0.6931471805599453
    """
    shares = counts[counts > 0] / counts.sum()
    if order == 1:
        return float(-(shares * np.log(shares)).sum())
    return float(np.log((shares**order).sum()) / (1 - order))


def embedding_bytes(
    tokenizer: Tokenizer, width: int, *, bits: float = 16, tied: bool = True
) -> int:
    """Return bytes of a model's embedding, and of its head where that is another
    matrix.

    Args:
      tokenizer: whose vocabulary has a row each.
      width: features of a row.
      bits: of a weight.
      tied: the head is the embedding, so that rows are stored once.

    Example:
      >>> size = jc.tokenization.embedding_bytes(tokenizer, 64)
    """
    return math.ceil(tokenizer.vocab_size * width * bits / 8) * (1 if tied else 2)


def _unknown(tokenizer: Tokenizer) -> np.ndarray:
    """Return which ids mean nothing, or a byte because there is no better
    piece.
    """
    if tokenizer.byte_ids is None:
        return np.array([not _is_text(piece) for piece in tokenizer.pieces])
    unknown = np.array([not piece for piece in tokenizer.pieces])
    unknown[np.array(tokenizer.byte_ids)] = True
    return unknown


def _is_text(piece: bytes) -> bool:
    try:
        return bool(piece.decode())
    except UnicodeDecodeError:
        return False

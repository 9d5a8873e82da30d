"""Segmentations drawn by chance, to train models that depend less on one of them.

Sources: subword regularization, Kudo, 2018, arXiv 1804.10959; BPE-dropout, Provilkov et
al., 2020, 1910.13267. SentencePiece has both, but its source of chance is one for the
whole thread and cannot be set again; here a seed gives the same ids everywhere.
"""

import random
import re

from jaxcompress.tokenization import byte_pairs, unigrams
from jaxcompress.tokenization.piece_models import NORMAL, USER_DEFINED
from jaxcompress.tokenization.sentencepieces import SentencePieceTokenizer
from jaxcompress.tokenization.symbols import SPACE, any_of


def sample(
    tokenizer: SentencePieceTokenizer,
    text: str,
    *,
    seed: int,
    dropout: float = 0.1,
    alpha: float = 0.2,
) -> list[int]:
    """Return ids of the text in a random segmentation; decoding them gives the same
    text.

    Args:
      tokenizer: of kind "bpe" or "unigram", from `train`.
      text: what to encode.
      seed: the same seed gives the same ids.
      dropout: for "bpe", probability that a merge is left out; 0 is `encode`.
      alpha: for "unigram", power of the segmentations' probabilities; 0 makes all
        equally likely, a large number is `encode`.

    Raises:
      ValueError: on another kind of tokenizer, one that loses text, a dropout outside
        [0, 1] and a negative alpha.

    Example:
      >>> texts = ["aab abb"] * 20
      >>> tokenizer = jc.tokenization.train(texts, kind="bpe", vocab_size=270)
      >>> ids = jc.tokenization.sample(tokenizer, "aab", seed=1, dropout=0.5)
      >>> tokenizer.decode(ids)
      'aab'
    """
    kind = getattr(tokenizer, "kind", type(tokenizer).__name__)
    if kind not in ("bpe", "unigram") or not tokenizer.lossless:
        raise ValueError(
            f"segmentations of a {kind} tokenizer are not sampled; train one of kind "
            "bpe or unigram, without loss"
        )
    if not 0 <= dropout <= 1 or alpha < 0:
        raise ValueError(
            f"dropout is {dropout} and alpha {alpha}; a dropout is in [0, 1], an alpha "
            "is not negative"
        )
    draw = random.Random(seed)
    table = tokenizer.table
    ids = {
        piece.text.replace(SPACE, " "): i
        for i, piece in enumerate(table)
        if piece.type in (NORMAL, USER_DEFINED)
    }
    scores = {p.text.replace(SPACE, " "): p.score for p in table if p.type == NORMAL}
    user = [p.text for p in table if p.type == USER_DEFINED]
    symbol = re.compile(f"({any_of(user)})")
    longest = max(map(len, scores))
    encoded: list[int] = []

    def rank(left: str, right: str) -> float | None:
        score = scores.get(left + right)
        return None if score is None else -score

    def pieces(word: str) -> list[str]:
        if kind == "bpe":
            return byte_pairs.segment(word, rank, dropout=dropout, draw=draw)
        return unigrams.sample(word, scores, alpha=alpha, draw=draw, longest=longest)

    for part, raw in tokenizer.parts(text):
        if raw:
            encoded += _bytes(tokenizer, part)
            continue
        for i, plain in enumerate(symbol.split(part)):
            if i % 2:
                encoded.append(ids[plain])
                continue
            for word in tokenizer.words(plain):
                for piece in pieces(word):
                    number = ids.get(piece)
                    encoded += _bytes(tokenizer, piece) if number is None else [number]
    return encoded


def _bytes(tokenizer: SentencePieceTokenizer, text: str) -> list[int]:
    raw = text.encode("utf-8", "surrogatepass")
    return [tokenizer.byte_ids[byte] for byte in raw]

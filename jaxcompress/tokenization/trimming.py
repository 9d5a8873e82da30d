"""A tokenizer without the pieces that a domain never uses."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxcompress.tokenization import byte_pairs
from jaxcompress.tokenization.dictionaries import DictionaryTokenizer
from jaxcompress.tokenization.huggingface import BYTE_OF, HuggingFaceTokenizer
from jaxcompress.tokenization.piece_models import NORMAL
from jaxcompress.tokenization.sentencepieces import SentencePieceTokenizer
from jaxcompress.tokenization.symbols import BYTE_PIECE
from jaxcompress.tokenization.tokenizer import Tokenizer


def trim(tokenizer: Tokenizer, keep: Iterable[int]) -> tuple[Tokenizer, np.ndarray]:
    """Return tokenizer with these pieces and what they need, and their old ids, sorted.

    New id `i` is old id `kept[i]`, so `embedding[kept]` is the new embedding. A text
    whose encoding uses kept pieces only is encoded as before: its new ids are the
    places of the old ones in `kept`. Any other text is still encoded, in smaller pieces
    and bytes, and is still restored.

    Kept besides are marks, symbols, bytes, and, in byte-pair encoding, every piece that
    arises on the way to a kept one: merges are never undone, so the merges inside a
    piece are those of its own text, and a merge may be dropped when no kept
    piece needs it. In unigram models the rarest piece stays, because unknown characters
    cost more than it.

    Args:
      tokenizer: from `train`, or a byte-pair tokenizer.json.
      keep: ids, for example where `count_pieces(tokenizer, texts)` is positive.

    Raises:
      ValueError: on ids outside the vocabulary, and on tokenizers whose other pieces
        cannot be told from needed ones.

    Example:
      >>> smaller = jc.tokenization.trim(tokenizer, tokenizer.encode("a small text"))
    """
    kept = {int(i) for i in keep}
    if kept and not (min(kept) >= 0 and max(kept) < tokenizer.vocab_size):
        raise ValueError(
            f"ids {min(kept)} to {max(kept)} are to be kept, and the tokenizer has 0 "
            f"to {tokenizer.vocab_size - 1}"
        )
    if isinstance(tokenizer, SentencePieceTokenizer):
        kept |= _needed(tokenizer, kept)
        return tokenizer.keep(kept), np.array(sorted(kept))
    if isinstance(tokenizer, DictionaryTokenizer):
        kept.update(range(tokenizer.byte_ids[-1] + 1))
        return tokenizer.keep(kept), np.array(sorted(kept))
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _trim_huggingface(tokenizer, kept)
    raise ValueError(f"a {type(tokenizer).__name__} cannot be trimmed")


def _needed(tokenizer: SentencePieceTokenizer, kept: set[int]) -> set[int]:
    table = tokenizer.table
    needed = {i for i, piece in enumerate(table) if piece.type != NORMAL}
    normal = [i for i in range(len(table)) if i not in needed]
    if tokenizer.kind == "unigram":
        needed.add(min(normal, key=lambda i: table[i].score))
    if tokenizer.kind == "bpe":
        ids = {table[i].text: i for i in normal}

        def rank(left: str, right: str) -> float | None:
            i = ids.get(left + right)
            return None if i is None else -table[i].score

        for i in kept.intersection(normal):
            merged: list[str] = []
            byte_pairs.segment(table[i].text, rank, merged=merged)
            needed.update(
                ids[piece] for piece in (*merged, *table[i].text) if piece in ids
            )
    return needed


def _trim_huggingface(
    tokenizer: HuggingFaceTokenizer, kept: set[int]
) -> tuple[HuggingFaceTokenizer, np.ndarray]:
    contents = json.loads(tokenizer.to_bytes())
    described = json.loads(contents["tokenizer"])
    model = described["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(
            f"a tokenizer.json of type {model['type']} cannot be trimmed, only one of "
            "byte-pair encoding"
        )
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    ranks: dict[tuple[str, str], int] = {}
    for i, pair in enumerate(merges):
        ranks.setdefault(pair, i)
    texts = {i: text for text, i in vocabulary.items()}
    added = {token["id"] for token in described["added_tokens"]}
    kept |= added | {
        i
        for text, i in vocabulary.items()
        if text in BYTE_OF
        or BYTE_PIECE.fullmatch(text)
        or text == model.get("unk_token")
    }
    for i in sorted(kept - added):
        merged: list[str] = []
        byte_pairs.segment(texts[i], lambda *pair: ranks.get(pair), merged=merged)
        kept.update(
            vocabulary[text] for text in (*merged, *texts[i]) if text in vocabulary
        )
    order = np.array(sorted(kept))
    new = {int(old): i for i, old in enumerate(order)}
    model["vocab"] = {text: new[i] for text, i in vocabulary.items() if i in kept}
    model["merges"] = [
        list(pair) for pair in merges if {*pair, "".join(pair)} <= model["vocab"].keys()
    ]
    for token in described["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(described.get("post_processor"), new)
    del contents["tokenizer"]  # its marks stay
    text = json.dumps(described, ensure_ascii=False)
    return HuggingFaceTokenizer(text, **contents), order


def _renumber(part: Any, new: Mapping[int, int]) -> None:
    """Return ids of special tokens in a post-processor, in place."""
    if isinstance(part, list):
        for item in part:
            _renumber(item, new)
    elif isinstance(part, dict):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new[i] for i in token["ids"]]
        for item in part.get("processors", ()):
            _renumber(item, new)

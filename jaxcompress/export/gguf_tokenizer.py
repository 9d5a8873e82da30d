"""A tokenizer as the metadata of a GGUF file."""

import itertools
import json
import re
from typing import Any

from jaxcompress.models.gguf_tokenizers import PRE_TOKENIZERS, SPACE, piece_merges
from jaxcompress.tokenization import Tokenizer, piece_models
from jaxcompress.tokenization.piece_models import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

# Of the names that mean the same words, the one that llama.cpp reads so.
NAMES = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def tokenizer_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return keys `tokenizer.ggml.*` of a byte-level or SentencePiece BPE tokenizer.

    Raises ValueError where llama.cpp would segment text otherwise; says how.
    """
    stored = tokenizer.to_bytes()
    if not stored.startswith(b"{"):
        metadata = _pieces(stored)
    else:
        contents = json.loads(stored)
        if "tokenizer" not in contents:
            raise ValueError(
                f"a {type(tokenizer).__name__} has no counterpart in GGUF; pass "
                "tokenizer=None"
            )
        described = json.loads(contents["tokenizer"])
        has_bytes = described["model"].get("byte_fallback")
        metadata = (_byte_fallback if has_bytes else _byte_level)(described)
        for mark in ("bos", "eos"):
            if contents.get(mark) is not None:
                i = metadata["tokens"].index(contents[mark])
                metadata[f"{mark}_token_id"] = i
                added = contents.get(f"add_{mark}", mark == "bos")
                metadata[f"add_{mark}_token"] = bool(added)
    for mark in ("bos", "eos"):
        if (i := getattr(tokenizer, f"{mark}_id")) is not None:
            metadata[f"{mark}_token_id"] = i
    metadata.setdefault("add_bos_token", tokenizer.bos_id is not None)
    metadata.setdefault("add_eos_token", False)
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def _byte_level(described: dict[str, Any]) -> dict[str, Any]:
    model = described["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"a tokenizer.json of type {model.get('type')} has no counterpart; BPE has "
            "one, of bytes or of SentencePiece's pieces"
        )
    tokens, types = _tokens(described)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "model": "gpt2",
        "pre": _pre_tokenizer(described),
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
    }


def _tokens(described: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return texts and types of all tokens, in the order of their numbers."""
    added = {token["id"]: token for token in described.get("added_tokens") or ()}
    ids = {i: text for text, i in described["model"]["vocab"].items()}
    ids |= {i: token["content"] for i, token in added.items()}
    count = max(ids) + 1
    types = [NORMAL if i in ids else UNUSED for i in range(count)]
    for i, token in added.items():
        types[i] = CONTROL if token["special"] else USER_DEFINED
    return [ids.get(i, f"[PAD{i}]") for i in range(count)], types


def _byte_fallback(described: dict[str, Any]) -> dict[str, Any]:
    """Return SentencePiece BPE as written in a tokenizer.json, as Llama's and Gemma's.

    llama.cpp joins two pieces wherever their text is a piece, best score first. Scores
    are the ranks of merges, and must give those merges back.
    """
    model = described["model"]
    steps = described.get("normalizer") or {}
    steps = steps.get("normalizers", [steps])
    kinds = [step.get("type") for step in steps]
    prefixed = kinds == ["Prepend", "Replace"] and steps[0]["prepend"] == SPACE
    replaces = kinds[-1:] == ["Replace"] and (
        steps[-1]["pattern"] == {"String": " "} and steps[-1]["content"] == SPACE
    )
    if not replaces or not (prefixed or len(steps) == 1):
        raise ValueError(
            f"the normalizer {json.dumps(described.get('normalizer'))} has no "
            "counterpart; llama.cpp replaces spaces, and may put one before a text"
        )
    tokens, types = _tokens(described)
    for i, text in enumerate(tokens):
        if text == model.get("unk_token"):
            types[i] = UNKNOWN
        elif types[i] == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[i] = BYTE
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = [-float(ranks.get(text, len(ranks))) for text in tokens]
    wanted = [(left, right) for *_, left, right in piece_merges(tokens, types, scores)]
    if _by_piece(wanted) != _by_piece(merges):
        raise ValueError(
            "the merges of this tokenizer.json are not those that scores of pieces "
            "give, which llama.cpp follows; pass tokenizer=None and convert the "
            "tokenizer with llama.cpp's own script"
        )
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_space_prefix": prefixed,
    }
    if UNKNOWN in types:
        metadata["unknown_token_id"] = types.index(UNKNOWN)
    return metadata


def _by_piece(merges: list[tuple[str, str]]) -> list[tuple[str, list]]:
    """Return pieces in the order in which merges make them, and the merges of each."""
    groups = itertools.groupby(merges, key="".join)
    return [(piece, sorted(pairs)) for piece, pairs in groups]


def _pre_tokenizer(described: dict[str, Any]) -> str:
    words = _words(described.get("pre_tokenizer"))
    for name in NAMES:
        if words == [x for step in PRE_TOKENIZERS[name] for x in _words(step)]:
            return name
    raise ValueError(
        f"the pre-tokenizer {json.dumps(described.get('pre_tokenizer'))} is none of "
        f"those that are known to llama.cpp by name here ({', '.join(NAMES)}); pass "
        "tokenizer=None and convert the tokenizer with llama.cpp's own script"
    )


def _words(step: dict[str, Any] | None) -> list[tuple]:
    """Return what decides how text is cut into words, in sequence."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [x for part in step["pretokenizers"] for x in _words(part)]
    keys = {
        "ByteLevel": ("add_prefix_space", "use_regex"),
        "Digits": ("individual_digits",),
        "Split": ("pattern", "behavior", "invert"),
    }.get(step["type"], tuple(step))
    return [(step["type"], *(json.dumps(step.get(key, True)) for key in keys))]


def _pieces(model: bytes) -> dict[str, Any]:
    read = piece_models.read(model)
    if read.kind != "bpe":
        raise ValueError(
            f"a SentencePiece model of kind {read.kind} has no counterpart for "
            "decoders in GGUF; train one of kind bpe, or pass tokenizer=None"
        )
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.text for piece in read.pieces],
        "scores": [piece.score for piece in read.pieces],
        "token_type": [piece.type for piece in read.pieces],
        "add_space_prefix": read.dummy_prefix,
    }

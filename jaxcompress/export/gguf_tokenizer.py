"""A tokenizer as the metadata of a GGUF file."""

import json
from typing import Any

from jaxcompress.models.gguf_tokenizers import PRE_TOKENIZERS
from jaxcompress.tokenization import Tokenizer, piece_models
from jaxcompress.tokenization.piece_models import CONTROL, NORMAL, UNUSED, USER_DEFINED

# Of the names that stand for the same words, the one that llama.cpp reads so.
NAMES = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def tokenizer_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys `tokenizer.ggml.*` of a byte-level or SentencePiece BPE tokenizer.

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
        metadata = _byte_level(json.loads(contents["tokenizer"]))
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
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(
            f"a tokenizer.json of type {model.get('type')} with byte_fallback="
            f"{model.get('byte_fallback')} has no counterpart; byte-level BPE has one, "
            "and SentencePiece BPE from its tokenizer.model"
        )
    added = {token["id"]: token for token in described.get("added_tokens") or ()}
    ids = {i: text for text, i in model["vocab"].items()}
    ids |= {i: token["content"] for i, token in added.items()}
    count = max(ids) + 1
    types = [NORMAL if i in ids else UNUSED for i in range(count)]
    for i, token in added.items():
        types[i] = CONTROL if token["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "model": "gpt2",
        "pre": _pre_tokenizer(described),
        "tokens": [ids.get(i, f"[PAD{i}]") for i in range(count)],
        "token_type": types,
        "merges": merges,
    }


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
    """What decides how text is cut into words, in sequence."""
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

"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face `tokenizer.json`.

The file stores tokens, merges and the *name* of a pre-tokenizer; what the name means is
written down here, from the tokenizers of the models that introduced it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcompress import tokenization
from jaxcompress.tokenization import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # a space in a SentencePiece vocabulary


def _pattern(digits: str) -> str:
    """Return words as the recent families split them, with numbers of so many
    digits.
    """
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _byte_level(words: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": words,  # GPT-2's own words
    }


def _split(pattern: str) -> list[dict[str, Any]]:
    isolated = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return [isolated, _byte_level(words=False)]


GPT2_WORDS = [_byte_level(words=True)]
_DIGITS = [{"type": "Digits", "individual_digits": True}, _byte_level(words=True)]
_LLAMA3 = _split(_pattern(r"\p{N}{1,3}"))
QWEN2_WORDS = _split(_pattern(r"\p{N}"))

PRE_TOKENIZERS = {
    "default": GPT2_WORDS,
    "gpt-2": GPT2_WORDS,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": QWEN2_WORDS,
    "deepseek-r1-qwen": QWEN2_WORDS,
}


def tokenizer_from(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer a GGUF file's metadata describes; None where it has none.

    As in llama.cpp, text is not normalized (Qwen's own tokenizer composes characters
    first), so that decoding gives back what was encoded. Texts begin and end with marks
    as `add_bos_token` and `add_eos_token` say; where they do not, only SentencePiece
    and Llama 3 vocabularies have a begin mark, as in llama.cpp. Raises ValueError on a
    kind or a pre-tokenizer that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer kind {kind!r} is not supported; supported are gpt2 (byte-level "
            "BPE) and llama (SentencePiece BPE)"
        )
    described = _byte_bpe(metadata) if kind == "gpt2" else _sentencepiece_bpe(metadata)
    described |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata),
        "post_processor": None,
    }
    marks: dict[str, Any] = {}
    defaults = {"bos": kind == "llama" or _pre_tokenizer(metadata) is _LLAMA3}
    for mark in ("bos", "eos"):
        i = metadata.get(f"tokenizer.ggml.{mark}_token_id")
        marks[mark] = None if i is None else _tokens(metadata)[i]
        added = metadata.get(f"tokenizer.ggml.add_{mark}_token")
        marks[f"add_{mark}"] = bool(
            defaults.get(mark, False) if added is None else added
        )
    ends = [metadata.get(f"tokenizer.ggml.{x}_token_id") for x in ("eot", "eom")]
    marks["ends"] = [int(i) for i in ends if i is not None]
    text = json.dumps(described, ensure_ascii=False)
    return tokenization.from_huggingface_json(text, **marks)


def byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: list,
    words: list[dict[str, Any]],
    *,
    normalizer: dict[str, Any] | None = None,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """Build a tokenizer.json of byte pairs, without added tokens.

    `words` are the steps of its pre-tokenizer: `GPT2_WORDS`, `QWEN2_WORDS` and so on.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
        "post_processor": None,
        "decoder": _byte_level(words=True),
        "model": _bpe(vocabulary, merges, ignore_merges=ignore_merges),
    }


def _required(metadata: Mapping[str, Any], name: str) -> Any:
    if (key := f"tokenizer.ggml.{name}") not in metadata:
        raise ValueError(f"the GGUF file lacks {key}; it is incomplete")
    return metadata[key]


def _byte_bpe(metadata: Mapping[str, Any]) -> dict[str, Any]:
    steps = _pre_tokenizer(metadata)
    return byte_level_bpe(
        {token: i for i, token in enumerate(_tokens(metadata))},
        _required(metadata, "merges"),
        steps,
        ignore_merges=steps is _LLAMA3,
    )


def _pre_tokenizer(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"pre-tokenizer {name!r} is not known; known are "
            f"{', '.join(PRE_TOKENIZERS)}. Load the model from its Hugging Face "
            "directory"
        )
    return PRE_TOKENIZERS[name]


def _sentencepiece_bpe(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return pieces with scores: every way to join two pieces is a merge, best score
    first.
    """
    tokens, types = _tokens(metadata), _types(metadata)
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    ids = {token: i for i, token in enumerate(tokens)}
    merges = piece_merges(tokens, types, _required(metadata, "scores"))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prefix, strip = [], []
    if prefixed:
        prefix = [{"type": "Prepend", "prepend": SPACE}]
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    unknown = [tokens[i] for i, type_ in enumerate(types) if type_ == UNKNOWN]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _bpe(
            ids,
            [[left, right] for *_, left, right in merges],
            byte_fallback=BYTE in types,
            fuse_unk=True,
            unk_token=unknown[0] if unknown else None,
        ),
    }


def piece_merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple]:
    """Return every way to join two pieces, best score first; the pair ends each
    entry.
    """
    pieces, merges = set(tokens), []
    for i, token in enumerate(tokens):
        if types[i] != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                merges.append((-scores[i], -len(left), -len(right), i, left, right))
    return sorted(merges)


def _bpe(vocabulary: Mapping[str, int], merges: list, **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocabulary),
        "merges": merges,
    } | options


def _added_tokens(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    types = _types(metadata)
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] != USER_DEFINED,
        }
        for i, token in enumerate(_tokens(metadata))
        if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    return metadata["tokenizer.ggml.tokens"]


def _types(metadata: Mapping[str, Any]) -> list[int]:
    tokens = _tokens(metadata)
    return metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))

"""The tokenizer of a Hugging Face directory, from the files that describe it.

`tokenizer.json`, or `vocab.json` with `merges.txt`, or SentencePiece's
`tokenizer.model`; next to it `tokenizer_config.json`, `special_tokens_map.json`,
`added_tokens.json` and `generation_config.json`, each where the directory has it.
"""

import json
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxcompress import tokenization
from jaxcompress.models.gguf_tokenizers import GPT2_WORDS, QWEN2_WORDS, byte_level_bpe
from jaxcompress.models.settings import Setting, Table, check, harmless, only
from jaxcompress.tokenization import Tokenizer
from jaxcompress.tokenization.huggingface import added_marks
from jaxcompress.tokenization.piece_models import (
    with_end_mark,
    with_symbols,
    without_begin_mark,
)

MARKS = ("bos", "eos")
TABLE: Table = {
    **{
        key: Setting("affects")
        for key in (
            *(f"{mark}_token" for mark in MARKS),
            *(f"add_{mark}_token" for mark in MARKS),
            "added_tokens_decoder",
            "add_prefix_space",
            "tokenizer_class",
        )
    },
    **harmless(
        "model_max_length max_length padding padding_side pad_to_multiple_of "
        "pad_token_type_id truncation truncation_side truncation_strategy stride "
        "chat_template response_schema clean_up_tokenization_spaces legacy "
        "use_default_system_prompt spaces_between_special_tokens errors name_or_path "
        "special_tokens_map_file tokenizer_file vocab_file merges_file processor_class "
        "trust_remote_code auto_map use_fast from_slow backend is_local "
        "local_files_only model_input_names additional_special_tokens "
        "extra_special_tokens model_specific_special_tokens special_tokens "
        "return_token_type_ids add_special_tokens device_map vocab_size "
        # What tokenizer.json says itself.
        "do_lower_case do_basic_tokenize strip_accents tokenize_chinese_chars "
        "never_split sp_model_kwargs tokenizer_type"
    ),
    "split_special_tokens": only(
        False, reason="text that spells a special token is that token here"
    ),
}
_OTHER_MARKS = r"\w+_token(_id)?"  # of padding, images, tools: not in a model's text

_WORDS = {  # by class: normalizer, pre-tokenizer, end mark where none is named
    "GPT2Tokenizer": (None, GPT2_WORDS),
    "Qwen2Tokenizer": ({"type": "NFC"}, QWEN2_WORDS),
}
_CLASSES = {
    "gpt2": "GPT2Tokenizer",
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
}
_CONTROL = ("</s>", "<eos>")  # which a model names itself
_DEFAULT_END = "<|endoftext|>"


def read_tokenizer(
    directory: str | Path, *, ignore: Collection[str] = ()
) -> Tokenizer | None:
    """Read the directory's tokenizer, with its begin and end marks, or None.

    Texts have the marks that `add_bos_token` and `add_eos_token` in
    tokenizer_config.json say; where they do not, those that the post-processor of
    tokenizer.json adds. Names of marks are in tokenizer_config.json, or else in
    special_tokens_map.json. Generation ends at every id that generation_config.json,
    or else config.json, lists. `ignore` are settings to pass over.

    Raises:
      ValueError: a setting that is not known, or an added token that contradicts the
        vocabulary; each is named.
    """
    directory = Path(directory)
    settings = _json(directory / "tokenizer_config.json")
    checked = {k: x for k, x in settings.items() if not re.fullmatch(_OTHER_MARKS, k)}
    checked |= {k: x for k, x in settings.items() if k in TABLE}
    source = str(directory / "tokenizer_config.json")
    check(checked, TABLE, of="tokenizers", source=source, ignore=ignore)
    settings = {key: x for key, x in settings.items() if key not in ignore}
    named = _json(directory / "special_tokens_map.json")
    marks = {f"{mark}_token": _mark(settings, named, mark) for mark in MARKS}
    added = _added(directory, settings)
    described, pieces = directory / "tokenizer.json", directory / "tokenizer.model"
    if described.exists():
        text = tokenization.read_text(described)
    elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        text = _from_merges(directory, settings, marks)
    elif pieces.exists():
        return _sentencepiece(pieces.read_bytes(), settings, marks, added)
    else:
        return None
    contents = json.loads(text)
    if "model" in contents:
        if added and _add(contents, added, str(directory)):
            text = json.dumps(contents, ensure_ascii=False)
        if _prefix(contents.get("pre_tokenizer"), settings.get("add_prefix_space")):
            text = json.dumps(contents, ensure_ascii=False)
    return _with_marks(text, settings, marks, _ends(directory))


def _with_marks(
    text: str,
    settings: Mapping[str, Any],
    names: Mapping[str, str | None],
    ends: list[int],
) -> Tokenizer:
    post = added_marks(text)
    marks: dict[str, Any] = {}
    for mark, position in (("bos", 0), ("eos", -1)):
        token = names[f"{mark}_token"]
        add = settings.get(f"add_{mark}_token")
        if add and token is None:
            raise ValueError(
                f"tokenizer_config.json: add_{mark}_token is true, and no file names "
                f"the {mark}_token; name it, or pass the key over: load(..., "
                f"ignore=('add_{mark}_token',))"
            )
        if add is None:
            add = bool(post) and post[position] == token
        marks |= {mark: token, f"add_{mark}": add}
    tokenizer = tokenization.from_huggingface_json(text, **marks, ends=ends)
    outside = [i for i in ends if not 0 <= i < tokenizer.vocab_size]
    if outside:
        warnings.warn(
            f"texts end at the ids {outside} by eos_token_id, and the tokenizer has "
            f"{tokenizer.vocab_size}: these are left out",
            stacklevel=2,
        )
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _mark(
    settings: Mapping[str, Any], named: Mapping[str, Any], mark: str
) -> str | None:
    key = f"{mark}_token"
    token = settings.get(key) or named.get(key)
    return token["content"] if isinstance(token, dict) else token


def _added(directory: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return tokens that other files add to the vocabulary, by id."""
    added = {}
    for content, i in _json(directory / "added_tokens.json").items():
        added[int(i)] = {"content": content, "special": True, "normalized": False}
    for i, token in settings.get("added_tokens_decoder", {}).items():
        added[int(i)] = dict(token)
    return dict(sorted(added.items()))


def _add(
    contents: dict[str, Any], added: Mapping[int, dict[str, Any]], source: str
) -> bool:
    """Add tokens that a tokenizer.json lacks, in place; whether there were any."""
    present = {token["id"]: token["content"] for token in contents["added_tokens"]}
    vocabulary = contents["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # pairs of a piece and its score
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    spelled = {i: piece for piece, i in vocabulary.items()} | present
    next_id = max(spelled, default=-1) + 1
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more = []
    for i, token in added.items():
        content = token["content"]
        if spelled.get(i, content) != content:
            raise ValueError(
                f"{source}: token {i} is {spelled[i]!r} in tokenizer.json, and "
                f"{content!r} among the added tokens; remove the wrong one"
            )
        if i > next_id:
            raise ValueError(
                f"{source}: the added token {content!r} has id {i}, and no token has "
                f"id {next_id}; ids follow one another without a gap"
            )
        next_id = max(next_id, i + 1)
        if i not in present:
            more.append({**options, "special": False, **token, "id": i})
    contents["added_tokens"] = [*contents["added_tokens"], *more]
    return bool(more)


def _prefix(part: Any, prefix: bool | None) -> bool:
    """Set `add_prefix_space` of byte-level pre-tokenizers; whether one changed."""
    if part is None or prefix is None:
        return False
    changed = [_prefix(other, prefix) for other in part.get("pretokenizers", ())]
    if part["type"] == "ByteLevel" and part.get("add_prefix_space", True) != prefix:
        part["add_prefix_space"] = prefix
        return True
    return any(changed)


def _ends(directory: Path) -> list[int]:
    """Return the ids at which generation ends, besides the end mark."""
    for name in ("generation_config.json", "config.json"):
        ids = _json(directory / name).get("eos_token_id")
        if ids is not None:
            return list(ids) if isinstance(ids, list) else [ids]
    return []


def _from_merges(
    directory: Path, settings: Mapping[str, Any], marks: dict[str, str | None]
) -> str:
    """Return a tokenizer.json from GPT-2's two files; fills in the class's own end
    mark.
    """
    config = _json(directory / "config.json")
    name = settings.get("tokenizer_class") or _CLASSES.get(config.get("model_type"))
    name = str(name).removesuffix("Fast")
    if name not in _WORDS:
        raise ValueError(
            f"{directory} has vocab.json and merges.txt of a tokenizer {name!r}, whose "
            f"words are not known; known are {', '.join(_WORDS)}. Write a "
            "tokenizer.json with transformers' save_pretrained"
        )
    normalizer, words = _WORDS[name]
    vocabulary = _json(directory / "vocab.json")
    lines = tokenization.read_text(directory / "merges.txt").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    if marks["eos_token"] is None and _DEFAULT_END in vocabulary:
        marks["eos_token"] = _DEFAULT_END
    special = [x for x in dict.fromkeys(marks.values()) if x in vocabulary]
    contents = byte_level_bpe(vocabulary, merges, words, normalizer=normalizer)
    contents["added_tokens"] = [
        {
            "id": vocabulary[token],
            "content": token,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": True,
        }
        for token in special
    ]
    return json.dumps(contents, ensure_ascii=False)


def _sentencepiece(
    model: bytes,
    settings: Mapping[str, Any],
    marks: Mapping[str, str | None],
    added: Mapping[int, dict[str, Any]],
) -> Tokenizer:
    symbols = {i: token["content"] for i, token in added.items()}
    model = with_symbols(model, symbols)
    if settings.get("add_bos_token") is False:
        model = without_begin_mark(model)
    end = marks["eos_token"]
    if end in symbols.values() and end not in _CONTROL:
        model = with_end_mark(model, end)
    return tokenization.from_bytes(model)

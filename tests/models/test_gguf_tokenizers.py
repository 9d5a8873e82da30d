"""Tokenizers of GGUF files and of directories split and mark as their models expect."""

import json

import jax.numpy as jnp
import pytest
from checkpoints_for_tests import BYTE_METADATA, GOLDEN, PIECES

from jaxcompress import tokenization
from jaxcompress.export import huggingface
from jaxcompress.models.gguf_tokenizers import tokenizer_from
from jaxcompress.models.loading import load
from jaxcompress.models.tokenizer_files import read_tokenizer


def test_digits_are_split_although_a_merge_exists(tokenizer):
    ids = {piece: i for i, piece in enumerate(PIECES)}
    assert tokenizer.encode("ab ab12<|end|>") == [
        *(ids["ab"], ids["Ġab"], ids["1"], ids["2"], ids["<|end|>"])
    ]
    together = tokenizer_from(BYTE_METADATA | {"tokenizer.ggml.pre": "gpt-2"})
    assert together.encode("12") == [ids["12"]]
    assert tokenizer.decode(tokenizer.encode("ab 1 2 ab")) == "ab 1 2 ab"
    assert tokenizer.decode(tokenizer.encode("à")) == "à"


def test_number_groups_of_the_families():
    digits = [str(i) for i in range(10)]
    merged = ["12", "123", "1234"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*digits, *merged],
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4"],
    }

    def pieces(pre):
        words = tokenizer_from(metadata | {"tokenizer.ggml.pre": pre})
        return [words.decode([i]) for i in words.encode("1234")]

    assert pieces("llama-bpe") == ["123", "4"]
    assert pieces("qwen2") == ["1", "2", "3", "4"]
    assert pieces("default") == ["1234"]


def test_sentencepiece_kind_merges_by_score_and_falls_back_to_bytes():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [2, 3, 3] + [6] * 256
    words = {"▁": -9.0, "a": -9.0, "b": -9.0, "c": -9.0, "bc": -1.0, "ab": -2.0,
             "▁a": -3.0}  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*pieces, *words],
        "tokenizer.ggml.scores": [0.0] * len(pieces) + list(words.values()),
        "tokenizer.ggml.token_type": types + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = tokenizer_from(metadata)
    assert tokenizer.bos_id == 1
    found = [metadata["tokenizer.ggml.tokens"][i] for i in tokenizer.encode("abc ab é")]
    assert found == ["▁a", "bc", "▁", "ab", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc ab é")) == "abc ab é"
    bare = tokenizer_from(metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert bare.decode(bare.encode("abc ab é")) == "abc ab é"
    assert len(bare.encode("a")) == 1


BEGIN = BYTE_METADATA | {"tokenizer.ggml.bos_token_id": 0}


@pytest.mark.parametrize(
    ("said", "pre", "bos_id", "add_eos"),
    [
        ({"add_bos_token": False}, "llama-bpe", None, False),
        ({"add_bos_token": True, "add_eos_token": True}, "smollm", 0, True),
        ({}, "smollm", None, False),  # as llama.cpp does
        ({}, "llama-bpe", 0, False),
    ],
)
def test_gguf_marks_are_those_that_the_file_says(said, pre, bos_id, add_eos, tmp_path):
    said = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    tokenizer = tokenizer_from(BEGIN | {"tokenizer.ggml.pre": pre} | said)
    again = tokenization.from_bytes(tokenizer.to_bytes())
    for words in (tokenizer, again, tokenization.trim(tokenizer, [])[0]):
        assert (words.bos_id, words.eos_id, words.add_eos) == (bos_id, 0, add_eos)
    assert again.digest == tokenizer.digest
    path = tmp_path / "text.tokens"
    tokenization.write_tokens(path, tokenizer, [[5, 6]])
    end = [0] if bos_id is None or add_eos else []
    wanted = [*([] if bos_id is None else [bos_id]), 5, 6, *end]
    assert tokenization.open_tokens(path).tolist() == wanted


@pytest.mark.parametrize(
    ("settings", "template", "marks"),
    [
        ({"add_bos_token": False}, True, (None, 0, False)),
        ({"add_bos_token": True, "add_eos_token": True}, False, (1, 0, True)),
        ({}, True, (1, 0, False)),
        ({}, False, (None, 0, False)),
    ],
)
def test_huggingface_marks_are_those_that_the_directory_says(
    settings, template, marks, tmp_path, tokenizer
):
    described = json.loads(json.loads(tokenizer.to_bytes())["tokenizer"])
    if template:
        single = [
            {"SpecialToken": {"id": "a", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        described["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}},
        }
    settings = {"bos_token": "a", "eos_token": {"content": "<|end|>"}} | settings
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    words = read_tokenizer(tmp_path)
    assert (words.bos_id, words.eos_id, words.add_eos) == marks
    model, params, _ = load(GOLDEN / "llama", dtype=jnp.float32)
    huggingface(tmp_path / "out", model, params, words)
    words = read_tokenizer(tmp_path / "out")
    assert (words.bos_id, words.eos_id, words.add_eos) == marks


def test_a_sentencepiece_model_loses_its_begin_mark_where_the_directory_says(tmp_path):
    trained = tokenization.train(["abc ab é " * 20], kind="bpe", vocab_size=270)
    (tmp_path / "tokenizer.model").write_bytes(trained.to_bytes())
    assert read_tokenizer(tmp_path).digest == trained.digest
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    words = read_tokenizer(tmp_path)
    assert (trained.bos_id, words.bos_id, words.eos_id) == (1, None, 2)
    assert words.symbols["<s>"] == 1 and words.kind == "bpe"
    assert words.encode("abc <s> é") == trained.encode("abc <s> é")
    assert tokenization.from_bytes(words.to_bytes()).bos_id is None
    assert tokenization.trim(words, [])[0].bos_id is None

"""Tokenizers of Hugging Face directories: every file is read, or refused."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxcompress import tokenization
from jaxcompress.export.huggingface_directory import (
    write_generation,
    write_tokenizer,
)
from jaxcompress.models.gguf_tokenizers import tokenizer_from
from jaxcompress.models.tokenizer_files import read_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(prefix=False):
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<|end|>", "<|turn|>"])  # 256, 257
    return words.to_str()


@pytest.fixture
def directory(tmp_path):
    def write(**files):
        for name, contents in files.items():
            text = contents if isinstance(contents, str) else json.dumps(contents)
            (tmp_path / f"{name}.json").write_text(text)
        return tmp_path

    return write


def test_marks_named_by_special_tokens_map(directory):
    path = directory(
        tokenizer=byte_level(),
        tokenizer_config={"add_bos_token": True},
        special_tokens_map={
            "bos_token": {"content": "<|turn|>"},
            "eos_token": "<|end|>",
        },
    )
    words = read_tokenizer(path)
    assert (words.bos_id, words.eos_id) == (257, 256)


@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_every_end_of_a_list_ends(name, directory, tmp_path):
    path = directory(
        tokenizer=byte_level(),
        tokenizer_config={"eos_token": "<|end|>"},
        **{name: {"eos_token_id": [256, 257]}},
    )
    words = read_tokenizer(path)
    assert (words.eos_id, words.end_ids) == (256, (256, 257))
    stored = tokenization.from_bytes(words.to_bytes())
    assert stored.end_ids == (256, 257)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", words)
    write_generation(tmp_path / "out", words, None)
    assert read_tokenizer(tmp_path / "out").end_ids == (256, 257)
    small, kept = tokenization.trim(words, [0, 65])
    assert [int(kept[i]) for i in small.end_ids] == [256, 257]


def test_one_end_changes_no_digest(directory):
    plain = read_tokenizer(directory(tokenizer=byte_level()))
    path = directory(generation_config={"eos_token_id": None})
    assert read_tokenizer(path).digest == plain.digest
    assert plain.end_ids == ()
    named = directory(tokenizer_config={"eos_token": "<|end|>"})
    digest = read_tokenizer(named).digest
    path = directory(generation_config={"eos_token_id": 256})
    assert read_tokenizer(path).digest == digest


def test_gguf_ends_at_turns_too():
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*ALPHABET, "<|end|>", "<|turn|>"],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.eot_token_id": 257,
    }
    assert tokenizer_from(metadata).end_ids == (256, 257)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<|im|>": 258}},
        {"tokenizer_config": {"added_tokens_decoder": {
            "256": {"content": "<|end|>", "special": True},
            "258": {"content": "<|im|>", "special": True},
        }}},
    ],
)  # fmt: skip
def test_added_tokens_join_a_tokenizer_json(files, directory):
    words = read_tokenizer(directory(tokenizer=byte_level(), **files))
    assert words.vocab_size == 259
    assert words.encode("<|im|>") == [258]
    assert words.decode([258]) == "<|im|>"


def test_added_tokens_that_contradict_are_refused(directory):
    path = directory(tokenizer=byte_level(), added_tokens={"<|im|>": 256})
    with pytest.raises(ValueError, match=r"token 256 is '<\|end\|>'.*'<\|im\|>'"):
        read_tokenizer(path)


def test_added_tokens_join_a_sentencepiece_model(tmp_path):
    text = "the quick brown fox jumps over the lazy dog. " * 50
    plain = tokenization.train([text], kind="bpe", vocab_size=300)
    (tmp_path / "tokenizer.model").write_bytes(plain.to_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 300, "</s>": 2}')
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "<|im_end|>"}')
    words = read_tokenizer(tmp_path)
    assert (words.vocab_size, words.eos_id, words.bos_id) == (301, 300, plain.bos_id)
    assert words.encode("<|im_end|>") == [300]
    assert words.encode("the fox<|im_end|>") == [*plain.encode("the fox"), 300]
    assert words.decode(words.encode(text)) == text
    again = tokenization.from_bytes(words.to_bytes())
    assert (again.eos_id, again.end_ids) == (300, (300,))
    config.write_text('{"add_bos_token": false}')
    words = read_tokenizer(tmp_path)
    assert (words.bos_id, words.eos_id) == (None, plain.eos_id)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 302}')
    with pytest.raises(ValueError, match="has id 302, which is after a gap"):
        read_tokenizer(tmp_path)


def test_vocabulary_and_merges(directory, tmp_path):
    vocabulary = {c: i for i, c in enumerate([*ALPHABET, "ab", "Ġab", "12"])}
    vocabulary["<|endoftext|>"] = 259
    path = directory(vocab=vocabulary, tokenizer_config={})
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n1 2\n")
    with pytest.raises(ValueError, match=r"of a tokenizer 'None'.*GPT2Tokenizer"):
        read_tokenizer(path)
    directory(config={"model_type": "gpt2"})
    words = read_tokenizer(path)
    assert words.encode("ab ab12<|endoftext|>") == [256, 257, 258, 259]
    assert (words.bos_id, words.eos_id) == (None, 259)
    directory(tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    words = read_tokenizer(path)
    digits = [vocabulary["1"], vocabulary["2"]]
    assert words.encode("ab12") == [256, *digits]
    assert words.encode("a\u0301") == words.encode("á")  # composed first


def test_prefix_space_as_the_configuration_says(directory):
    path = directory(tokenizer=byte_level(), tokenizer_config={})
    assert len(read_tokenizer(path).encode("a")) == 1
    directory(tokenizer_config={"add_prefix_space": True})
    assert len(read_tokenizer(path).encode("a")) == 2


def test_unknown_settings_are_refused_or_passed_over(directory):
    path = directory(
        tokenizer=byte_level(),
        tokenizer_config={"wings": 2, "image_token": "<img>", "padding_side": "left"},
    )
    with pytest.raises(ValueError, match=r"wings = 2: not known.*ignore=\('wings',\)"):
        read_tokenizer(path)
    assert read_tokenizer(path, ignore=("wings",)).vocab_size == 258
    directory(tokenizer_config={"split_special_tokens": True})
    with pytest.raises(ValueError, match="split_special_tokens is True"):
        read_tokenizer(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"add_bos_token": True}}, "no file names the bos_token"),
        ({"added_tokens": {"<|far|>": 300}}, r"'<|far|>' has id 300.* has id 258"),
    ],
)
def test_marks_without_a_name_and_gaps_are_refused(files, message, directory):
    path = directory(tokenizer=byte_level(), **files)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(path)


def test_a_mark_without_a_name_may_be_passed_over(directory):
    config = {"add_bos_token": True, "add_eos_token": True}
    path = directory(tokenizer=byte_level(), tokenizer_config=config)
    assert read_tokenizer(path, ignore=tuple(config)).bos_id is None


def test_ends_outside_the_vocabulary_are_named(directory):
    ends = {"eos_token_id": [257, 9999]}
    path = directory(tokenizer=byte_level(), generation_config=ends)
    with pytest.warns(UserWarning, match=r"\[9999\] by eos_token_id.*has 258"):
        assert read_tokenizer(path).end_ids == (257,)


def test_a_merge_that_is_no_token_says_who_cannot_read_it(directory, tmp_path):
    vocabulary = {c: i for i, c in enumerate(ALPHABET)}
    path = directory(vocab=vocabulary, config={"model_type": "gpt2"})
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match=r"tokenizers .* cannot read this.*`ab`"):
        read_tokenizer(path)


def test_a_gguf_file_without_merges_is_incomplete():
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ALPHABET}
    with pytest.raises(ValueError, match=r"lacks tokenizer\.ggml\.merges"):
        tokenizer_from(metadata)

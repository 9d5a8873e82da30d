"""Tokenizers lose nothing, repeat themselves, and say what is wrong."""

import hashlib
import json
import random

import pytest

from jaxcompress import tokenization

CORPUS = [
    "def area(width, height):\n    return width * height  # in metres\n\n" * 20,
    "The quick brown fox\n\tjumps over 12345 lazy dogs; naïve café, 漢字.\n" * 20,
]
KINDS = {"bpe": 400, "unigram": 310, "char": 400, "word": 320}
# What SentencePiece might take for its own symbols, or drop, or change.
TRAPS = [
    *("<unk>", "<s>", "</s>", "<0x0A>", "<pad>", "▁", "▁▁", "▁def", "e\u2581", "\0"),
    *("\t", "\n", "\r\n", " ", "    ", "\x7f", "\x85", "\u2585", "\ufffd", "\ufeff"),
    *("\ue000", "\ud800", "\udfff", "\U0010ffff", "é", "e\u0301", "ﬁ", "漢", "①"),
    *("def ", "return", "return ", "12345", "quick", " quick"),
]


@pytest.fixture(scope="module")
def trained():
    return {
        kind: tokenization.train(CORPUS, kind=kind, vocab_size=size)
        for kind, size in KINDS.items()
    }


def random_texts(count, seed):
    """Strings of traps, Latin-1 with control characters, and any code points."""
    draw = random.Random(seed)
    highest = (0x110000, 0x800, 0x100, 0x80)
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(12)):
            if draw.random() < 0.5:
                parts.append(draw.choice(TRAPS))
            else:
                parts.append(chr(draw.randrange(draw.choice(highest))))
        yield "".join(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_string_comes_back(trained, kind):
    tokenizer = trained[kind]
    for text in [*random_texts(10_000, seed=1), *TRAPS, *CORPUS, ""]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(3 <= i < tokenizer.vocab_size for i in ids), "a mark came from text"
        size = len(text.encode("utf-8", "surrogatepass"))
        assert tokenizer.token_bytes(ids).sum() == size


def test_a_space_that_is_no_piece_is_not_the_space_symbol():
    spaceless = ["".join(text.split(" ")) for text in CORPUS]
    tokenizer = tokenization.train(spaceless, vocab_size=330)
    assert tokenizer.decode(tokenizer.encode("a b▁c ")) == "a b▁c "


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_bytes(trained, kind):
    again = tokenization.train(iter(CORPUS), kind=kind, vocab_size=KINDS[kind])
    assert again.to_bytes() == trained[kind].to_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_stored_and_read_again(trained, kind):
    tokenizer = trained[kind]
    again = tokenization.from_bytes(tokenizer.to_bytes())
    text = CORPUS[0] + "▁ and Ω"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.digest == hashlib.sha256(tokenizer.to_bytes()).hexdigest()
    assert again.digest == tokenizer.digest
    assert (again.bos_id, again.eos_id) == (1, 2)


def test_different_tokenizers_have_different_digests(trained):
    assert len({tokenizer.digest for tokenizer in trained.values()}) == len(KINDS)


def test_vocabulary_has_the_size_asked_for(trained):
    assert trained["bpe"].vocab_size == KINDS["bpe"]
    assert trained["unigram"].vocab_size == KINDS["unigram"]
    assert trained["char"].vocab_size <= KINDS["char"]


def test_pieces_shorten_text_and_span_indentation_and_newlines(trained):
    code = CORPUS[0]
    assert len(trained["bpe"].encode(code)) < len(code) / 3
    assert len(trained["char"].encode(code)) == len(code)
    tokenizer = trained["bpe"]
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(code)]
    assert any(piece.startswith("   ") for piece in pieces)
    assert any(piece.strip() and piece.endswith("\n") for piece in pieces)


def test_options_change_what_a_piece_may_join(trained):
    def joins(**options):
        tokenizer = tokenization.train(CORPUS, vocab_size=400, **options)
        return [tokenizer.decode([i]) for i in tokenizer.encode(CORPUS[0])]

    def inner_space(pieces):
        return any(" " in piece.strip() for piece in pieces)

    assert not inner_space(joins())
    assert inner_space(joins(split_words=False))
    assert not any("(w" in piece for piece in joins())
    assert any("(w" in piece for piece in joins(split_scripts=False))
    digits = ["12345 " * 200]
    one = tokenization.train(digits, vocab_size=265)
    assert len(one.encode("12345")) == 5
    many = tokenization.train(digits, vocab_size=266, split_digits=False)
    assert len(many.encode("12345")) < 5


def test_half_a_character_decodes_to_a_replacement(trained):
    ids = trained["bpe"].encode("Ω")
    assert len(ids) == 2
    assert trained["bpe"].decode(ids[:1]) == "\ufffd"
    assert trained["bpe"].decode([1, *ids, 2]) == "Ω"


def test_long_lines_and_odd_characters_reach_the_trainer():
    text = "\0".join(["zyxw"] * 5000) + "\ud800"  # no newline, a NUL, a surrogate
    tokenizer = tokenization.train([text], vocab_size=270)
    assert len(tokenizer.encode("zyxw")) == 1


@pytest.mark.parametrize("texts", [[], [""], ["\n", "  \n"]])
def test_an_empty_corpus_is_an_error(texts):
    with pytest.raises(ValueError, match="no text"):
        tokenization.train(texts, vocab_size=300)


def test_errors_say_what_would_do():
    with pytest.raises(ValueError, match=r"100000.*at most \d+"):
        tokenization.train(CORPUS, vocab_size=100_000)
    with pytest.raises(ValueError, match=r"100000.*at most \d+"):
        tokenization.train(CORPUS, kind="unigram", vocab_size=100_000)
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"is 100, but .* take \d+"):
            tokenization.train(CORPUS, kind=kind, vocab_size=100)
    with pytest.raises(ValueError, match="one string"):
        tokenization.train(CORPUS[0], vocab_size=300)
    with pytest.raises(ValueError, match="'bpe', 'unigram', 'char', 'word'"):
        tokenization.train(CORPUS, kind="letters", vocab_size=300)


def test_the_largest_vocabulary_named_by_the_error_works():
    with pytest.raises(ValueError, match="at most") as caught:
        tokenization.train(CORPUS, vocab_size=100_000)
    largest = int(str(caught.value).split("at most ")[1].split(";")[0])
    assert tokenization.train(CORPUS, vocab_size=largest).vocab_size == largest


@pytest.mark.parametrize("stored", [b"", b"nonsense", b"{}", b'{"a"', b"\xff\xfe"])
def test_foreign_bytes_are_an_error(stored):
    with pytest.raises(ValueError):
        tokenization.from_bytes(stored)


def test_a_model_without_byte_pieces_is_refused():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="byte"):
        tokenization.from_bytes(model.getvalue())


@pytest.fixture(scope="module")
def byte_level():
    """The text of a byte-level tokenizer.json, trained here."""
    tokenizers = pytest.importorskip("tokenizers")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    built.pre_tokenizer = level(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(CORPUS, trainer)
    return built.to_str()


def test_huggingface_byte_level(byte_level):
    tokenizer = tokenization.from_huggingface_json(byte_level, eos="<|end|>")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (330, None, 0)
    for text in random_texts(2000, seed=2):
        text = text.encode(
            "utf-8", "replace"
        ).decode()  # the package takes no surrogate
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes(ids).sum() == len(text.encode())
    assert tokenizer.token_bytes([tokenizer.eos_id]).tolist() == [0]
    assert tokenizer.decode([tokenizer.eos_id]) == "<|end|>"


def test_huggingface_stored_and_read_again(byte_level):
    tokenizer = tokenization.from_huggingface_json(byte_level, eos="<|end|>")
    again = tokenization.from_bytes(tokenizer.to_bytes())
    assert (again.digest, again.eos_id) == (tokenizer.digest, tokenizer.eos_id)
    assert again.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])
    unmarked = tokenization.from_bytes(byte_level.encode())
    assert unmarked.eos_id is None and unmarked.digest != tokenizer.digest


def test_huggingface_space_symbols_and_byte_pieces():
    pytest.importorskip("tokenizers")
    pieces = {"<unk>": 0, "<0xCE>": 1, "<0xA9>": 2, "▁": 3, "a": 4, "▁a": 5}
    text = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "model": {
                "type": "BPE",
                "vocab": pieces,
                "merges": ["▁ a"],
                "byte_fallback": True,
                "unk_token": "<unk>",
            },
            "normalizer": {
                "type": "Replace",
                "pattern": {"String": " "},
                "content": "▁",
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {
                        "type": "Replace",
                        "pattern": {"String": "▁"},
                        "content": " ",
                    },
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
        }
    )
    tokenizer = tokenization.from_huggingface_json(text)
    ids = tokenizer.encode("a aΩ")
    assert ids == [4, 5, 1, 2]
    assert tokenizer.decode(ids) == "a aΩ"
    assert tokenizer.token_bytes(ids).tolist() == [1, 2, 1, 1]


def test_huggingface_errors(byte_level):
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        tokenization.from_huggingface_json("not json")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        tokenization.from_huggingface_json("{}")
    with pytest.raises(ValueError, match="eos token '<none>'"):
        tokenization.from_huggingface_json(byte_level, eos="<none>")

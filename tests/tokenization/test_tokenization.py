"""Tokenizers lose nothing, repeat themselves, and say what is wrong."""

import argparse
import hashlib
import inspect
import json
import random
import re
from collections import Counter

import pytest

from jaxcompress import tokenization

CORPUS = [
    "def area(width, height):\n    return width * height  # in metres\n\n" * 20,
    "The quick brown fox\n\tjumps over 12345 lazy dogs; naïve café, 漢字.\n" * 20,
]
KINDS = {
    **{"bpe": 400, "unigram": 310, "char": 400},
    **{"word": 320, "wordpiece": 420, "dictionary": 340},
}
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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="'bpe', 'unigram', 'char', 'wordpiece'"):
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


def test_a_model_without_byte_pieces_says_that_it_loses():
    tokenizer = tokenization.train(CORPUS, vocab_size=60, byte_fallback=False)
    again = tokenization.from_bytes(tokenizer.to_bytes())
    assert not again.lossless and again.byte_ids is None
    assert 0 in again.encode("quick Ω")
    assert again.decode(again.encode("quick Ω")) != "quick Ω"
    with pytest.raises(ValueError, match="does not give back"):
        tokenization.encode_bytes(again, "quick Ω".encode())
    with pytest.raises(ValueError, match="no piece for byte 0xFF"):
        tokenization.encode_bytes(again, b"quick \xff")


def test_normalization_is_on_request():
    text = ["the  ﬁrst   office ½ " * 30]
    tokenizer = tokenization.train(text, vocab_size=280, normalization="nmt_nfkc")
    assert not tokenizer.lossless
    ids = tokenizer.encode("the  ﬁrst \ud800½")
    assert tokenizer.decode(ids) == "the first ?1\u20442"
    exact = tokenization.train(text, vocab_size=280)
    assert exact.lossless
    assert exact.decode(exact.encode("the  ﬁrst \ud800½")) == "the  ﬁrst \ud800½"
    with pytest.raises(ValueError, match="'nfkd' is not known"):
        tokenization.train(text, vocab_size=300, normalization="nfkd")


@pytest.mark.parametrize("kind", KINDS)
def test_user_and_control_symbols(kind):
    tokenizer = tokenization.train(
        [*CORPUS, "and <|call|> or <mask>"],
        kind=kind,
        vocab_size=KINDS[kind] + 4,
        user_symbols=["<|call|>", "<|calls|>"],
        control_symbols=["<mask>"],
    )
    assert set(tokenizer.symbols) == {"<|call|>", "<|calls|>", "<mask>"}
    text = "quick<|calls|> <|call|>s <mask></s>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.symbols["<|call|>"]) == 1
    assert ids.count(tokenizer.symbols["<|calls|>"]) == 1
    assert not {tokenizer.symbols["<mask>"], tokenizer.eos_id} & set(ids)
    assert tokenizer.decode([tokenizer.symbols["<mask>"]]) == ""
    assert tokenizer.token_bytes([tokenizer.symbols["<|call|>"]]) == [8]
    again = tokenization.from_bytes(tokenizer.to_bytes())
    assert again.symbols == tokenizer.symbols and again.encode(text) == ids


@pytest.mark.parametrize(
    "symbol", ["", "a b", "a\n", "▁x", "<s>", "<unk>", "<0xA0>", "\0", "\ud800"]
)
def test_symbols_that_could_be_mistaken(symbol):
    for name in ("user_symbols", "control_symbols"):
        with pytest.raises(ValueError, match="symbol"):
            tokenization.train(CORPUS, vocab_size=400, **{name: [symbol]})
    with pytest.raises(ValueError, match="twice"):
        tokenization.train(
            CORPUS, vocab_size=400, user_symbols=["#"], control_symbols=["#"]
        )
    with pytest.raises(ValueError, match="one string"):
        tokenization.train(CORPUS, vocab_size=400, user_symbols="#")


def test_no_merge_is_rarer_than_asked_for():
    """The cut is where the reference trainer's own count falls below."""
    draw = random.Random(5)
    syllables = ["ba", "ke", "lo", "mi", "nu", "re", "si", "tan"]
    vocabulary = ["".join(draw.choices(syllables, k=3)) for _ in range(60)]
    weights = [1 / (i + 1) for i in range(60)]
    texts = [" ".join(draw.choices(vocabulary, weights, k=40)) for _ in range(50)]
    words = Counter(
        word for t in texts for word in re.findall("▁?[^▁]+", t.replace(" ", "▁"))
    )
    merges = tokenization.byte_pairs.learn_merges(words, 1000)
    counts = [merge.count for merge in merges]
    for least in (2, 40, 90, 10**6):
        tokenizer = tokenization.train(texts, vocab_size=10**6, min_frequency=least)
        joined = [p.text for p in tokenizer.table if p.type == 1 and p.text[1:]]
        wanted = [merge.piece for merge in merges if merge.count >= least]
        assert joined == wanted
    assert len({sum(count >= least for count in counts) for least in (2, 40, 90)}) == 3


def test_a_least_frequency_needs_no_vocabulary_size():
    tokenizer = tokenization.train(CORPUS, vocab_size=10**6, min_frequency=25)
    assert 259 < tokenizer.vocab_size < 400
    for kind in ("wordpiece", "word", "dictionary"):
        few = tokenization.train(CORPUS, kind=kind, vocab_size=10**6, min_frequency=25)
        all_ = tokenization.train(CORPUS, kind=kind, vocab_size=10**6)
        assert few.vocab_size < all_.vocab_size
    with pytest.raises(ValueError, match="merges no pairs"):
        tokenization.train(CORPUS, kind="unigram", vocab_size=300, min_frequency=2)


def test_words_are_pieces_or_bytes():
    tokenizer = tokenization.train(CORPUS, kind="word", vocab_size=320)
    ids = tokenizer.encode("the quick quicker")
    pieces = [tokenizer.pieces[i] for i in ids]
    assert pieces[:2] == [*b"the".split(), b" quick"] or pieces[3:4] == [b" quick"]
    assert pieces[-8:] == [bytes([byte]) for byte in b" quicker"]


def test_words_by_rules_and_by_whitespace():
    texts = ["height, width; 12 " * 9]
    rules = tokenization.train(texts, kind="word", vocab_size=300)
    spaces = tokenization.train(texts, kind="word", vocab_size=300, words="whitespace")
    assert [rules.pieces[i] for i in rules.encode(" width; 12")] == [
        *(b" width", b";", b" ", b"1", b"2")
    ]
    assert [spaces.pieces[i] for i in spaces.encode(" width; 12")] == [
        b" width;",
        b" 12",
    ]
    with pytest.raises(ValueError, match="known rules"):
        tokenization.train(texts, kind="word", vocab_size=300, words="letters")


def test_a_dictionary_takes_the_longest_match():
    pieces = ["un", "unit", "it", "ed", "u", "New York", " "]
    tokenizer = tokenization.DictionaryTokenizer(pieces)

    def parts(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert parts("united New York") == ["unit", "ed", " ", "New York"]
    assert parts("unix") == ["un", "i", "x"]
    with pytest.raises(ValueError, match="repeated"):
        tokenization.DictionaryTokenizer(["a", "a"])
    with pytest.raises(ValueError, match="empty"):
        tokenization.DictionaryTokenizer(["a", ""])


def test_wordpiece_tells_the_inside_of_a_word_from_its_beginning():
    first, inner = ["un", "able", " un"], ["able", "s"]
    tokenizer = tokenization.DictionaryTokenizer(first, inner=inner, words="rules")
    ids = tokenizer.encode("unables unun")
    assert [tokenizer.decode([i]) for i in ids] == ["un", "able", "s", " un", *"un"]
    start = tokenizer.byte_ids[-1] + 1
    assert ids[:3] == [start, start + 3, start + 4]


def test_wordpiece_segments_as_tokenizers_does(trained):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = trained["wordpiece"]
    start = tokenizer.byte_ids[-1] + 1
    contents = json.loads(tokenizer.to_bytes())
    vocabulary = {"[UNK]": 0}
    for piece in contents["pieces"]:
        vocabulary[piece] = len(vocabulary) + start - 1
    for piece in contents["inner"]:
        vocabulary["\uffff" + piece] = len(vocabulary) + start - 1
    other = tokenizers.models.WordPiece(
        vocabulary, unk_token="[UNK]", continuing_subword_prefix="\uffff"
    )
    for word in [" quick", "width", " heights", "returned", " areas"]:
        ids = [token.id for token in other.tokenize(word)]
        assert ids == tokenizer.encode(word)


def test_any_bytes_come_back(trained):
    draw = random.Random(3)
    for tokenizer in trained.values():
        for _ in range(500):
            data = draw.randbytes(draw.randrange(20))
            data += (
                draw.choice(TRAPS).encode("utf-8", "surrogatepass") + b"def \xe2\x96"
            )
            ids = tokenization.encode_bytes(tokenizer, data)
            assert tokenization.decode_bytes(tokenizer, ids) == data


def test_bytes_of_text_are_its_tokens(trained):
    for tokenizer in trained.values():
        ids = tokenization.encode_bytes(tokenizer, CORPUS[1].encode())
        assert ids == tokenizer.encode(CORPUS[1])


def test_remembered_words_change_nothing(trained, monkeypatch):
    """Cut into words, remembered or forgotten, as SentencePiece cuts the whole."""
    import sentencepiece

    for kind in ("bpe", "unigram"):
        tokenizer = trained[kind]
        plain = sentencepiece.SentencePieceProcessor()
        plain.LoadFromSerializedProto(tokenizer.to_bytes())
        for text in CORPUS * 2:
            part = text[:200].replace("\t", "")
            assert tokenizer.encode(part) == plain.EncodeAsIds(part)
    monkeypatch.setattr(tokenization.sentencepieces, "_REMEMBERED", 50)
    fresh = tokenization.from_bytes(trained["bpe"].to_bytes())
    for _ in range(3):
        assert fresh.encode(CORPUS[1]) == trained["bpe"].encode(CORPUS[1])
    assert 0 < len(fresh._known) < len(set(" ".join(CORPUS).split()))


def test_reserved_words_in_a_text_are_made_of_pieces():
    texts = ["the <unk> of <0x41> and [pad] a " * 20]
    tokenizer = tokenization.train(
        texts, vocab_size=10**4, min_frequency=5, control_symbols=["[pad]", "#"]
    )
    for word in ("<unk>", "<0x41>", "[pad]", "a#b", "<<unk>", "[[pad]"):
        ids = tokenizer.encode(word)
        assert tokenizer.decode(ids) == word and len(ids) > 1
        assert min(ids) > tokenizer.symbols["#"], "a mark came from text"
        if "#" not in word:
            assert not set(ids) & set(tokenizer.byte_ids), "in bytes"
    assert b"unk" in tokenizer.pieces, "the word was not trained on"
    ids = tokenizer.encode(texts[0])
    assert not set(ids) & set(tokenizer.byte_ids)


def test_a_long_text_is_segmented_as_its_words_are():
    """As a whole, SentencePiece would lose the differences to float32."""
    text = inspect.getsource(argparse)
    tokenizer = tokenization.train([text], kind="unigram", vocab_size=1000)
    each = [
        i for word in re.findall(" *[^ ]+| +", text) for i in tokenizer.encode(word)
    ]
    assert tokenizer.encode(text) == each


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
    assert tokenizer.pieces[tokenizer.encode(" return")[0]] == b" return"
    assert tokenizer.token_bytes([tokenizer.eos_id]).tolist() == [0]
    data = b"\xff\x80 return \xe2\x96\0"
    ids = tokenization.encode_bytes(tokenizer, data)
    assert tokenization.decode_bytes(tokenizer, ids) == data
    with pytest.raises(ValueError, match="one of its marks"):
        tokenization.encode_bytes(tokenizer, b"the <|end|>")
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


def test_text_files_are_read_as_they_are(tmp_path):
    text = "\ufeffone\r\ntwo\rthree\n\u2028\x0cé\n"
    (tmp_path / "text").write_bytes(text.encode())
    assert tokenization.read_text(tmp_path / "text") == text
    (tmp_path / "text").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"text is not UTF-8: byte 0xE9 at position 3"):
        tokenization.read_text(str(tmp_path / "text"))

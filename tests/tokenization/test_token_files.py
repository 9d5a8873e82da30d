"""Much text: encoded on several processes, kept in mapped files, measured."""

import json
import math

import numpy as np
import pytest

from jaxcompress import tokenization
from jaxcompress.storage.tree_json import FileDamaged

TEXTS = [
    "def area(width, height):\n    return width * height  # in metres\n",
    "",
    "Ω and </s> are text; the quick brown fox\n" * 3,
    *(f"line {i} of the width and height\n" for i in range(40)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenization.train(TEXTS, vocab_size=340)


@pytest.fixture
def written(tokenizer, tmp_path):
    path = tmp_path / "text.tokens"
    ids = tokenization.encode_many(tokenizer, TEXTS)
    return path, tokenization.write_tokens(path, tokenizer, ids)


def test_several_processes_give_what_one_gives(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization.encoding, "_BATCH", 100)  # many batches
    read = []

    def stream():
        for i, text in enumerate(TEXTS):
            read.append(i)
            yield text

    found = tokenization.encode_many(tokenizer, stream(), processes=2)
    first = next(found)
    assert len(read) < len(TEXTS), "the whole stream was read before the first result"
    found = [first, *found]
    assert [ids.tolist() for ids in found] == [tokenizer.encode(text) for text in TEXTS]
    assert all(ids.dtype == np.int32 for ids in found)


def test_encoding_errors(tokenizer):
    with pytest.raises(ValueError, match="processes is 0"):
        tokenization.encode_many(tokenizer, TEXTS, processes=0)
    with pytest.raises(ValueError, match="one string"):
        tokenization.encode_many(tokenizer, TEXTS[0])


def test_written_ids_come_back_mapped(tokenizer, written):
    path, count = written
    ids = tokenization.open_tokens(path, tokenizer, verify=True)
    wanted = [i for text in TEXTS for i in (tokenizer.bos_id, *tokenizer.encode(text))]
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint16
    assert ids.tolist() == wanted and count == len(wanted)
    assert tokenizer.decode(ids[: len(wanted)].tolist()) == "".join(TEXTS)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1
    assert list(path.parent.iterdir()) == [path], "a part was left behind"


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = tokenization.DictionaryTokenizer([f"w{i}" for i in range(70_000)])
    path = tmp_path / "large.tokens"
    ids = [np.array([69_999, 3]), np.array([], np.int32)]
    tokenization.write_tokens(path, tokenizer, ids, mark=False)
    found = tokenization.open_tokens(path)
    assert found.dtype == np.uint32 and found.tolist() == [69_999, 3]


def test_no_ids_at_all(tokenizer, tmp_path):
    path = tmp_path / "empty.tokens"
    assert tokenization.write_tokens(path, tokenizer, []) == 0
    assert tokenization.open_tokens(path, tokenizer, verify=True).shape == (0,)


def test_ids_of_another_tokenizer_are_refused(written, tokenizer, tmp_path):
    other = tokenization.train(TEXTS, vocab_size=330)
    with pytest.raises(ValueError, match="encode the text again"):
        tokenization.open_tokens(written[0], other)
    path = tmp_path / "wrong.tokens"
    with pytest.raises(ValueError, match=r"5000.*do not fit the tokenizer's 340"):
        tokenization.write_tokens(path, tokenizer, [np.array([1]), np.array([5000])])
    assert not path.exists(), "half a file"
    assert [p.name for p in tmp_path.iterdir()] == ["text.tokens"]


@pytest.mark.parametrize("cut", [0, 5, 100, 512, -1])
def test_a_file_cut_short(written, cut):
    path, _ = written
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FileDamaged):
        tokenization.open_tokens(path)


def test_damage(written):
    path, _ = written
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    tokenization.open_tokens(path)  # lengths are right
    with pytest.raises(FileDamaged, match="not those that were written"):
        tokenization.open_tokens(path, verify=True)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(FileDamaged, match="its header says"):
        tokenization.open_tokens(path)
    for old, new in ((b'"<u2"', b'"<f2"'), (b'"version": 1', b'"version": 7')):
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(FileDamaged, match="does not know"):
            tokenization.open_tokens(path)
    path.write_bytes(whole.replace(b'"tokens"', b'"tokenz"'))
    with pytest.raises(FileDamaged, match="lacks"):
        tokenization.open_tokens(path)


# Measures.


def test_measures_of_a_text_one_can_count():
    tokenizer = tokenization.DictionaryTokenizer(["ab", "a", " "])
    found = tokenization.measure(tokenizer, ["ab ab a", "Ω"])
    assert found == tokenization.Measures(
        bytes=9,
        tokens=7,
        words=4,
        bytes_per_token=9 / 7,
        tokens_per_word=7 / 4,
        coverage=7 / 9,
        unknown_rate=2 / 7,
        vocabulary_use=5 / (3 + 256 + 3),
        renyi_efficiency=tokenization.renyi_entropy(np.array([2, 1, 2, 1, 1]))
        / math.log(262),
        exact=True,
    )


def test_measures_see_what_is_lost():
    tokenizer = tokenization.train(
        TEXTS, vocab_size=90, byte_fallback=False, character_coverage=0.98
    )
    found = tokenization.measure(tokenizer, ["width Ω\n"])
    assert not found.exact
    assert found.unknown_rate > 0


def test_renyi_entropy():
    even = np.full(8, 5)
    for order in (0.5, 1, 2.5):
        assert tokenization.renyi_entropy(even, order) == pytest.approx(math.log(8))
    counts = np.array([6, 3, 1, 0])
    shares = np.array([0.6, 0.3, 0.1])
    assert tokenization.renyi_entropy(counts, 2) == pytest.approx(
        -math.log((shares**2).sum())
    )
    assert tokenization.renyi_entropy(counts, 1) == pytest.approx(
        tokenization.renyi_entropy(counts, 1 + 1e-9), abs=1e-6
    )


def test_counts_and_bytes_of_the_embedding(tokenizer):
    counts = tokenization.count_pieces(tokenizer, TEXTS)
    assert counts.sum() == sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert counts[:3].tolist() == [0, 0, 0]
    assert tokenization.embedding_bytes(tokenizer, 64) == 340 * 64 * 2
    assert tokenization.embedding_bytes(tokenizer, 64, bits=4, tied=False) == 340 * 64


def test_nothing_to_measure(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        tokenization.measure(tokenizer, ["", ""])
    with pytest.raises(ValueError, match="one string"):
        tokenization.measure(tokenizer, TEXTS[0])


def test_headers_are_json_that_anyone_can_read(written, tokenizer):
    raw = written[0].read_bytes()
    size = int.from_bytes(raw[8:16], "little")
    header = json.loads(raw[16 : 16 + size])
    assert header["tokens"] == written[1] and header["vocab_size"] == 340
    ids = np.frombuffer(raw[16 + size :], header["dtype"])
    assert ids[0] == tokenizer.bos_id and (16 + size) % 64 == 0

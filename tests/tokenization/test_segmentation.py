"""SentencePiece and tokenizers against the algorithms as they are defined.

On a real text: docstrings of the standard library, one sentence a line, single spaces.
Byte pairs: the same merges, in the same order, and the same segmentations. Unigram:
from the same seeds, the same pieces but for a few whose losses are equal to float32,
which SentencePiece computes in; its own seeds differ from ours (it takes the inner
nodes of a suffix array over bytes and discounts those inside others), so ours are given
to it.
"""

import ast
import inspect
import io
import json
import math
import random
import re
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import sentencepiece

from jaxcompress import tokenization
from jaxcompress.tokenization import byte_pairs, unigrams

MODULES = [
    "argparse",
    "textwrap",
    "inspect",
    "random",
    "logging",
    "ast",
    "unittest.mock",
]
OPEN = {  # only spaces separate words, nothing else forbids a piece
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "character_coverage": 1.0,
    "split_by_unicode_script": False,
    "split_by_number": False,
    "split_digits": False,
    "num_threads": 1,
    "minloglevel": 2,
}


def split(text):
    return re.findall("▁?[^▁]+", text)


@pytest.fixture(scope="module")
def lines():
    """Sentences with U+2581 for spaces, as SentencePiece sees them."""
    found = []
    for name in MODULES:
        module = __import__(name, fromlist=["_"])
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                found += [" ".join(line.split()) for line in text.splitlines()]
    return [line.replace(" ", "▁") for line in found if line][:1200]


@pytest.fixture(scope="module")
def words(lines):
    return Counter(word for line in lines for word in split(line))


def train(lines, kind, vocab_size, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        **OPEN | options,
    )
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    pieces = [processor.IdToPiece(i) for i in range(3, len(processor))]
    return processor, pieces


# Byte pairs.


def naive_merges(words, count):
    """Counts everything again for each merge."""
    parts = {word: list(word) for word in words}
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word, symbols in parts.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(
            pairs, key=lambda p: (-pairs[p], len(p[0] + p[1]), p[0] + p[1], len(p[0]))
        )
        merges.append(best)
        for symbols in parts.values():
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def test_merges_are_those_of_counting_everything_again():
    draw = random.Random(0)
    words = Counter(
        "".join(draw.choices("aab", k=draw.randrange(1, 9))) for _ in range(80)
    )
    found = byte_pairs.learn_merges(words, 60)
    assert [(m.left, m.right) for m in found] == naive_merges(words, 60)


def test_merges_are_those_of_sentencepiece(lines, words):
    size = 1500
    processor, pieces = train(lines, "bpe", size)
    characters = {c for line in lines for c in line}
    merges = byte_pairs.learn_merges(
        words, size - 3 - len(characters), allowed=lambda piece: len(piece) <= 16
    )
    assert [merge.piece for merge in merges] == pieces[: len(merges)]
    ranks = {merge.piece: i for i, merge in enumerate(merges)}
    for word in words:
        parts = byte_pairs.segment(word, lambda left, right: ranks.get(left + right))
        assert parts == processor.EncodeAsPieces(word)


def test_merges_are_those_of_tokenizers(words):
    """It breaks ties by the numbers of the pieces."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted({c for word in words for c in word})
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=alphabet, show_progress=False
    )
    built.train_from_iterator((w for w, n in words.items() for _ in range(n)), trainer)
    theirs = [tuple(pair) for pair in json.loads(built.to_str())["model"]["merges"]]
    ids = {piece: i for i, piece in enumerate(alphabet)}

    def order(count, left, right):
        return -count, number(left), number(right)

    def number(piece):
        return ids.setdefault(piece, len(ids))

    ours = byte_pairs.learn_merges(words, len(theirs), order=order)
    same = [(m.left, m.right) == pair for m, pair in zip(ours, theirs, strict=True)]
    assert sum(same[:300]) == 300
    assert len({m.piece for m in ours} & {a + b for a, b in theirs}) >= 0.99 * len(same)
    ranks = {pair: i for i, pair in reversed(list(enumerate(theirs)))}
    for word in words:
        parts = byte_pairs.segment(word, lambda *pair: ranks.get(pair))
        assert parts == [token.value for token in built.model.tokenize(word)]


def test_merging_stops_at_a_frequency_and_at_what_is_not_allowed():
    words = {"abab": 10, "cd": 3, "ab": 5}
    merges = byte_pairs.learn_merges(words, 10, min_frequency=4)
    assert [(m.piece, m.count) for m in merges] == [("ab", 25), ("abab", 10)]
    merges = byte_pairs.learn_merges(words, 10, allowed=lambda piece: "d" not in piece)
    assert [m.piece for m in merges] == ["ab", "abab"]
    assert byte_pairs.learn_merges({}, 10) == []


def test_a_long_word_is_merged_in_reasonable_time():
    ranks = {"aa": 0, "aaaa": 1}
    parts = byte_pairs.segment("a" * 50_001, lambda a, b: ranks.get(a + b))
    assert parts == ["aaaa"] * 12_500 + ["a"]


# Unigram.


def every_segmentation(text):
    for count in range(len(text)):
        for cuts in combinations(range(1, len(text)), count):
            ends = (0, *cuts, len(text))
            yield [text[a:b] for a, b in pairwise(ends)]


def likelihood(parts, scores):
    return sum(scores.get(part, -math.inf) for part in parts)


SCORES = {"a": -2.0, "b": -2.5, "ab": -3.0, "ba": -4.2, "aba": -5.0, "bb": -4.1}


def test_viterbi_finds_the_best_of_all_segmentations():
    draw = random.Random(1)
    for _ in range(50):
        text = "".join(draw.choices("ab", k=draw.randrange(1, 10)))
        best = max(likelihood(parts, SCORES) for parts in every_segmentation(text))
        assert likelihood(unigrams.viterbi(text, SCORES), SCORES) == pytest.approx(best)


def test_expectation_sums_over_all_segmentations():
    words = {"ababba": 2, "bb": 3, "a": 1}
    expected, total = Counter(), 0.0
    for word, count in words.items():
        weights = [
            (parts, math.exp(likelihood(parts, SCORES)))
            for parts in every_segmentation(word)
        ]
        norm = sum(weight for _, weight in weights)
        total += count * math.log(norm)
        for parts, weight in weights:
            for part in parts:
                expected[part] += count * weight / norm
    found, likelihoods = unigrams.expect(words, SCORES, 3)
    assert likelihoods == pytest.approx(total)
    assert {k: v for k, v in found.items() if v} == pytest.approx(
        {k: v for k, v in expected.items() if v}
    )


def test_estimation_makes_the_text_likelier():
    words = {"abab": 4, "ba": 3, "bb": 1}
    scores = {p: math.log(1 / len(SCORES)) for p in SCORES}
    before = -math.inf
    for _ in range(5):
        expected, total = unigrams.expect(words, scores, 3)
        assert total >= before - 1e-9
        before = total
        norm = math.log(sum(expected.values()))
        scores = {p: math.log(n) - norm for p, n in expected.items() if n > 1e-12}


def test_digamma():
    assert unigrams.digamma(1) == pytest.approx(-0.5772156649015329, abs=1e-9)
    for x in (0.3, 1.5, 6.9, 40.0):
        assert unigrams.digamma(x + 1) == pytest.approx(unigrams.digamma(x) + 1 / x)
        slope = (math.lgamma(x + 1e-4) - math.lgamma(x - 1e-4)) / 2e-4
        assert unigrams.digamma(x) == pytest.approx(slope, rel=1e-5)


def test_pieces_are_those_of_sentencepiece_from_the_same_seeds(lines, words, tmp_path):
    characters = Counter(c for line in lines for c in line)
    seeds = unigrams.seed_pieces(lines, split, characters, 3000, 16)
    counts = Counter()
    for word, n in words.items():
        for start, end in combinations(range(len(word) + 1), 2):
            if end - start > 1 and word[start:end] in seeds:
                counts[word[start:end]] += n
    path = tmp_path / "seeds.tsv"
    path.write_text("".join(f"{p}\t{n}\n" for p, n in counts.items()), encoding="utf-8")
    size = 800
    processor, pieces = train(
        lines,
        "unigram",
        size,
        seed_sentencepieces_file=str(path),
        seed_sentencepiece_size=5000,
    )
    ours = unigrams.learn_pieces(lines, split, size - 3, seeds=3000)
    assert len(ours) == len(pieces)
    common = set(pieces) & set(ours)
    assert len(common) >= 0.97 * len(pieces)
    theirs = {p: processor.GetScore(processor.PieceToId(p)) for p in common}
    differences = [abs(theirs[p] - ours[p]) for p in common]
    assert np.median(differences) < 0.01


def test_segmentations_are_those_of_sentencepiece(lines):
    processor, pieces = train(lines, "unigram", 1000)
    scores = {p: processor.GetScore(i) for i, p in enumerate(pieces, 3)}
    for line in lines:
        assert unigrams.viterbi(line, scores) == processor.EncodeAsPieces(line)
    greedy = [unigrams.greedy(line, scores, longest=16) for line in lines]
    assert all(
        "".join(parts) == line for parts, line in zip(greedy, lines, strict=True)
    )
    assert sum(likelihood(parts, scores) for parts in greedy) < sum(
        likelihood(unigrams.viterbi(line, scores), scores) for line in lines
    )


def test_an_unknown_character_stands_alone():
    assert "?" in unigrams.viterbi("aba?b", SCORES)
    assert unigrams.greedy("abaXbb", SCORES, longest=3) == ["aba", "X", "bb"]
    assert unigrams.viterbi("", SCORES) == []


def test_training_needs_room_for_the_characters():
    with pytest.raises(ValueError, match="3 characters"):
        unigrams.learn_pieces(["abc"], split, 2)
    with pytest.raises(ValueError, match="0 characters"):
        unigrams.learn_pieces([], split, 10)


# Sampling.


def test_unigram_sampling_follows_the_probabilities():
    draw, text, alpha, rounds = random.Random(7), "abab", 0.7, 4000
    weights = {
        tuple(parts): math.exp(alpha * likelihood(parts, SCORES))
        for parts in every_segmentation(text)
    }
    norm = sum(weights.values())
    drawn = Counter(
        tuple(unigrams.sample(text, SCORES, alpha=alpha, draw=draw))
        for _ in range(rounds)
    )
    for parts, weight in weights.items():
        p = weight / norm
        assert (
            abs(drawn[parts] / rounds - p) < 5 * math.sqrt(p * (1 - p) / rounds) + 1e-9
        )


@pytest.fixture(scope="module")
def tokenizers_of_both_kinds(lines):
    texts = ["\n".join(lines).replace("▁", " ")]
    return {
        "bpe": tokenization.train(texts, vocab_size=900, user_symbols=["<tool>"]),
        "unigram": tokenization.train(
            texts, kind="unigram", vocab_size=700, user_symbols=["<tool>"]
        ),
    }


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sampling(tokenizers_of_both_kinds, lines, kind):
    tokenizer = tokenizers_of_both_kinds[kind]
    text = " ".join(lines[:40]).replace("▁", " ") + " Ω▁\t<tool>ing </s>\ud800"
    plain = tokenizer.encode(text)
    if kind == "bpe":
        assert tokenization.sample(tokenizer, text, seed=0, dropout=0) == plain
        coarse, fine = {"dropout": 0.05}, {"dropout": 0.5}
        loose = tokenization.sample(tokenizer, text, seed=0, dropout=1)
        longest = [
            tokenizer.decode([i]) for i in loose if i != tokenizer.symbols["<tool>"]
        ]
        assert max(map(len, longest)) == 1
    else:
        sharp = tokenization.sample(tokenizer, text, seed=0, alpha=500)
        assert np.mean(np.array(sharp[:200]) == plain[:200]) > 0.99
        coarse, fine = {"alpha": 1.0}, {"alpha": 0.1}
    drawn = {
        seed: tokenization.sample(tokenizer, text, seed=seed, **coarse)
        for seed in range(5)
    }
    assert all(tokenizer.decode(ids) == text for ids in drawn.values())
    assert len({tuple(ids) for ids in drawn.values()}) == 5
    assert drawn[3] == tokenization.sample(tokenizer, text, seed=3, **coarse)
    more = tokenization.sample(tokenizer, text, seed=3, **fine)
    assert len(more) > len(drawn[3]) > len(plain)
    assert more.count(tokenizer.symbols["<tool>"]) == 1
    assert tokenizer.eos_id not in more


def test_sampling_errors(tokenizers_of_both_kinds):
    tokenizer = tokenizers_of_both_kinds["bpe"]
    with pytest.raises(ValueError, match=r"dropout is 1\.5"):
        tokenization.sample(tokenizer, "a", seed=0, dropout=1.5)
    with pytest.raises(ValueError, match="alpha"):
        tokenization.sample(tokenizer, "a", seed=0, alpha=-1)
    words = tokenization.train(["a b c"], kind="word", vocab_size=300)
    with pytest.raises(ValueError, match="DictionaryTokenizer"):
        tokenization.sample(words, "a", seed=0)

"""The experiments on tokenizers run, in small, and find what they are there to find."""

import json

import pytest


def test_kinds(experiment, tmp_path):
    pytest.importorskip("tokenizers")
    module = experiment("tokenization.kinds")
    path = tmp_path / "kinds.jsonl"
    config = module.Config(fast=True, results=str(path), kinds="bpe,word,HF bpe")
    rows = module.run(config)
    assert [row["tokenizer"] for row in rows] == ["bpe", "word", "HF bpe"]
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:2]:
        assert row["in_exact"] and row["fuzz_failures"] == row["byte_failures"] == 0
    assert module.run(config) == [], "what is there is not computed again"
    lossy = module.Plain(["the office of the first\n"] * 50, "bpe", 30)
    assert lossy.decode(lossy.encode("the  ﬁrst")) != "the  ﬁrst"


def test_fuzz_has_what_it_says(experiment):
    module = experiment("tokenization.kinds")
    texts = list(module.fuzz_texts(4000, seed=0))
    every = "".join(texts)
    assert not any(0xD800 <= ord(c) < 0xE000 for c in every)
    assert {ord(c) >> 16 for c in every} >= set(range(17))
    assert all(piece in every for piece in module.RESERVED)
    assert texts == list(module.fuzz_texts(4000, seed=0))


@pytest.mark.slow
def test_speed(experiment, tmp_path):
    pytest.importorskip("tokenizers")
    module = experiment("tokenization.speed")
    rows = module.run(module.Config(fast=True))
    tokens = {row["engine"]: row["tokens"] for row in rows if "engine" in row}
    for kind in ("bpe", "unigram"):
        assert tokens[f"jaxcompress {kind}, 1"] == tokens[f"jaxcompress {kind}, 2"]
        assert tokens[f"jaxcompress {kind}, 1"] == pytest.approx(
            tokens[f"SentencePiece {kind}, 1"], rel=0.01
        )
    for row in rows:
        if "sentence" in row:
            assert row["viterbi_nats"] <= row["sentencepiece_nats"] + 1e-3
            assert row["viterbi_nats"] <= row["greedy_nats"]


@pytest.mark.slow
def test_vocabulary(experiment, tmp_path):
    module = experiment("tokenization.vocabulary")
    path = tmp_path / "vocabulary.jsonl"
    config = module.Config(fast=True, kinds="bpe", results=str(path))
    rows = module.run(config)
    assert len({row["operations"] // 10**8 for row in rows}) == 1, "equal compute"
    small, large = rows
    assert small["tokens_seen"] > large["tokens_seen"]
    assert small["file_bytes_8_bits"] < large["file_bytes_8_bits"]
    assert all(0 < row["bits_per_byte"] < 8 for row in rows)
    assert module.run(config) == []
    pytest.importorskip("matplotlib")
    plots = experiment("tokenization.plots")
    picture = tmp_path / "picture.svg"
    drawn = plots.Config(str(path), str(picture), operations=2e9)
    assert plots.run(drawn)["models"] == 2 and b"<svg" in picture.read_bytes()
    with pytest.raises(ValueError, match="no models"):
        plots.run(plots.Config(str(path), str(picture), operations=1.0))


@pytest.mark.slow
def test_trimming(experiment, tmp_path):
    module = experiment("tokenization.trimming")
    config = module.Config(fast=True, results=str(tmp_path / "trimming.jsonl"))
    full, used, likely = module.run(config)
    assert used["vocab_size"] < likely["vocab_size"] < full["vocab_size"]
    assert used["file_bytes_bfloat16"] < full["file_bytes_bfloat16"]
    assert used["in_domain_bytes_per_token"] == full["in_domain_bytes_per_token"]
    losses = [row["in_domain_bits_per_byte"] for row in (used, likely, full)]
    assert losses == sorted(losses), "only what is cut off is gained"
    assert likely["lost_probability"] <= 0.01

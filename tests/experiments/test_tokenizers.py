"""Parts of the experiments on tokenizers do what their rows rest on."""

import json

import pytest


def test_a_tokenizer_that_loses_is_seen_to(experiment):
    pytest.importorskip("tokenizers")
    module = experiment("tokenization.kinds")
    lossy = module.Plain(["the office of the first\n"] * 50, "bpe", 30)
    assert lossy.decode(lossy.encode("the  ﬁrst")) != "the  ﬁrst"


def test_fuzz_has_what_it_says(experiment):
    pytest.importorskip("tokenizers")
    module = experiment("tokenization.kinds")
    texts = list(module.fuzz_texts(4000, seed=0))
    every = "".join(texts)
    assert not any(0xD800 <= ord(c) < 0xE000 for c in every)
    assert {ord(c) >> 16 for c in every} >= set(range(17))
    assert all(piece in every for piece in module.RESERVED)
    assert texts == list(module.fuzz_texts(4000, seed=0))


def test_a_picture_of_vocabularies(experiment, tmp_path):
    pytest.importorskip("matplotlib")
    plots = experiment("tokenization.plots")
    path, picture = tmp_path / "rows.jsonl", tmp_path / "picture.svg"
    rows = [
        {
            "kind": kind,
            "vocab_size": size,
            "heldout_bytes_per_token": 2.0 + size / 1000,
            "bits_per_byte": 3.0 - size / 1000,
            "file_bytes_8_bits": 1000 * size,
            "config": {"operations": 2e9},
        }
        for kind in ("bpe", "unigram")
        for size in (400, 600)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = plots.Config(str(path), str(picture), operations=2e9)
    assert plots.run(drawn)["models"] == 4 and b"<svg" in picture.read_bytes()
    with pytest.raises(ValueError, match="no models"):
        plots.run(plots.Config(str(path), str(picture), operations=1.0))

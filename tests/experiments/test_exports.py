"""Exports in the programs that read them, in small; `.ci/nightly` installs those."""

import pytest

pytestmark = pytest.mark.nightly


def test_compressed_tensors_and_transformers_agree(experiment, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs jaxcompress[readers]")
    module = experiment("export.directories")
    config = module.Config(fast=True, results=str(tmp_path / "rows.jsonl"))
    integers, floats = module.run(config)
    assert integers["layers"] == floats["layers"] == 42
    assert integers["tensors_differing"] == 0
    assert integers["difference_to_dense"] == 0.0
    assert integers["bfloat16_difference_to_dense"] == 0.0
    assert integers["difference_to_ours"] < 1e-5 * integers["largest_logit"]
    assert integers.get("tpu_inference_differing", 0) == 0
    # The divisor is rounded once, and the reader divides by it.
    assert floats["largest_relative_difference"] < 2**-21


def test_gguf_files_are_read_and_run(experiment, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs jaxcompress[readers]")
    module = experiment("export.gguf_files")
    config = module.Config(fast=True, results=str(tmp_path / "rows.jsonl"))
    rows = {row["row"]: row for row in module.run(config)}
    assert rows["F32"]["same_greedy_tokens"] == 64
    assert rows["F32"]["kl_llama_cpp"] < 1e-5
    for name in ("F32", "Q8_0", "Q4_0, nearest"):
        assert rows[name]["tensors_differing"] == 0
        assert abs(rows[name]["perplexity_ratio"] - 1) < 5e-3
        assert rows[name]["top1_agreement"] >= 0.95
    theirs = rows["Q4_0 of llama.cpp"]
    assert theirs["types"] == rows["Q4_0, nearest"]["types"]

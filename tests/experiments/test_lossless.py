"""Experiments on files without loss run, in small."""

import sys

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.mark.slow
def test_weights_beside_another_coder(experiment, monkeypatch):
    for peer in ("zipnn", "blosc2", "pcodec"):  # not installed everywhere
        monkeypatch.setitem(sys.modules, peer, None)
    module = experiment("coding.lossless")
    rows = module.run(module.Config(fast=True, only="zstd 3"))
    assert {row["kind"] for row in rows} == {"bfloat16"}
    bits = {row["coder"]: row["bits"] for row in rows}
    assert bits["ours"] < bits["ours, fast"] < 0.97 * bits["zstd 3"] < 13
    for row in rows:
        if row["coder"].startswith("ours"):  # a header, and checksums, beside these
            assert row["bits"] < row["file_bits"] < row["bits"] + 0.1


@pytest.mark.slow
def test_codes_and_levels(experiment, tmp_path):
    """Every row decodes what it coded before it counts its bytes."""
    random = np.random.default_rng(0)
    scales = np.exp(random.normal(0, 0.3, (256, 1)))
    made = {x: scales * random.normal(0, 0.05, (256, 256)) for x in "ab"}
    path = tmp_path / "x.safetensors"
    save_file({name: x.astype(np.float32) for name, x in made.items()}, path)
    module = experiment("coding.quantized_codes")
    rows = module.run(module.Config(model=str(path), fast=True, rates=(2.05,)))
    assert len(rows) == 4
    for row in rows:
        coded = row["bits_of_codes_alone"], row["bits_entropy_coded"]
        assert 0 < coded[0] < coded[1] < row["bits_packed"]
    eight, four, one, levels = rows
    assert four["bits_entropy_coded"] < 4 < eight["bits_entropy_coded"] < 8
    assert one["bits_of_codes_alone"] < one["entropy_by_tensor"] + 0.1
    assert 2.0 < levels["bits_of_codes_alone"] < 2.07


@pytest.mark.slow
def test_altered_files(experiment):
    module = experiment("storage.faults")
    (row,) = module.run(module.Config(fast=True))
    assert row["digests as written"] + row["forged digests"] == row["files"] == 300
    ends = {key: row[key] for key in row if key.startswith(("refused", "other "))}
    assert sum(ends.values()) + row["right"] == 300
    assert len(row["by_kind"]) == 9
    # Of what is behind digests as written only rows alone may not touch the damage.
    assert row["refused: FileDamaged"] > row["digests as written"] * 0.9
    assert not any("other bytes" in key for key in row["by_kind"]["archive"])
    assert 0 <= row["resident_growth_mb"] < 200


@pytest.mark.slow
def test_a_checkpoint_packed_and_unpacked_by_commands(experiment):
    module = experiment("storage.packed_checkpoint")
    (row,) = module.run(module.Config(fast=True))
    assert row["files"] == 2 and row["bytes"] > 19e6
    assert 0.6 < row["packed_share"] < 0.67  # 10.5 of 16 bits
    for command in ("pack", "verify", "unpack"):
        assert 0 < row[f"{command}_peak_mb"] < 1000


@pytest.mark.slow
def test_checkpoints_against_their_base(experiment):
    module = experiment("storage.delta")
    (row,) = module.run(module.Config(fast=True, kinds="bfloat16"))
    assert row["differences"] > 0 and row["weights"] > 3e6
    assert 0 < row["bits_against_base"] < row["bits_alone"] / 4


@pytest.mark.slow
def test_a_model_runs_on_coded_weights(experiment, monkeypatch):
    """The experiment itself compares all logits, bit for bit."""
    module = experiment("coding.coded_forward")
    some = {"as they are": None, "code_floats()": "code_floats()"}
    monkeypatch.setattr(module, "RECIPES", some)
    dense, coded, streamed = module.run(module.Config(fast=True))
    assert streamed["streaming"] and not coded["streaming"]
    assert coded["bits_per_weight"] < 11 < dense["bits_per_weight"] == 16
    assert streamed["temporary_mb"] < coded["temporary_mb"]

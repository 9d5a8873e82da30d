"""Experiments on pruning, low rank and distillation run, in small."""

import dataclasses
import json

import pytest


@pytest.mark.slow
def test_low_rank(experiment, tmp_path):
    module = experiment("factorization.low_rank")
    path = tmp_path / "rows.jsonl"
    config = module.Config(fast=True, only="weighted", results=str(path))
    rows = module.run(config)
    assert [row["row"] for row in rows] == ["weighted 0.8"]
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["identity_gap"] < 1e-5 and 0.78 < rows[0]["kept_weights"] <= 0.8
    assert module.run(config) == [], "what is there is not computed again"


@pytest.mark.slow
def test_layers_removed(experiment, tmp_path):
    module = experiment("pruning.structured")
    config = module.Config(
        fast=True, only="layers", results=str(tmp_path / "rows.jsonl")
    )
    (row,) = module.run(config)
    assert row["parameters"] < 0.8 * row["dense_parameters"]
    assert row["bytes"] < 0.8 * row["dense_bytes"]
    assert row["rise"] > 0


@pytest.mark.slow
def test_recovery(experiment, tmp_path, monkeypatch):
    module = experiment("training.recovery")
    monkeypatch.setitem(module.STARTS, "2 bits", module.STARTS["2 bits"][:1])
    path = tmp_path / "rows.jsonl"
    (row,) = module.run(module.Config(fast=True, results=str(path)))
    assert row["bytes"] == row["bytes_before"] < row["dense_bytes"] / 4
    assert 0 < row["kl_after"] < row["kl_before"]
    assert row["training_tokens"] == 2 * 2 * 32


@pytest.mark.slow
def test_students_that_write(experiment, tmp_path):
    module = experiment("distillation.on_policy")
    path = tmp_path / "rows.jsonl"
    rows = module.run(module.Config(fast=True, results=str(path)))
    assert [row["row"] for row in rows[1:]] == list(module.ROWS)[1:3]
    assert len({row["scored_tokens"] for row in rows[1:]}) == 1
    assert len(path.read_text().splitlines()) == len(rows)


def test_the_command_line_is_made_of_a_config(experiment, monkeypatch):
    command = experiment("common.command")

    @dataclasses.dataclass(frozen=True)
    class Config:
        model: str = "reference"
        widths: tuple[int, ...] = (64, 128)
        rate: float = 0.5
        fast: bool = False
        results: str = "somewhere/rows.jsonl"

    def parsed(line):
        monkeypatch.setattr("sys.argv", ["experiment", *line.split()])
        return command.parse(Config, None)

    assert parsed("") == Config()
    given = parsed("other.gguf --widths 3 5 7 --rate 2 --fast")
    assert given == Config("other.gguf", (3, 5, 7), 2.0, True, "rows_fast.jsonl")
    assert parsed("--fast --results here").results == "here"

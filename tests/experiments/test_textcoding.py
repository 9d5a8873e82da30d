"""The experiments of text coding end quickly and say what they measured."""

import pytest

WANTED = {
    "exact_price": {"price", "same_integers"},
    "ratio": {"bits_per_byte", "file_bytes"},
    "round_trips": {"inputs", "same", "refused"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WANTED)
def test_it_runs_in_small(name, experiment):
    module = experiment(f"textcoding.{name}")
    rows = module.run(module.Config(fast=True))
    rows = rows if isinstance(rows, list) else [rows]
    assert all(WANTED[name] <= set(row) for row in rows)
    if name == "exact_price":
        assert rows[0]["same_integers"] and abs(rows[0]["price"]) < 0.01
    if name == "round_trips":
        assert rows[0]["same"] == rows[0]["inputs"]
        assert rows[0]["refused"] == rows[0]["damaged"]

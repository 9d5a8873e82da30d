"""Results of a long run are found again, and those of another run are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import storage
from jaxcompress.storage.resume import Results, digest
from jaxcompress.types import LazyParams

TREE = {"a": np.arange(6.0).reshape(2, 3), "b": [np.ones(2, np.int8)]}


def test_a_result_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return TREE

    results = Results(tmp_path / "new")
    for _ in range(2):
        np.testing.assert_array_equal(results.get("x", compute)["a"], TREE["a"])
    assert len(calls) == 1
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_nothing_is_kept_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nowhere = Results(None)
    nowhere.save("x", TREE)
    assert nowhere.load("x") is None and nowhere.get("x", lambda: TREE) is TREE
    assert not list(tmp_path.iterdir())


def test_a_result_of_another_run_is_refused(tmp_path):
    results = Results(tmp_path)
    results.save("x", TREE, {"run": "1", "note": "n"})
    tree, metadata = results.load("x", {"run": "1"})
    assert metadata == {"run": "1", "note": "n"} and tree["b"][0].dtype == np.int8
    with pytest.raises(ValueError, match=r"x.safetensors was made by another run .*go"):
        results.load("x", {"run": "2"}, "go elsewhere")


def test_a_digest_tells_all_that_differs():
    known = {
        digest(about, tree)
        for about in (None, [1], {"a": 1.5})
        for tree in (
            None,
            TREE,
            {**TREE, "c": TREE["a"]},
            {**TREE, "a": TREE["a"].T},
            {**TREE, "a": TREE["a"].astype("f4")},
            {"a": TREE["a"] + np.eye(2, 3), "b": TREE["b"]},
            jc.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2))),
            jnp.ones(3, jnp.bfloat16),
        )
    }
    assert len(known) == 24
    assert digest({"b": 1, "a": 2}, TREE) == digest({"a": 2, "b": 1}, dict(TREE))
    assert len(digest(None)) == 32 and len(digest(None, size=8)) == 16


def test_what_is_read_leaf_by_leaf(tmp_path):
    path = tmp_path / "x.safetensors"
    storage.save(path, TREE)
    with storage.open_checkpoint(path) as file:
        assert isinstance(file, LazyParams)
    assert not isinstance(TREE, LazyParams)

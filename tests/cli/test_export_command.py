"""`python -m jaxcompress export`, in this process."""

import functools
import json

import numpy as np
import pytest
from exports_for_tests import MODEL, array_of, dense_params, small_params, tensors_of

from jaxcompress.cli import main
from jaxcompress.export import compressed_tensors
from jaxcompress.models.loading import load
from jaxcompress.models.saved import load_saved, save


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    small = small_params("symmetric(bits=4, block=32)", ".*/(kernel|embedding)")
    save(tmp_path / "small.safetensors", MODEL, small)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments, code=0):
        assert main(["export", "small.safetensors", *arguments]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


def test_export_writes_what_the_function_writes(run, tmp_path):
    out = run("a", "--dense", "embed/.*", "--dtype", "float32", "--context", "99")
    assert "pack-quantized 4-bit int, groups of 32" in out
    assert "embed/embedding" in out
    small = small_params("symmetric(bits=4, block=32)", ".*/(kernel|embedding)")
    compressed_tensors(
        tmp_path / "b", MODEL, small, dense="embed/.*", dtype="float32", context=99
    )
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")
    files = [(tmp_path / x / "config.json").read_text() for x in "ab"]
    assert files[0] == files[1]
    assert json.loads(files[0])["max_position_embeddings"] == 99


def test_export_writes_a_dense_directory(run, tmp_path):
    run("a", "--format", "huggingface")
    table = array_of(tensors_of(tmp_path / "a")["model.layers.0.mlp.up_proj.weight"])
    leaf = dense_params()["layer_0"]["mlp"]["up_proj"]["kernel"]
    assert 0 < np.abs(table.T.astype(np.float32) - leaf.astype(np.float32)).max() < 0.1


def test_export_writes_a_gguf_file(run, tmp_path):
    out = run("a.gguf", "--format", "gguf", "--leaves", "3")
    assert "Q4_0" in out and "more leaves" in out
    model, params, _ = load(tmp_path / "a.gguf")
    assert model == MODEL
    small = load_saved(tmp_path / "small.safetensors")[1]
    name = "layer_0", "attention", "q_proj", "kernel"
    ours = functools.reduce(lambda tree, key: tree[key], name, small).materialize()
    theirs = functools.reduce(lambda tree, key: tree[key], name, params)
    np.testing.assert_array_equal(theirs.astype(ours.dtype), ours)


def test_errors_are_one_line(run, tmp_path):
    assert "embed/embedding is compressed" in run("a", code=2)
    assert "PATTERN=METHOD" in run("a", "--requantize", "symmetric", code=2)
    (tmp_path / "b").write_text("a file")
    assert "exists; remove it" in run("b", "--dense", "embed/.*", code=2)

"""Models in files of ours come back with settings and tokenizer."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints_for_tests import GOLDEN, logits_of, shapes_of, trees_equal

from jaxcompress.models.configurations import transformer_from
from jaxcompress.models.loading import load, shapes
from jaxcompress.models.saved import describe, rebuild, save
from jaxcompress.models.stacking import stack_layers
from jaxcompress.quantization import symmetric
from jaxcompress.tree.compress import compress


def test_settings_survive_as_json():
    model = transformer_from(
        json.loads((GOLDEN / "llama3" / "config.json").read_text())
    ).clone(mlp_width=(40, 24), sliding_window=(None, 5), dtype=jnp.bfloat16)
    assert rebuild(json.loads(json.dumps(describe(model)))) == model
    with pytest.raises(ValueError, match="wings"):
        rebuild(describe(model) | {"wings": 2})
    with pytest.raises(ValueError, match="'Bert'"):
        rebuild(describe(model) | {"type": "Bert"})


def test_saved_model_comes_back(tmp_path, tokenizer):
    model, params, _ = load(GOLDEN / "qwen3", dtype=jnp.float32)
    small = compress(params, [(".*/up_proj/kernel", symmetric(bits=4, block=8))])
    path = tmp_path / "small.safetensors"
    save(path, model, small, tokenizer, {"note": "tiny"})
    again, read, words = load(path)
    assert again == model
    trees_equal(read, small)
    assert words.to_bytes() == tokenizer.to_bytes()
    assert words.encode("in 1984") == tokenizer.encode("in 1984")
    assert words.eos_id == tokenizer.eos_id
    stacked_model, stacked, _ = load(path, scan=True, dtype=jnp.bfloat16)
    assert stacked_model == model.clone(scan=True)
    kernel = stacked["layers"]["mlp"]["up_proj"]["kernel"]
    trees_equal(kernel, stack_layers(small)["layers"]["mlp"]["up_proj"]["kernel"])
    assert stacked["final_norm"]["scale"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="'architecture'"):
        save(path, model, small, metadata={"architecture": 1})
    assert shapes(path) == shapes_of(params)


def test_file_without_a_model_says_so(tmp_path):
    from jaxcompress.storage import checkpoint

    checkpoint.save(tmp_path / "a.safetensors", {"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"without a model.*jaxcompress\.load"):
        load(tmp_path / "a.safetensors")


def test_another_model_is_told_how_its_parameters_are_saved(tmp_path):
    with pytest.raises(TypeError, match=r"not a Dense; .* jc.save\(path, params\)"):
        save(tmp_path / "a.safetensors", nn.Dense(3), {"kernel": 1.0})
    assert not list(tmp_path.iterdir())


def test_reference_model_is_dense_and_rounded():
    model, params, words = load("reference")
    assert model.vocab_size == words.vocab_size
    for array in jax.tree.leaves(params):
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, array.astype(jnp.bfloat16))
    text = "def f(x):\n\treturn x**2  # naïve\n"
    assert words.decode(words.encode(text)) == text
    prompt = words.encode("class Parser:\n    def __init__(")
    last = logits_of(model, params, np.array([prompt]))[0, -1]
    assert words.decode([int(last.argmax())]) == "self"

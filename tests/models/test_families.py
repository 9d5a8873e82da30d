"""Whole families: directories, scans, caches, exports, on the recorded weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_settings import RECORDED, config_of, record, states, weights
from safetensors.numpy import save_file

import jaxcompress as jc
from jaxcompress.export import huggingface
from jaxcompress.models.configurations import model_from
from jaxcompress.models.loading import load, open_weights, shapes

NEW = ["Gemma3ForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel"]
TOKENS = jnp.asarray(record.TOKENS)


def base(family):
    return np.load(RECORDED / f"{family}.npz")["base"]


@pytest.fixture(params=NEW)
def family(request):
    return request.param


@pytest.fixture
def path(family, tmp_path):
    config = config_of(family)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors, _ = weights(family, model_from(config))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.slow
def test_directories_looped_and_scanned(family, path):
    for scan in (False, True):
        model, params, _ = load(path, scan=scan)
        assert model.scan == scan
        np.testing.assert_allclose(states(model, params), base(family), atol=2e-5)


def test_cached_decoding_equals_the_full_pass(family, path):
    model, params, _ = load(path, scan=True)
    full = model.apply({"params": params}, TOKENS)
    cache = model.init_cache(1, 24)
    step = jax.jit(lambda tokens, cache: model.apply(
        {"params": params}, tokens, cache=cache
    ))  # fmt: skip
    first, cache = step(TOKENS[:, :5], cache)
    parts = [first]
    for t in range(5, 20):
        logits, cache = step(TOKENS[:, t : t + 1], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=3e-5)


def test_export_gives_the_same_model_back(family, path, tmp_path):
    model, params, _ = load(path)
    huggingface(tmp_path / "out", model, params)
    again, read, _ = load(tmp_path / "out")
    assert again == model
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), read, params)
    lazy = open_weights(tmp_path / "out")[1]
    assert {name: lazy.describe(name)[1] for name in lazy.shapes} == {
        name: x.shape for name, x in shapes(path).items()
    }


def test_every_matrix_is_compressed_and_runs(family, path):
    model, params, _ = load(path)
    recipe = [(".*/(kernel|embedding)", "symmetric(bits=8)")]
    small = jc.compress(params, recipe, layouts=jc.find_layouts(model, params, TOKENS))
    assert jc.nbytes(small) < 0.45 * jc.nbytes(params)
    out = states(model, small)
    assert np.abs(out - base(family)).max() < 0.1 * np.abs(base(family)).max()


def test_norms_of_gemma_are_stored_as_differences_from_one(tmp_path):
    family = "Gemma3ForCausalLM"
    config = config_of(family)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors, _ = weights(family, model_from(config))
    half = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    save_file(half, tmp_path / "model.safetensors")
    model, read, _ = load(tmp_path)
    assert read["embed"]["embedding"].dtype == jnp.bfloat16
    scale = read["layer_0"]["mlp_post_norm"]["scale"]
    assert scale.dtype == jnp.float32  # 1 + w has no room in bfloat16
    name = "model.layers.0.post_feedforward_layernorm.weight"
    np.testing.assert_array_equal(scale, 1 + half[name].astype(np.float32))
    assert shapes(tmp_path)["layer_0/mlp_post_norm/scale"].dtype == jnp.float32
    huggingface(tmp_path / "out", model, read)
    from safetensors.flax import load_file

    again = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in half.items():
        np.testing.assert_array_equal(again[name], array)


def test_fused_kernels_cannot_keep_their_codes(tmp_path):
    model = model_from(config_of("GPT2LMHeadModel"))
    _, params = weights("GPT2LMHeadModel", model)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel stores several kernels"):
        jc.export.compressed_tensors(tmp_path / "out", model, params)

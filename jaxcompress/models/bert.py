"""A BERT encoder in plain Flax Linen, and the sentence embeddings made of its states.

all-MiniLM-L6-v2 and BERT itself are settings of this one module. Axes: B batch, T
tokens, H heads, D head size.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress.types import DType

MODULES = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "layer": "encoder.layer.{}",
    "attention/q_proj": "attention.self.query",
    "attention/k_proj": "attention.self.key",
    "attention/v_proj": "attention.self.value",
    "attention/o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up_proj": "intermediate.dense",
    "mlp/down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
IGNORABLE = r"embeddings\.position_ids|pooler\..*"  # the states do not need them


class Attention(nn.Module):
    """Attention of every token to every other that is not padding."""

    heads: int
    sow_maps: bool
    dtype: DType

    @nn.compact
    def __call__(self, x, allowed):
        def project(name, x):
            return nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(x)

        b, t, width = x.shape
        q, k, v = (
            project(f"{name}_proj", x).reshape(b, t, self.heads, -1) for name in "qkv"
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32)
        scores = scores / math.sqrt(width // self.heads)
        # The lowest number, not -inf: a row of padding only must not become NaN.
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
        maps = jax.nn.softmax(scores, axis=-1)
        if self.sow_maps:
            self.sow("intermediates", "attention", maps)
        out = jnp.einsum("bhqk,bkhd->bqhd", maps.astype(v.dtype), v)
        return project("o_proj", out.reshape(b, t, width))


class MLP(nn.Module):
    """down(gelu(up(x))), with the exact Gaussian error function."""

    width: int
    dtype: DType

    @nn.compact
    def __call__(self, x):
        up = nn.Dense(self.width, dtype=self.dtype, name="up_proj")
        down = nn.Dense(x.shape[-1], dtype=self.dtype, name="down_proj")
        return down(nn.gelu(up(x), approximate=False))


class Block(nn.Module):
    """One layer: attention and feed-forward, each added and then normalized."""

    heads: int
    mlp_width: int
    norm_eps: float
    sow_intermediates: bool
    dtype: DType

    @nn.compact
    def __call__(self, x, allowed):
        def norm(name):
            return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=name)

        attention = Attention(
            self.heads, self.sow_intermediates, self.dtype, name="attention"
        )
        x = norm("attention_norm")(x + attention(x, allowed))
        mlp = MLP(self.mlp_width, self.dtype, name="mlp")
        x = norm("mlp_norm")(x + mlp(x))
        if self.sow_intermediates:
            self.sow("intermediates", "hidden", x)
        return x, None


class Bert(nn.Module):
    """An encoder: tokens `[B, T]` to hidden states `[B, T, width]`.

    `scan` stacks the layers' parameters along axis 0 under `layers` instead of
    `layer_0`, `layer_1`, ... (`stack_layers`). `sow_intermediates` leaves attention
    maps `[B, H, T, T]` and hidden states in the "intermediates" collection.

    Example:
      >>> sizes = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 64}
      >>> encoder = jc.models.Bert(vocab_size=100, **sizes)
      >>> jax.eval_shape(encoder.init_with_output, key, tokens)[0].shape
      (2, 16, 32)
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    length: int = 512
    types: int = 2
    norm_eps: float = 1e-12
    scan: bool = False
    sow_intermediates: bool = False
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, tokens, mask=None, types=None):
        """Return hidden states of the last layer, `[B, T, width]`.

        `mask` `[B, T]` is true where a token is not padding, all by default; `types`
        `[B, T]` are the numbers of the segments, 0 by default. Raises ValueError on
        texts longer than the model's positions.
        """
        length = tokens.shape[1]
        if length > self.length:
            raise ValueError(
                f"texts of {length} tokens; the model has {self.length} "
                "positions: cut them"
            )
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask > 0
        types = jnp.zeros_like(tokens) if types is None else types

        def embed(name, size):
            return nn.Embed(size, self.width, dtype=self.dtype, name=name)

        places = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
        x = embed("embed", self.vocab_size)(tokens)
        x = x + embed("positions", self.length)(places)
        x = x + embed("types", self.types)(types)
        norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="embed_norm")
        x = norm(x)
        if self.sow_intermediates:
            self.sow("intermediates", "hidden", x)
        allowed = mask[:, None, None, :]
        options = {
            "heads": self.heads,
            "mlp_width": self.mlp_width,
            "norm_eps": self.norm_eps,
            "sow_intermediates": self.sow_intermediates,
            "dtype": self.dtype,
        }
        if not self.scan:
            for layer in range(self.layers):
                x, _ = Block(**options, name=f"layer_{layer}")(x, allowed)
            return x
        stacked = nn.scan(
            Block,
            variable_axes={True: 0},
            split_rngs={True: True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        return stacked(**options, name="layers")(x, allowed)[0]


def sentence_embeddings(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean state of each text, of length 1: `[B, T, width]` to `[B, width]`.

    As all-MiniLM-L6-v2 does it; padding does not count. Source: Reimers and Gurevych
    2019, Sentence-BERT (arXiv 1908.10084).

    Args:
      states: of a `Bert`, `[B, T, width]`.
      mask: above zero where a token is not padding, `[B, T]`.

    Example:
      >>> states, mask = jnp.ones((2, 3, 4)), jnp.ones((2, 3))
      >>> jc.models.sentence_embeddings(states, mask).shape
      (2, 4)
    """
    counts = (mask > 0)[..., None]
    total = jnp.where(counts, states.astype(jnp.float32), 0).sum(axis=1)
    length = jnp.linalg.norm(total, axis=-1, keepdims=True)
    return total / jnp.maximum(length, 1e-12)


def bert_from(config: Mapping[str, Any]) -> Bert:
    """Return the encoder that a Hugging Face `config.json` of a BertModel describes.

    Raises ValueError on an activation or kind of positions that is not BERT's own.
    """
    kind = config.get("position_embedding_type", "absolute")
    if config.get("hidden_act", "gelu") != "gelu" or kind != "absolute":
        raise ValueError(
            f"hidden_act {config.get('hidden_act')!r} with {kind!r} positions: only "
            "gelu with absolute positions is supported"
        )
    return Bert(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        length=config["max_position_embeddings"],
        types=config.get("type_vocab_size", 2),
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )

"""Causal self-attention with grouped key/value heads.

Axes: B batch, T query tokens, S key slots, H heads, K key/value heads, D head size.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress.models.rope import rotate


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads.

    Scores are multiplied by `scale`; None stands for `1 / sqrt(head_size)`.
    """

    heads: int
    kv_heads: int
    head_size: int
    rope_scale: float
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    sow_maps: bool
    dtype: Any
    scale: float | None = None

    @nn.compact
    def __call__(self, x, angles, allowed, cache, index):
        def project(name, heads):
            dense = nn.Dense(
                heads * self.head_size,
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                name=name,
            )
            return dense(x).reshape(*x.shape[:2], heads, self.head_size)

        q = project("q_proj", self.heads)
        k = project("k_proj", self.kv_heads)
        v = project("v_proj", self.kv_heads)
        if self.qk_norm:
            q = nn.RMSNorm(epsilon=self.norm_eps, dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(epsilon=self.norm_eps, dtype=self.dtype, name="k_norm")(k)
        if angles is not None:
            q = rotate(q, angles, self.rope_scale)
            k = rotate(k, angles, self.rope_scale)
        if cache is not None:
            start = (0, index, 0, 0)
            k = jax.lax.dynamic_update_slice(
                cache["key"], k.astype(cache["key"].dtype), start
            )
            v = jax.lax.dynamic_update_slice(
                cache["value"], v.astype(cache["value"].dtype), start
            )
            cache = {"key": k, "value": v}
        group = self.heads // self.kv_heads
        # Heads that share keys form one matrix, [B, K, G * T, D].
        q = q.reshape(*q.shape[:2], self.kv_heads, group, self.head_size)
        b, t, s = *q.shape[:2], k.shape[1]
        q = q.transpose(0, 2, 3, 1, 4).reshape(b, self.kv_heads, -1, self.head_size)
        k = k.astype(q.dtype).transpose(0, 2, 3, 1)
        v = v.astype(q.dtype).transpose(0, 2, 1, 3)
        scores = (q @ k).astype(jnp.float32)
        if self.scale is None:
            scores = scores / math.sqrt(self.head_size)
        else:
            scores = scores * self.scale
        scores = scores.reshape(b, self.heads, t, s)
        # The lowest number, not -inf: a row of padding only must not become NaN.
        scores = jnp.where(allowed[:, None], scores, jnp.finfo(jnp.float32).min)
        maps = jax.nn.softmax(scores, axis=-1)
        if self.sow_maps:
            self.sow("intermediates", "attention", maps)
        out = maps.astype(q.dtype).reshape(b, self.kv_heads, -1, s) @ v
        out = out.reshape(b, self.heads, t, self.head_size).transpose(0, 2, 1, 3)
        out = nn.Dense(
            x.shape[-1], use_bias=self.out_bias, dtype=self.dtype, name="o_proj"
        )(out.reshape(b, t, -1))
        return out, cache

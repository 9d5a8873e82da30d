"""Causal self-attention with grouped key/value heads.

The cache holds keys `[B, K, D, S]` and values `[B, K, S, D]`, as products read them.
Axes: B batch, T query tokens, S key slots, H heads, K key/value heads, D head size.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress.models.rope import rotate
from jaxcompress.types import DType

FEW = 16  # rows of queries: fewer are multiplied by keys one by one on CPUs
LONG = 2048  # slots from which the product with values is too


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply `[..., n, m]` by `[..., m, l]`, few rows by multiplying and adding up.

    XLA for CPUs takes up to eight times as long for products of a few rows with a
    matrix for each text and head.
    """
    if x.shape[-2] > FEW or jax.default_backend() != "cpu":
        return x @ y
    wide = jnp.promote_types(x.dtype, jnp.float32)
    products = x[..., :, :, None].astype(wide) * y[..., None, :, :].astype(wide)
    return products.sum(axis=-2).astype(x.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads.

    Scores are multiplied by `scale`; None means `1 / sqrt(head_size)`.
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
    dtype: DType
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
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = k.astype(cache["key"].dtype), v.astype(cache["value"].dtype)
            write = jax.lax.dynamic_update_slice
            k = write(cache["key"], k, (0, 0, 0, index))
            v = write(cache["value"], v, (0, 0, index, 0))
            cache = {"key": k, "value": v}
        group = self.heads // self.kv_heads
        # Heads that share keys form one matrix, [B, K, G * T, D].
        q = q.reshape(*q.shape[:2], self.kv_heads, group, self.head_size)
        b, t, s = *q.shape[:2], k.shape[-1]
        q = q.transpose(0, 2, 3, 1, 4).reshape(b, self.kv_heads, -1, self.head_size)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        scores = product(q, k).astype(jnp.float32)
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
        maps = maps.astype(q.dtype).reshape(b, self.kv_heads, -1, s)
        out = product(maps, v) if s >= LONG else maps @ v
        out = out.reshape(b, self.heads, t, self.head_size).transpose(0, 2, 1, 3)
        out = nn.Dense(
            x.shape[-1], use_bias=self.out_bias, dtype=self.dtype, name="o_proj"
        )(out.reshape(b, t, -1))
        return out, cache

"""A decoder-only language model of the Llama family, in plain Flax Linen.

SmolLM2, Llama 2 and 3, Mistral, Qwen2 and Qwen3 are settings of this one module.
Axes: B batch, T query tokens, S key slots, H heads, K key/value heads, D head size.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress.models.rope import Scaling, rope_frequencies, rotate

PerLayer = int | tuple[int, ...]
Cache = dict[str, Any]


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads."""

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
        # Heads that share keys stand in one matrix, [B, K, G * T, D].
        q = q.reshape(*q.shape[:2], self.kv_heads, group, self.head_size)
        b, t, s = *q.shape[:2], k.shape[1]
        q = q.transpose(0, 2, 3, 1, 4).reshape(b, self.kv_heads, -1, self.head_size)
        k = k.astype(q.dtype).transpose(0, 2, 3, 1)
        v = v.astype(q.dtype).transpose(0, 2, 1, 3)
        scores = (q @ k).astype(jnp.float32) / math.sqrt(self.head_size)
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


class MLP(nn.Module):
    """The gated feed-forward part: down(silu(gate(x)) * up(x))."""

    width: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def dense(name, features):
            return nn.Dense(
                features, use_bias=self.use_bias, dtype=self.dtype, name=name
            )

        gate = nn.silu(dense("gate_proj", self.width)(x))
        return dense("down_proj", x.shape[-1])(gate * dense("up_proj", self.width)(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalized before and added."""

    attention: Mapping[str, Any]
    mlp: Mapping[str, Any]
    norm_eps: float
    sow_hidden: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, angles, allowed, cache, index):
        def norm(name):
            return nn.RMSNorm(epsilon=self.norm_eps, dtype=self.dtype, name=name)

        attention = Attention(**self.attention, dtype=self.dtype, name="attention")
        mlp = MLP(**self.mlp, dtype=self.dtype, name="mlp")
        change, cache = attention(
            norm("attention_norm")(x), angles, allowed, cache, index
        )
        x = x + change
        x = x + mlp(norm("mlp_norm")(x))
        if self.sow_hidden:
            self.sow("intermediates", "hidden", x)
        return x, cache


class Transformer(nn.Module):
    """A decoder-only language model: tokens [B, T] to next-token logits [B, T, V].

    `heads`, `kv_heads`, `mlp_width` and `sliding_window` may be tuples, one number a
    layer (a looped model only, unless all are equal). `rope_scaling` is a tuple of the
    (key, value) pairs of Hugging Face's dict. `scan` stacks the layers' parameters
    along axis 0 under `layers` instead of `layer_0`, `layer_1`, ...: see
    `stack_layers`. `sow_intermediates` leaves attention maps [B, H, T, S] and hidden
    states [B, T, width] in the "intermediates" collection. `dtype` is the type of the
    computation; parameters are created in float32 and may be stored in any type.
    """

    vocab_size: int
    width: int
    layers: int
    heads: PerLayer
    kv_heads: PerLayer
    head_size: int
    mlp_width: PerLayer
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | tuple[int | None, ...] | None = None
    scan: bool = False
    remat: bool = False
    sow_intermediates: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, positions=None, mask=None, cache=None):
        """Return float32 logits [B, T, V], or (logits, cache) when a cache is given.

        `positions` [B, T] are the rotary positions; by default they count on from the
        cache's index. `mask` is true where a key may be attended to: [B, T], or, with a
        cache, [B, S] over all its slots. Order is by slot, not by position, so that
        left padding needs both. Writing past the end of a cache is not detected here
        (its index is a traced number): `generate` checks it beforehand.
        """
        index = jnp.int32(0) if cache is None else cache["index"]
        slots = index + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(slots, tokens.shape)
        length = tokens.shape[1] if cache is None else cache_length(cache)
        if mask is not None and mask.shape != (tokens.shape[0], length):
            raise ValueError(
                f"mask has shape {mask.shape}; it needs one entry per key: "
                f"{(tokens.shape[0], length)}"
            )
        speeds, rope_scale = rope_frequencies(
            self.head_size, self.rope_theta, self.rope_scaling
        )
        angles = positions[..., None] * jnp.asarray(speeds, jnp.float32)[None, None]
        embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="embed")
        x = embed(tokens)
        if self.sow_intermediates:
            self.sow("intermediates", "hidden", x)
        settings = self._layer_settings(rope_scale)

        def attend_to(window):
            keys = jnp.arange(length, dtype=jnp.int32)[None, :]
            allowed = keys <= slots[:, None]
            if window is not None:
                allowed &= keys > slots[:, None] - window
            allowed = allowed[None]
            return allowed if mask is None else allowed & mask[:, None, :].astype(bool)

        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        written = {}
        if self.scan:
            if any(setting != settings[0] for setting in settings[1:]):
                raise ValueError(
                    "scan needs equal layers, and heads, kv_heads, mlp_width or "
                    "sliding_window differ between them; use scan=False"
                )
            window, options = settings[0]
            stacked = nn.scan(
                block,
                variable_axes={True: 0},  # every collection, sown ones included
                split_rngs={True: True},
                in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
                length=self.layers,
            )(**options, name="layers")
            layer_cache = None if cache is None else cache["layers"]
            x, written["layers"] = stacked(
                x, angles, attend_to(window), layer_cache, index
            )
        else:
            allowed = {window: attend_to(window) for window, _ in settings}
            for i, (window, options) in enumerate(settings):
                name = f"layer_{i}"
                layer_cache = None if cache is None else cache[name]
                x, written[name] = block(**options, name=name)(
                    x, angles, allowed[window], layer_cache, index
                )
        norm = nn.RMSNorm(epsilon=self.norm_eps, dtype=self.dtype, name="final_norm")
        x = norm(x)
        if self.tied:
            logits = embed.attend(x)
        else:
            head = nn.Dense(
                self.vocab_size, use_bias=False, dtype=self.dtype, name="head"
            )
            logits = head(x)
        logits = logits.astype(jnp.float32)
        if cache is None:
            return logits
        return logits, {"index": index + tokens.shape[1], **written}

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens of `batch` texts, in the compute type.

        A pytree: `index`, the tokens written so far, and keys and values [B, S, K, D]
        under each layer's name (with a leading layer axis where the model is scanned).
        """
        kv_heads = self._per_layer("kv_heads")

        def zeros(*shape):
            return {name: jnp.zeros(shape, self.dtype) for name in ("key", "value")}

        cache = {"index": jnp.int32(0)}
        if self.scan:
            shape = (self.layers, batch, length, kv_heads[0], self.head_size)
            return cache | {"layers": zeros(*shape)}
        for i, heads in enumerate(kv_heads):
            cache[f"layer_{i}"] = zeros(batch, length, heads, self.head_size)
        return cache

    def _per_layer(self, field):
        value = getattr(self, field)
        values = value if isinstance(value, tuple | list) else (value,) * self.layers
        if len(values) != self.layers:
            raise ValueError(
                f"{field} has {len(values)} entries for {self.layers} layers; give one "
                "number, or one for each layer"
            )
        return tuple(values)

    def _layer_settings(self, rope_scale):
        """For each layer its sliding window and the fields of its Block."""
        fields = ("heads", "kv_heads", "mlp_width", "sliding_window")
        settings = []
        for i, values in enumerate(zip(*map(self._per_layer, fields), strict=True)):
            heads, kv_heads, mlp_width, window = values
            if kv_heads < 1 or heads % kv_heads:
                raise ValueError(
                    f"layer_{i}: {heads} heads cannot share {kv_heads} key/value "
                    "heads; heads must be a multiple of kv_heads"
                )
            attention = {
                "heads": heads,
                "kv_heads": kv_heads,
                "head_size": self.head_size,
                "rope_scale": rope_scale,
                "norm_eps": self.norm_eps,
                "qkv_bias": self.qkv_bias,
                "out_bias": self.out_bias,
                "qk_norm": self.qk_norm,
                "sow_maps": self.sow_intermediates,
            }
            options = {
                "attention": attention,
                "mlp": {"width": mlp_width, "use_bias": self.mlp_bias},
                "norm_eps": self.norm_eps,
                "sow_hidden": self.sow_intermediates,
                "dtype": self.dtype,
            }
            settings.append((window, options))
        return settings


def cache_length(cache: Cache) -> int:
    """The number of tokens a cache has room for."""
    layer = cache["layers"] if "layers" in cache else cache["layer_0"]
    return layer["key"].shape[-3]


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the looped model as those of the scanned one (`scan=True`).

    Stacks every leaf along a new axis 0, compressed ones included. Raises ValueError
    where there is no `layer_0` or the layers differ in structure or shape.
    """
    names = [f"layer_{i}" for i in range(len(params)) if f"layer_{i}" in params]
    if not names:
        raise ValueError(f"no layer_0 among {sorted(params)}: not a looped model")
    layers = [params[name] for name in names]
    for name, layer in zip(names, layers, strict=True):
        if _signature(layer) != _signature(layers[0]):
            raise ValueError(
                f"{name} differs from {names[0]} in structure or shapes; layers that "
                "differ cannot be stacked, keep the looped model"
            )
    rest = {key: value for key, value in params.items() if key not in names}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the scanned model as those of the looped one (`scan=False`)."""
    if "layers" not in params:
        raise ValueError(f"no layers among {sorted(params)}: not a scanned model")
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    rest = {key: value for key, value in params.items() if key != "layers"}
    for i in range(count):
        rest[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], params["layers"])
    return rest


def _signature(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

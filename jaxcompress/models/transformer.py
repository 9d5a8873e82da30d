"""A decoder-only language model in plain Flax Linen.

SmolLM2, Llama 2 and 3, Mistral, Qwen2, Qwen3, Qwen3-MoE, Gemma 3 and GPT-2 are settings
of this one module.
Axes: B batch, T query tokens, S key slots, H heads, K key/value heads, D head size.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress.models.attention import Attention
from jaxcompress.models.cache import Cache, cache_length
from jaxcompress.models.feed_forward import ACTIVATIONS, MLP, Experts
from jaxcompress.models.rope import Scaling, rope_frequencies
from jaxcompress.types import DType, Params

PerLayer = int | tuple[int, ...]


NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalized before and added.

    With `post_norms`, what is added is normalized too (Gemma).
    """

    attention: Mapping[str, Any]
    mlp: Mapping[str, Any]
    norm_eps: float
    sow_hidden: bool
    dtype: DType
    norm: str = "rms"
    post_norms: bool = False

    @nn.compact
    def __call__(self, x, angles, allowed, cache, index, variant=None):
        """Return x after the layer, and its part of the cache.

        `variant`, where given, indexes the leading axis of `angles` and `allowed`:
        scanned layers may differ in them.
        """

        def norm(name):
            return NORMS[self.norm](epsilon=self.norm_eps, dtype=self.dtype, name=name)

        if variant is not None:
            allowed = allowed[variant]
            angles = None if angles is None else angles[variant]
        attention = Attention(**self.attention, dtype=self.dtype, name="attention")
        feed_forward = Experts if "experts" in self.mlp else MLP
        mlp = feed_forward(**self.mlp, dtype=self.dtype, name="mlp")
        change, cache = attention(
            norm("attention_norm")(x), angles, allowed, cache, index
        )
        x = x + (norm("attention_post_norm")(change) if self.post_norms else change)
        change = mlp(norm("mlp_norm")(x))
        x = x + (norm("mlp_post_norm")(change) if self.post_norms else change)
        if self.sow_hidden:
            self.sow("intermediates", "hidden", x)
        return x, cache


class Transformer(nn.Module):
    """A decoder-only language model: tokens [B, T] to next-token logits [B, T, V].

    `heads`, `kv_heads`, `mlp_width` and `sliding_window` may be tuples, one number a
    layer; a scanned model needs equal numbers, except for `sliding_window`. `scan`
    stacks the layers' parameters along axis 0 under `layers` instead of `layer_0`,
    `layer_1`, ...: see `stack_layers`. `sow_intermediates` leaves attention maps
    [B, H, T, S] and hidden states [B, T, width] in the "intermediates" collection.
    `dtype` is the type of the computation; parameters are created in float32 and may be
    stored in any type.

    Attributes:
      rope_theta: base of the rotary positions; None for none.
      rope_scaling: the (key, value) pairs of Hugging Face's dict, as a tuple.
      sliding_rope_theta: base in layers with a sliding window, which then have no
        `rope_scaling`; None where they rotate like the others.
      positions: number of learned positions, added to the embedding; None for none.
      tied: the head is the embedding.
      qk_norm: queries and keys are normalized before they rotate.
      attention_scale: factor of the scores; None for `1 / sqrt(head_size)`.
      activation: of the feed-forward layers: "silu", "gelu", "gelu_tanh" or "relu".
      gated: the feed-forward layers multiply by a gate.
      norm: "rms", or "layer" with means and biases.
      post_norms: attention and feed-forward are normalized after, too.
      scaled_embedding: embeddings are multiplied by `sqrt(width)`.
      experts: number of experts in a feed-forward layer; None where all are dense.
      chosen_experts: experts that each token passes.
      expert_width: hidden neurons of an expert.
      normalized_experts: the weights of the chosen experts add up to 1.
      dense_layers: indices of layers without experts.
      logits: False returns the normalized hidden states [B, T, width] instead.

    Example:
      >>> logits = model.apply({"params": params}, tokens)
    """

    vocab_size: int
    width: int
    layers: int
    heads: PerLayer
    kv_heads: PerLayer
    head_size: int
    mlp_width: PerLayer
    rope_theta: float | None = 10000.0
    rope_scaling: Scaling | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | tuple[int | None, ...] | None = None
    sliding_rope_theta: float | None = None
    positions: int | None = None
    attention_scale: float | None = None
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"
    post_norms: bool = False
    scaled_embedding: bool = False
    experts: int | None = None
    chosen_experts: int = 1
    expert_width: int | None = None
    normalized_experts: bool = True
    dense_layers: tuple[int, ...] = ()
    logits: bool = True
    scan: bool = False
    remat: bool = False
    sow_intermediates: bool = False
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, tokens, positions=None, mask=None, cache=None, last=False):
        """Return float32 logits [B, T, V], or (logits, cache) when a cache is given.

        `positions` [B, T] are the rotary positions; by default they count on from the
        cache's index. `mask` is true where a key may be attended to: [B, T], or, with a
        cache, [B, S] over all its slots. Order is by slot, not by position, so that
        left padding needs both. Writing past the end of a cache is not detected here
        (its index is a traced number): `generate` checks it beforehand. With `last`
        the logits are those of the last position alone, [B, 1, V].
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
        self._check()
        embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="embed")
        x = embed(tokens)
        if self.scaled_embedding:
            x = x * jnp.asarray(math.sqrt(self.width), x.dtype)
        if self.positions is not None:
            if tokens.shape[1] > self.positions:
                raise ValueError(
                    f"texts of {tokens.shape[1]} tokens; the model has "
                    f"{self.positions} positions: cut them"
                )
            learned = nn.Embed(
                self.positions, self.width, dtype=self.dtype, name="positions_embed"
            )
            x = x + learned(positions)
        if self.sow_intermediates:
            self.sow("intermediates", "hidden", x)

        def attend_to(window):
            keys = jnp.arange(length, dtype=jnp.int32)[None, :]
            allowed = keys <= slots[:, None]
            if window is not None:
                allowed &= keys > slots[:, None] - window
            allowed = allowed[None]
            return allowed if mask is None else allowed & mask[:, None, :].astype(bool)

        windows = self._per_layer("sliding_window")
        variants = list(dict.fromkeys(windows))
        rotations = {window: self._rotation(window, positions) for window in variants}
        angles = {window: rotations[window][0] for window in variants}
        allowed = {window: attend_to(window) for window in variants}
        settings = self._layer_settings(
            [rotations[window][1] for window in windows],
        )
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        written = {}
        if self.scan:
            if any(setting != settings[0] for setting in settings[1:]):
                raise ValueError(
                    "scan needs equal layers, and heads, kv_heads, mlp_width, "
                    "experts or the scale of the rotation differ between them; use "
                    "scan=False"
                )
            one = len(variants) == 1
            stacked = nn.scan(
                block,
                variable_axes={True: 0},  # every collection, sown ones included
                split_rngs={True: True},
                in_axes=(
                    nn.broadcast,
                    nn.broadcast,
                    0,
                    nn.broadcast,
                    nn.broadcast if one else 0,
                ),
                length=self.layers,
            )(**settings[0], name="layers")
            layer_cache = None if cache is None else cache["layers"]
            if one:
                window = variants[0]
                inputs = (angles[window], allowed[window], layer_cache, index, None)
            else:
                turned = None
                if self.rope_theta is not None:
                    turned = jnp.stack([angles[window] for window in variants])
                seen = jnp.stack([allowed[window] for window in variants])
                order = jnp.array([variants.index(window) for window in windows])
                inputs = (turned, seen, layer_cache, index, order)
            x, written["layers"] = stacked(x, *inputs)
        else:
            for i, (window, options) in enumerate(zip(windows, settings, strict=True)):
                name = f"layer_{i}"
                layer_cache = None if cache is None else cache[name]
                x, written[name] = block(**options, name=name)(
                    x, angles[window], allowed[window], layer_cache, index
                )
        norm = NORMS[self.norm](
            epsilon=self.norm_eps, dtype=self.dtype, name="final_norm"
        )
        x = norm(x)
        if cache is not None:
            cache = {"index": index + tokens.shape[1], **written}
        if last:
            x = x[:, -1:]
        if not self.logits:
            return x if cache is None else (x, cache)
        if self.tied:
            logits = embed.attend(x)
        else:
            head = nn.Dense(
                self.vocab_size, use_bias=False, dtype=self.dtype, name="head"
            )
            logits = head(x)
        logits = logits.astype(jnp.float32)
        return logits if cache is None else (logits, cache)

    @nn.nowrap
    def head(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Return float32 logits of normalized hidden states, the output without
        `logits`.

        Args:
          params: of the model.
          hidden: `[..., width]`.
        """
        if self.tied:
            embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, parent=None)
            variables = {"params": params["embed"]}
            logits = embed.apply(variables, hidden, method="attend")
        else:
            dense = nn.Dense(
                self.vocab_size, use_bias=False, dtype=self.dtype, parent=None
            )
            logits = dense.apply({"params": params["head"]}, hidden)
        return logits.astype(jnp.float32)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Return an empty cache for `length` tokens of `batch` texts, in the compute
        type.

        A pytree: `index`, the tokens written so far, and keys [B, K, D, S] and values
        [B, K, S, D] under each layer's name (with a leading layer axis where the model
        is scanned).
        """
        kv_heads = self._per_layer("kv_heads")

        def zeros(lead, heads):
            keys = (*lead, batch, heads, self.head_size, length)
            values = (*lead, batch, heads, length, self.head_size)
            return {
                "key": jnp.zeros(keys, self.dtype),
                "value": jnp.zeros(values, self.dtype),
            }

        cache = {"index": jnp.int32(0)}
        if self.scan:
            return cache | {"layers": zeros((self.layers,), kv_heads[0])}
        for i, heads in enumerate(kv_heads):
            cache[f"layer_{i}"] = zeros((), heads)
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

    def _rotation(self, window, positions):
        """Return angles [B, T, D/2] of a layer with this window, and their scale."""
        theta, scaling = self.rope_theta, self.rope_scaling
        if theta is None:
            return None, 1.0
        if window is not None and self.sliding_rope_theta is not None:
            theta, scaling = self.sliding_rope_theta, None
        speeds, scale = rope_frequencies(self.head_size, theta, scaling)
        speeds = jnp.asarray(speeds, jnp.float32)[None, None]
        return positions[..., None] * speeds, scale

    def _check(self):
        if self.norm not in NORMS or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"norm is {self.norm!r} and activation {self.activation!r}; known are "
                f"{', '.join(NORMS)} and {', '.join(ACTIVATIONS)}"
            )
        if self.experts and not 0 < self.chosen_experts <= self.experts:
            raise ValueError(
                f"each token passes {self.chosen_experts} of {self.experts} experts; "
                "choose between 1 and all"
            )

    def _layer_settings(self, rope_scales):
        """Return the fields of each layer's Block."""
        fields = ("heads", "kv_heads", "mlp_width")
        settings = []
        for i, values in enumerate(zip(*map(self._per_layer, fields), strict=True)):
            heads, kv_heads, mlp_width = values
            if kv_heads < 1 or heads % kv_heads:
                raise ValueError(
                    f"layer_{i}: {heads} heads cannot share {kv_heads} key/value "
                    "heads; heads must be a multiple of kv_heads"
                )
            attention = {
                "heads": heads,
                "kv_heads": kv_heads,
                "head_size": self.head_size,
                "rope_scale": rope_scales[i],
                "norm_eps": self.norm_eps,
                "qkv_bias": self.qkv_bias,
                "out_bias": self.out_bias,
                "qk_norm": self.qk_norm,
                "sow_maps": self.sow_intermediates,
                "scale": self.attention_scale,
            }
            if self.experts and i not in self.dense_layers:
                mlp = {
                    "width": self.expert_width,
                    "experts": self.experts,
                    "chosen": self.chosen_experts,
                    "normalized": self.normalized_experts,
                }
            else:
                mlp = {
                    "width": mlp_width,
                    "use_bias": self.mlp_bias,
                    "gated": self.gated,
                }
            options = {
                "attention": attention,
                "mlp": mlp | {"activation": self.activation},
                "norm_eps": self.norm_eps,
                "sow_hidden": self.sow_intermediates,
                "dtype": self.dtype,
                "norm": self.norm,
                "post_norms": self.post_norms,
            }
            settings.append(options)
        return settings

"""The `Transformer` of `models`, in integers: logits that depend on the tokens alone.

The same prefix gives the same bits in any batch, by prefill or step by step, with a
cache of any length, on any instruction set or device. Read it together with
`models/transformer.py`; each class there is a function here.

Activations are `Rows`: int32 values with one exponent per token (and head). Where they
enter a matrix product, a shift rounds them to small integers, which float32 holds and
sums without rounding: see `rounding.prove`. Everything between products is int32.
"""

import dataclasses
import functools
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.models.transformer import Transformer
from jaxcompress.textcoding import fixed_point as fp
from jaxcompress.textcoding.fixed_point import FRACTION, ONE, Rows
from jaxcompress.textcoding.rounding import EXACT, Linear, split

MOST_KEYS = 1 << 13
_QUERIES = 256  # least queries of a block of attention
LOGIT_LIMIT = 1 << 28
# Probabilities in Q15 sum to ONE and at most a half more per key.
VALUE_BOUND = EXACT // (ONE + MOST_KEYS // 2)
Cache = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExactTransformer:
    """An integer language model, built by `exact`.

    Args:
      arrays: nested dict of integer arrays and `Linear` maps; `layers` is one dict of
        stacked arrays where all layers are alike, else a list of dicts.
      model: the settings of the float model.
      context: positions that the rotary tables hold.

    Example:
      >>> exact_model = jc.textcoding.exact(model, params, context=64)
      >>> jax.eval_shape(lambda m, ids: m.apply(ids), exact_model, tokens).dtype
      dtype('int32')
    """

    arrays: Any
    model: Transformer = dataclasses.field(metadata={"static": True})
    context: int = dataclasses.field(metadata={"static": True})

    def apply(self, tokens: jax.Array, cache: Cache | None = None) -> Any:
        """Return next-token logits `[B, T, V]` of tokens `[B, T]`, int32; jittable.

        A logit is a base-2 logarithm in units of `2**-12`: multiply by
        `log(2) / 4096` for nats. With a cache, returns (logits, cache). Raises
        ValueError where the tokens, or the cache, are longer than the context.
        """
        x, cache = self.hidden(tokens, cache)
        logits = self.logits(x)
        return logits if cache is None else (logits, cache)

    def hidden(
        self, tokens: jax.Array, cache: Cache | None = None
    ) -> tuple[Rows, Cache | None]:
        """Return final hidden states, rows `[B, T, width]`, and the cache or None."""
        model, arrays = self.model, self.arrays
        length = tokens.shape[1] if cache is None else _cache_length(cache)
        if length > self.context:
            raise ValueError(
                f"{length} tokens, and the exact model was built for a context of "
                f"{self.context}; pass exact(..., context={length})"
            )
        index = jnp.int32(0) if cache is None else cache["index"]
        slots = index + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        rotary = [table[slots][None, :, None] for table in arrays["rotary"]]
        keys = jnp.arange(length, dtype=jnp.int32)[None, :]
        embedding = arrays["embed"]
        values = jnp.take(embedding.weight, tokens, axis=1).astype(jnp.int32)
        values = jnp.moveaxis(values, 0, -1)
        x = Rows(
            values * embedding.scale[tokens][..., None],
            jnp.full((*tokens.shape, 1), embedding.exponent - 15, jnp.int32),
        )
        x = fp.normalize(x)

        def layer(x, layer, cache, window):
            allowed = keys <= slots[:, None]
            if window is not None:
                allowed &= keys > slots[:, None] - window
            return _block(model, layer, x, rotary, allowed[None, None], cache, index)

        layers = arrays["layers"]
        stored = None if cache is None else cache["layers"]
        if isinstance(layers, dict):
            window = _per_layer(model, "sliding_window")[0]

            def body(x, layer_and_cache):
                return layer(x, *layer_and_cache, window)

            x, written = jax.lax.scan(body, x, (layers, stored))
        else:
            written = []
            windows = _per_layer(model, "sliding_window")
            for i, window in enumerate(windows):
                one = None if stored is None else stored[i]
                x, one = layer(x, layers[i], one, window)
                written.append(one)
        x = _norm(arrays["final_norm"], x)
        if cache is None:
            return x, None
        return x, {"index": index + tokens.shape[1], "layers": written}

    def logits(self, x: Rows) -> jax.Array:
        """Return logits, int32 `[B, T, V]`, of hidden states."""
        head = self.arrays.get("head", self.arrays["embed"])
        scale = self.arrays["log2_e"]
        rows = _linear(head, x)
        rows = Rows(fp.multiply(rows.values, scale[0]), rows.exponent + scale[1] + 15)
        return fp.to_fixed(rows, FRACTION, LOGIT_LIMIT)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Return an empty cache for `length` tokens of `batch` texts."""

        def empty(kv_heads, *lead):
            shape = (*lead, batch, kv_heads, length)
            one = {"exponent": jnp.zeros((*shape, 1), jnp.int32)}
            one["values"] = jnp.zeros((*shape, self.model.head_size), jnp.float32)
            return {"key": one, "value": dict(one)}

        kv_heads = _per_layer(self.model, "kv_heads")
        if isinstance(self.arrays["layers"], dict):
            layers: Any = empty(kv_heads[0], self.model.layers)
        else:
            layers = [empty(heads) for heads in kv_heads]
        return {"index": jnp.int32(0), "layers": layers}

    def widen(self) -> "ExactTransformer":
        """Return same model with its weights held in float32: faster, and larger."""

        def one(x: Any) -> Any:
            if not isinstance(x, Linear):
                return x
            return dataclasses.replace(x, weight=jnp.asarray(x.weight, jnp.float32))

        arrays = jax.tree.map(one, self.arrays, is_leaf=lambda x: isinstance(x, Linear))
        return dataclasses.replace(self, arrays=jax.tree.map(jnp.asarray, arrays))

    def unstack(self) -> "ExactTransformer":
        """Return same model with a list of layers: faster steps, longer to compile.

        The digest is another.
        """
        layers = [
            jax.tree.map(lambda x, i=i: x[i], self.arrays["layers"])
            for i in range(self.model.layers)
        ]
        return dataclasses.replace(self, arrays=self.arrays | {"layers": layers})

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of every integer and setting that the logits depend on."""
        digest = hashlib.sha256()
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.arrays)
        for path, x in leaves:
            x = np.asarray(x)
            x = x.astype(np.int8 if x.dtype == np.float32 else x.dtype)
            about = [jax.tree_util.keystr(path), str(x.dtype), list(x.shape)]
            digest.update(json.dumps(about).encode())
            digest.update(x.astype(x.dtype.newbyteorder("<")).tobytes())
        parts = [
            x.parts
            for x in jax.tree.leaves(
                self.arrays, is_leaf=lambda x: isinstance(x, Linear)
            )
            if isinstance(x, Linear)
        ]
        settings = [
            parts,
            self.model.head_size,
            _per_layer(self.model, "sliding_window"),
            _per_layer(self.model, "heads"),
            _per_layer(self.model, "kv_heads"),
        ]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()


def _block(model, layer, x, rotary, allowed, cache, index):
    """Apply `Block`: attention and feed-forward, each normalized before and added."""
    change, cache = _attention(
        model, layer, _norm(layer["attention_norm"], x), rotary, allowed, cache, index
    )
    x = fp.add(x, change)
    normed = _norm(layer["mlp_norm"], x)
    gate = _linear(layer["gate_proj"], normed)
    silu = Rows(fp.multiply(gate.values, fp.sigmoid(gate)), gate.exponent)
    up = _linear(layer["up_proj"], normed)
    return fp.add(x, _linear(layer["down_proj"], fp.product(silu, up))), cache


def _attention(model, layer, x, rotary, allowed, cache, index):
    """Apply `Attention`: causal, with rotary positions and grouped key/value heads."""
    size = model.head_size
    bound = math.isqrt(EXACT // size)  # of queries and keys

    def project(name, norm=None):
        rows = _linear(layer[name], x)
        *lead, width = rows.values.shape
        values = rows.values.reshape(*lead, width // size, size)
        shape = (*values.shape[:-1], 1)
        rows = Rows(values, jnp.broadcast_to(rows.exponent[..., None], shape))
        return rows if norm is None else _norm(layer[norm], rows)

    names = ("q_norm", "k_norm") if model.qk_norm else (None, None)
    q = _rotate(project("q_proj", names[0]), *rotary)
    # The temperature of the softmax, and base 2 instead of e.
    q = Rows(fp.multiply(q.values, layer["score"][0]), q.exponent)
    q = fp.round_to(q, bound)
    q = Rows(q.values, q.exponent + layer["score"][1] + 15)
    k = fp.round_to(_rotate(project("k_proj", names[1]), *rotary), bound)
    v = fp.round_to(project("v_proj"), VALUE_BOUND)
    k, v = (
        {"values": y.values.astype(jnp.float32), "exponent": y.exponent} for y in (k, v)
    )
    k, v = (jax.tree.map(lambda y: jnp.swapaxes(y, 1, 2), y) for y in (k, v))
    if cache is not None:

        def write(old, new):
            return jax.lax.dynamic_update_slice(old, new, (0, 0, index, 0))

        k = jax.tree.map(write, cache["key"], k)
        v = jax.tree.map(write, cache["value"], v)
        cache = {"key": k, "value": v}
    length = q.values.shape[1]
    block = length if cache is not None else max(_QUERIES, -(-length // 8))
    blocks = []
    for start in range(0, length, block):
        end = min(start + block, length)
        # Without a cache, no query sees a key that follows its block.
        seen = k["values"].shape[2] if cache is not None else end
        own = Rows(*(y[:, start:end] for y in q))
        before = [jax.tree.map(lambda y, n=seen: y[:, :, :n], y) for y in (k, v)]
        blocks.append(_attend(own, *before, allowed[..., start:end, :seen]))
    out = Rows(*(jnp.concatenate(y, axis=1) for y in zip(*blocks, strict=True)))
    b, t = out.values.shape[:2]
    # One exponent for all heads of a token.
    exponent = jnp.max(out.exponent, axis=2, keepdims=True)
    values = fp.shift_right(out.values, exponent - out.exponent)
    out = Rows(values.reshape(b, t, -1), exponent[..., 0])
    return _linear(layer["o_proj"], out), cache


def _attend(q, k, v, allowed):
    """Return rows `[B, T, H, D]`: values weighted by the softmax of the scores."""
    kv_heads = v["values"].shape[1]
    b, t, heads, _ = q.values.shape
    # Heads that share keys are in one matrix, [B, K, G * T, D].
    q = Rows(*(jnp.swapaxes(y, 1, 2).reshape(b, kv_heads, -1, y.shape[-1]) for y in q))
    scores = exact_dot(q.values, jnp.swapaxes(k["values"], 2, 3))
    exponent = q.exponent + jnp.swapaxes(k["exponent"], 2, 3)
    scores = fp.shift_right(scores << 6, 6 - FRACTION - exponent)
    allowed = jnp.broadcast_to(
        jnp.tile(allowed, (1, 1, heads // kv_heads, 1)), scores.shape
    )
    weights = _softmax(scores, allowed, v["exponent"])
    out, exponent = weights.values, weights.exponent
    out = exact_dot(out, v["values"])
    out = Rows(out << 6, exponent - 6)
    return Rows(*(y.reshape(b, heads, t, y.shape[-1]).swapaxes(1, 2) for y in out))


def _softmax(scores, allowed, exponents):
    """Return softmax of base-2 scores, times the powers of two that the values carry.

    Scores have FRACTION fractional bits. A row of probabilities sums to ONE and at most
    a half more for each key; those of keys whose values have a smaller exponent than
    the row's largest are shifted by the difference.
    """
    lowest = -fp.LIMIT
    highest = jnp.max(jnp.where(allowed, scores, lowest), axis=-1, keepdims=True)
    power = fp.power_of_half(jnp.where(allowed, highest - scores, fp.LIMIT))
    total = jnp.sum(power, axis=-1, keepdims=True, dtype=jnp.int32)
    room = jax.lax.clz(total) - 2
    short = ((total << room) + (ONE - 1)) >> 15  # rounded up, [2**14, 2**15]
    inverse = jax.lax.div(jnp.full_like(short, 1 << 29), short)
    exponents = jnp.broadcast_to(jnp.swapaxes(exponents, 2, 3), scores.shape)
    smallest = jnp.iinfo(jnp.int32).min // 2
    largest = jnp.max(jnp.where(allowed, exponents, smallest), axis=-1, keepdims=True)
    bits = jnp.where(allowed, 29 - room + largest - exponents, 30)
    values = jnp.where(allowed, fp.shift_right(power * inverse, bits), 0)
    return Rows(values, largest - 15)


def _rotate(x, cosine, sine):
    """Rotate the pairs (i, i + D/2) of rows `[B, T, H, D]`."""
    x = fp.normalize(x)
    # Halved first: a rotation may lengthen one coordinate by the root of two.
    left, right = jnp.split(fp.shift_right(x.values, 1), 2, axis=-1)
    turned = [
        fp.multiply(left, cosine) - fp.multiply(right, sine),
        fp.multiply(right, cosine) + fp.multiply(left, sine),
    ]
    return Rows(jnp.concatenate(turned, axis=-1), x.exponent + 1)


def _norm(norm, x):
    """Apply `RMSNorm`: rows divided by their root mean square, times the layer's
    scale.
    """
    scale, exponent, *epsilon = norm
    lead = (1,) * (x.values.ndim - 1)
    epsilon = Rows(*(y.reshape(*lead, 1) for y in epsilon))
    x = fp.divide_by_rms(x, epsilon)
    values = fp.multiply(x.values, scale.reshape(*lead, -1))
    return Rows(values, x.exponent + exponent + 15)


def _linear(linear, x):
    """Apply `Dense`: rows `[B, T, inputs]` to rows `[B, T, outputs]`."""
    x = fp.round_to(x, linear.bound)
    pieces = zip(
        split(x.values, linear.parts, -1),
        split(linear.weight, linear.parts),
        strict=True,
    )
    sums = functools.reduce(
        jnp.add, [exact_dot(part, weight) for part, weight in pieces]
    )
    spare = 6 - (linear.parts - 1).bit_length()
    values = fp.multiply(sums << spare, linear.scale[None, None])
    rows = Rows(values, x.exponent + linear.exponent - spare)
    if linear.bias is None:
        return rows
    bias, exponent = linear.bias
    bias = Rows((bias << 15)[None, None], jnp.full((1, 1, 1), exponent - 15))
    return fp.add(rows, bias)


def exact_dot(x, y):
    """Return matrix product of small integers, carried in float32; it does not
    round.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)


def _per_layer(model, field):
    value = getattr(model, field)
    return tuple(value) if isinstance(value, tuple | list) else (value,) * model.layers


def _cache_length(cache):
    layers = cache["layers"]
    layer = layers if isinstance(layers, dict) else layers[0]
    return layer["key"]["values"].shape[-2]

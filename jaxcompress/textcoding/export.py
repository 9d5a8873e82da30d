"""From a float language model to its integer form, and the test of the device."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.models.rope import rope_frequencies
from jaxcompress.models.stacking import unstack_layers
from jaxcompress.models.transformer import Transformer
from jaxcompress.textcoding.fixed_point import ONE
from jaxcompress.textcoding.integer_transformer import (
    MOST_KEYS,
    VALUE_BOUND,
    ExactTransformer,
    exact_dot,
)
from jaxcompress.textcoding.rounding import (
    EXACT,
    Linear,
    finite,
    rotary_table,
    round_kernel,
    round_vector,
    split,
)
from jaxcompress.tree.leaf import materialize
from jaxcompress.types import Params

_PROJECTIONS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}

# Fields of a Transformer that the integer model follows, or that change no number.
_FOLLOWED = {
    *("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width"),
    *("rope_theta", "rope_scaling", "norm_eps", "tied", "qkv_bias", "out_bias"),
    *("mlp_bias", "qk_norm", "sliding_window", "attention_scale"),
    *("scan", "remat", "sow_intermediates", "dtype", "parent", "name"),
}


def exact(
    model: Transformer, params: Params, *, context: int = 2048
) -> ExactTransformer:
    """Export a language model to integers: bit-reproducible, batch-invariant logits.

    Weights become int8 with a scale per output, activations integers of about ten bits
    per token; no operation rounds differently anywhere. Compressed leaves are
    materialized and rounded anew. The result is a pytree: pass it to jitted functions
    as an argument.

    Args:
      model: a `Transformer`, looped or scanned.
      params: its parameters, dense or compressed.
      context: tokens that a text may have, 8192 at most.

    Raises:
      TypeError: the model is no `Transformer`.
      ValueError: the model has a setting without an integer form, a weight is not
        finite, a sum of a layer cannot be bounded, or the context is out of range; it
        names the setting, or the leaf and the bound.

    Example:
      >>> exact_model = jc.textcoding.exact(model, params, context=64)
      >>> logits = jax.jit(lambda m, ids: m.apply(ids))(exact_model, tokens)  # int32
      >>> nats = logits * (np.log(2) / 4096)
    """
    if not isinstance(model, Transformer):
        raise TypeError(
            f"{type(model).__name__} has no integer form; exact takes the Transformer "
            "of jaxcompress.models"
        )
    others = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in _FOLLOWED and getattr(model, field.name) != field.default
    }
    if others or model.rope_theta is None:
        raise ValueError(
            f"no integer form of {others or {'rope_theta': None}}; the model must have "
            "the settings of the Llama family, as SmolLM2 and Qwen have"
        )
    if not 1 <= context <= MOST_KEYS:
        raise ValueError(
            f"context is {context}; exact sums of attention allow 1 to {MOST_KEYS}"
        )
    if model.scan:
        params = unstack_layers(params)
        model = model.clone(scan=False)

    def read(name: str) -> np.ndarray:
        node = params
        for key in name.split("/"):
            if key not in node:
                raise ValueError(f"the parameters have no {name}; found {sorted(node)}")
            node = node[key]
        return finite(name, materialize(node))

    speeds, rope_scale = rope_frequencies(
        model.head_size, model.rope_theta, model.rope_scaling
    )
    log2_e = np.log2(np.e)
    epsilon = round_vector("norm_eps", [model.norm_eps])
    scale = model.attention_scale or model.head_size**-0.5
    score = round_vector("score", [log2_e * rope_scale**2 * scale])

    def norm(name: str) -> tuple[Any, ...]:
        return (*round_vector(name, read(f"{name}/scale")), *epsilon)

    def layer(i: int, parts: dict[str, int]) -> dict[str, Any]:
        start = f"layer_{i}"
        arrays: dict[str, Any] = {"score": (score[0][0], score[1])}
        for name in ("attention_norm", "mlp_norm"):
            arrays[name] = norm(f"{start}/{name}")
        if model.qk_norm:
            for name in ("q_norm", "k_norm"):
                arrays[name] = norm(f"{start}/attention/{name}")
        biased = {
            "attention": (*[model.qkv_bias] * 3, model.out_bias),
            "mlp": [model.mlp_bias] * 3,
        }
        for room, names in _PROJECTIONS.items():
            for name, has_bias in zip(names, biased[room], strict=True):
                leaf = f"{start}/{room}/{name}"
                bias = read(f"{leaf}/bias") if has_bias else None
                kernel = read(f"{leaf}/kernel")
                arrays[name] = round_kernel(leaf, kernel, bias, parts.get(name, 1))
        return arrays

    layers: Any = [layer(i, {}) for i in range(model.layers)]
    layers = _stack(layers, layer, model)
    arrays = {
        "embed": round_kernel("embed", read("embed/embedding").T),
        "final_norm": norm("final_norm"),
        "layers": layers,
        "log2_e": tuple(x.reshape(()) for x in round_vector("log2_e", [log2_e])),
        "rotary": rotary_table(speeds, context),
    }
    if not model.tied:
        arrays["head"] = round_kernel("head", read("head/kernel"))
    return ExactTransformer(arrays, model, context)


def self_test(exact_model: ExactTransformer) -> None:
    """Check that this device's float32 dot products of integers do not round.

    Every shape of a product is tried with the weights whose sums are nearest to 2**24,
    and inputs that reach the proved bound, against sums on the host that cannot round
    either.

    Args:
      exact_model: of `exact`.

    Raises:
      RuntimeError: a product differs; it is named.

    Example:
      >>> jc.textcoding.self_test(jc.textcoding.exact(model, params, context=64))
    """
    head_size = exact_model.model.head_size
    bound = math.isqrt(EXACT // head_size)
    products: dict[tuple[str, int], tuple[int, np.ndarray]] = {
        ("scores", head_size): (bound, np.full((head_size, 1), bound)),
        ("values", MOST_KEYS): (ONE // MOST_KEYS, np.full((MOST_KEYS, 1), VALUE_BOUND)),
    }
    for name, linear in _linears(exact_model.arrays):
        weight = np.asarray(linear.weight)
        stacked = weight.reshape(-1, *weight.shape[-2:])
        bounds = np.asarray(linear.bound).reshape(-1)
        for kernel, bound in zip(stacked, bounds, strict=True):
            for part in split(kernel, linear.parts):
                key = (name, len(part))
                if key not in products or (
                    _reach(int(bound), part) > _reach(*products[key])
                ):
                    products[key] = (int(bound), part)
    random = np.random.default_rng(0)
    for (name, _), (bound, weight) in products.items():
        wide = weight.astype(np.float64)  # holds every sum: they are below 2**53
        order = np.argsort(np.abs(wide).sum(axis=0))[-8:]
        signs = np.sign(wide[:, order]).T * bound
        drawn = random.integers(-bound, bound + 1, (32, len(wide)))
        inputs = np.concatenate([signs, -signs, drawn])
        wanted = inputs @ wide
        computed = np.asarray(exact_dot(jnp.asarray(inputs, jnp.float32), weight))
        wrong = int((computed != wanted).sum())
        if wrong:
            raise RuntimeError(
                f"{name}: {wrong} of {computed.size} float32 dot products of integers "
                f"are not exact on {jax.devices()[0].device_kind}, up to "
                f"{int(np.abs(wanted).max())} of {EXACT}; an exact model cannot run on "
                "this device, use JAX_PLATFORMS=cpu"
            )


def _reach(bound: int, weight: np.ndarray) -> int:
    return int(np.abs(weight).sum(axis=0, dtype=np.int64).max()) * bound


def _linears(arrays: Any) -> list[tuple[str, Linear]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(
        arrays, is_leaf=lambda x: isinstance(x, Linear)
    )
    named = [(str(path[-1].key), x) for path, x in flat if isinstance(x, Linear)]
    return named


def _stack(layers: list[dict[str, Any]], build: Any, model: Transformer) -> Any:
    """Return one dict of stacked arrays where layers are alike; else the list as it
    is.
    """
    parts: dict[str, int] = {}
    for layer in layers:
        for name, linear in layer.items():
            if isinstance(linear, Linear):
                parts[name] = max(parts.get(name, 1), linear.parts)
    for i, layer in enumerate(layers):
        if any(layer[name].parts != count for name, count in parts.items()):
            layers[i] = build(i, parts)
    shapes = [[x.shape for x in jax.tree.leaves(layer)] for layer in layers]
    fields = [getattr(model, name) for name in ("heads", "kv_heads", "sliding_window")]
    uneven = any(isinstance(x, tuple | list) and len(set(x)) > 1 for x in fields)
    if uneven or any(shape != shapes[0] for shape in shapes):
        return layers
    return jax.tree.map(lambda *x: np.stack(x), *layers)

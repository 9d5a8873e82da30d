"""The units of our models: groups for `remove_units`, and the model that is left."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.models.convolutional import ConvNet
from jaxcompress.models.transformer import Transformer
from jaxcompress.pruning.structured.groups import Group
from jaxcompress.types import Params


def neuron_groups(model: Transformer) -> dict[str, Group]:
    """Return the hidden neurons of each layer's MLP, by `layer_0/mlp` and so on.

    Raises ValueError on a scanned model, whose layers all keep one width.

    Args:
      model: whose neurons may be removed.

    Example:
      >>> groups = jc.models.neuron_groups(model)
    """
    _looped(model)
    return {
        f"layer_{i}/mlp": Group(
            (
                (rf"layer_{i}/mlp/(gate|up)_proj/(kernel|bias)", -1),
                (rf"layer_{i}/mlp/down_proj/kernel", 0),
            )
        )
        for i in range(model.layers)
    }


def head_groups(model: Transformer) -> dict[str, Group]:
    """Return heads of each layer, by `layer_0/attention`: a unit is a key/value head.

    The queries that share it leave with it, so that their number per key/value head is
    the same in all layers; without grouped queries a unit is a head.

    Raises ValueError on a scanned model.

    Args:
      model: whose heads may be removed.

    Example:
      >>> groups = jc.models.head_groups(model)
    """
    _looped(model)
    return {
        f"layer_{i}/attention": Group(
            (
                (rf"layer_{i}/attention/[qkv]_proj/(kernel|bias)", -1),
                (rf"layer_{i}/attention/o_proj/kernel", 0),
            ),
            units=kv_heads,
        )
        for i, kv_heads in enumerate(_per_layer(model.kv_heads, model.layers))
    }


def layer_groups(model: Transformer) -> dict[str, Group]:
    """Return the layers themselves, as "layers": of the scanned model (`stack_layers`).

    Raises ValueError on a looped model.

    Args:
      model: whose layers may be removed.

    Example:
      >>> groups = jc.models.layer_groups(model.clone(scan=True))
    """
    if not model.scan:
        raise ValueError(
            "a looped model has its layers in no array; stack_layers(params) and "
            "model.clone(scan=True) make them one axis"
        )
    return {"layers": Group((("layers/.*", 0),), units=model.layers)}


def filter_groups(model: ConvNet) -> dict[str, Group]:
    """Return filters of each convolution, by `conv_0` and so on, over its variables.

    The names are those of the tree `{"params": ..., "batch_stats": ...}`, which must
    shrink together.

    Args:
      model: the network.

    Example:
      >>> list(jc.models.filter_groups(jc.models.ConvNet(filters=(4, 8))))
      ['conv_0', 'conv_1']
    """
    groups = {}
    for i in range(len(model.filters)):
        last = i + 1 == len(model.filters)
        reader = (
            ("params/head/kernel", 0) if last else (f"params/conv_{i + 1}/kernel", 2)
        )
        groups[f"conv_{i}"] = Group(
            (
                (f"params/conv_{i}/kernel", 3),
                (f"params/norm_{i}/(scale|bias)", 0),
                (f"batch_stats/norm_{i}/(mean|var)", 0),
                reader,
            )
        )
    return groups


def resized(model: Transformer | ConvNet, params: Params) -> Transformer | ConvNet:
    """Return model whose parameters have the shapes of `params`, after `remove_units`.

    Args:
      model: the model before.
      params: of the transformer, looped or scanned as `model.scan` says; or the
        variables of the convolutional network.

    Example:
      >>> groups = jc.models.neuron_groups(model)
      >>> keep = {name: np.arange(48) for name in groups}
      >>> smaller = jc.structured.remove_units(params, groups, keep)
      >>> jc.models.resized(model, smaller).mlp_width
      48
    """
    if isinstance(model, ConvNet):
        kernels = params["params"]
        filters = (kernels[f"conv_{i}"]["kernel"] for i in range(len(model.filters)))
        return model.clone(filters=tuple(kernel.shape[-1] for kernel in filters))
    if model.scan:
        layers = [params["layers"]]
        count = jax.tree.leaves(layers)[0].shape[0]
    else:
        count = sum(re.fullmatch(r"layer_\d+", key) is not None for key in params)
        layers = [params[f"layer_{i}"] for i in range(count)]

    def outputs(part: str, name: str, size: int) -> int | tuple[int, ...]:
        sizes = tuple(x[part][name]["kernel"].shape[-1] // size for x in layers)
        return sizes[0] if len(set(sizes)) == 1 else sizes

    return model.clone(
        layers=count,
        heads=outputs("attention", "q_proj", model.head_size),
        kv_heads=outputs("attention", "k_proj", model.head_size),
        mlp_width=outputs("mlp", "up_proj", 1),
    )


def layer_influence(
    model: Transformer, params: Params, batches: Iterable[jax.Array]
) -> jax.Array:
    """Score each layer: one less the cosine of its output with its input.

    Args:
      model: looped or scanned, as its parameters are.
      params: its parameters, compressed or not.
      batches: of tokens [B, T], all counted.

    Returns:
      The mean over tokens, `[layers]`, for `choose_units`.

    Raises:
      ValueError: no batches.

    Source: Men et al. 2024, "ShortGPT" (arXiv 2403.03853, section 3.1).

    Example:
      >>> jc.models.layer_influence(model, params, [tokens]).shape
      (2,)
    """
    watched = model.clone(sow_intermediates=True)

    @jax.jit
    def influence(params: Params, tokens: jax.Array) -> jax.Array:
        state = watched.apply({"params": params}, tokens, mutable=["intermediates"])[1]
        sown = state["intermediates"]
        first = sown["hidden"][0][None]
        if model.scan:
            others = sown["layers"]["hidden"][0]
        else:
            each = [sown[f"layer_{i}"]["hidden"][0] for i in range(model.layers)]
            others = jnp.stack(each)
        states = jnp.concatenate([first, others]).astype(jnp.float32)
        norms = jnp.maximum(jnp.linalg.norm(states, axis=-1), 1e-30)  # padding of zeros
        cosine = jnp.sum(states[1:] * states[:-1], -1) / (norms[1:] * norms[:-1])
        return 1 - jnp.mean(cosine, axis=(1, 2))

    total, tokens = jnp.zeros(model.layers), 0
    for batch in batches:
        total = total + influence(params, batch) * batch.size
        tokens += batch.size
    if not tokens:
        raise ValueError("there are no batches; pass at least one")
    return total / tokens


def _per_layer(value: Any, layers: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * layers


def _looped(model: Transformer) -> None:
    if model.scan:
        raise ValueError(
            "the layers of a scanned model all have one width, and lose different "
            "units; unstack_layers(params) and model.clone(scan=False) loop over them"
        )

"""Smaller models out of a trained one, its weights carried over, to be distilled."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.moments import Moments
from jaxcompress.models.bert import Bert
from jaxcompress.models.structure import neuron_groups, resized
from jaxcompress.models.transformer import Transformer
from jaxcompress.pruning.structured import remove_units
from jaxcompress.pruning.structured.groups import Group, choose_units
from jaxcompress.pruning.structured.unit_scores import score_units
from jaxcompress.types import Params


def fewer_layers(
    model: Transformer | Bert, params: Params, layers: int | Sequence[int]
) -> tuple[Any, Params]:
    """Return the model with some of its layers, in order, and their parameters.

    Args:
      model: looped or scanned.
      params: its parameters, compressed or not.
      layers: numbers of those that stay, increasing; or k, for every k-th: the last of
        every k, so that the last layer stays where k divides their number.

    Raises:
      ValueError: a layer that does not exist, layers out of order, none.

    Example:
      >>> student, small = jc.models.fewer_layers(model, params, 1)

    Source: every second layer, Sanh et al. 2019, DistilBERT (arXiv 1910.01108).
    """
    keep = (
        list(range(layers - 1, model.layers, layers))
        if isinstance(layers, int) and layers > 0
        else list(layers)
        if isinstance(layers, Sequence)
        else []
    )
    inside = all(0 <= layer < model.layers for layer in keep)
    if not keep or not inside or keep != sorted(set(keep)):
        raise ValueError(
            f"layers is {layers!r}; of {model.layers} layers give increasing numbers "
            f"from 0 to {model.layers - 1}, or every how many one stays"
        )
    if model.scan:
        small = dict(params)
        small["layers"] = jax.tree.map(lambda x: x[np.array(keep)], params["layers"])
    else:
        old = {f"layer_{i}" for i in range(model.layers)}
        small = {name: value for name, value in params.items() if name not in old}
        small |= {f"layer_{i}": params[f"layer_{old}"] for i, old in enumerate(keep)}
    settings: dict[str, Any] = {"layers": len(keep)}
    for name in ("heads", "kv_heads", "mlp_width", "sliding_window"):
        value = getattr(model, name, None)
        if isinstance(value, tuple | list):
            settings[name] = tuple(value[layer] for layer in keep)
    return model.clone(**settings), small


def fewer_neurons(
    model: Transformer,
    params: Params,
    moments: Mapping[str, Moments],
    *,
    sparsity: float,
) -> tuple[Transformer, Params]:
    """Return the looped model without the neurons of each MLP that matter least.

    Those that stay compensate those that leave (`remove_units`).

    Args:
      model: looped.
      params: dense.
      moments: of the inputs of every `down_proj/kernel`, from `collect_moments`.
      sparsity: fraction of the neurons of each layer to drop.

    Raises as `neuron_groups`, `score_units`, `choose_units`, `remove_units`.

    Example:
      >>> fewer = jc.models.fewer_neurons
      >>> student, small = fewer(model, params, moments, sparsity=0.5)
      >>> student.mlp_width
      32
    """
    groups = neuron_groups(model)
    scores = score_units(moments, groups, params=params)
    keep = choose_units(scores, sparsity)
    small = remove_units(params, groups, keep, moments)
    return resized(model, small), small


def fewer_channels(
    model: Transformer,
    params: Params,
    moments: Mapping[str, Moments],
    *,
    sparsity: float,
) -> tuple[Transformer, Params]:
    """Return the looped model without the channels of its width that carry least.

    A channel's score is the root mean square of what it sends to the projections that
    read it, after the norms. Norms have a mean over fewer channels, and their scales
    are multiplied by what compensates this where nothing was lost: the model computes
    the same if what leaves was zero.

    Args:
      model: looped.
      params: dense.
      moments: of the inputs of `q_proj`, `k_proj`, `v_proj`, `gate_proj` and `up_proj`.
      sparsity: fraction of the channels to drop.

    Raises as `score_units`, `choose_units`, `remove_units`.

    Source: Muralidharan et al. 2024, Minitron (arXiv 2407.14679, section 2.2).

    Example:
      >>> fewer = jc.models.fewer_channels
      >>> student, small = fewer(model, params, moments, sparsity=0.5)
      >>> student.width
      32
    """
    groups = {"width": channel_group(model)}
    scores = score_units(moments, groups, by="activation")
    keep = choose_units(scores, sparsity)
    small = remove_units(params, groups, keep)
    width = len(keep["width"])
    factor = math.sqrt(model.width / width)

    def rescaled(path: Any, x: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        mine = names[-1] == "scale" and names[-2] in (
            "attention_norm",
            "mlp_norm",
            "final_norm",
        )
        return (x * jnp.asarray(factor, jnp.float32)).astype(x.dtype) if mine else x

    small = jax.tree_util.tree_map_with_path(rescaled, small)
    return model.clone(width=width), small


def channel_group(model: Transformer) -> Group:
    """Return the channels of the model's width, which all its parts share, of a looped
    model.

    Args:
      model: looped.

    Raises:
      ValueError: the model is scanned.

    Example:
      >>> groups = {"width": jc.models.channel_group(model)}
      >>> small = jc.structured.remove_units(params, groups, {"width": np.arange(32)})
      >>> small["final_norm"]["scale"].shape
      (32,)
    """
    if model.scan:
        raise ValueError(
            "the channels of a scanned model have other axes; "
            "unstack_layers(params) and model.clone(scan=False) loop over the layers"
        )
    patterns = [
        (r"embed/embedding", -1),
        (r"layer_\d+/(attention|mlp)_norm/scale", 0),
        (r"layer_\d+/attention/[qkv]_proj/kernel", 0),
        (r"layer_\d+/attention/o_proj/(kernel|bias)", -1),
        (r"layer_\d+/mlp/(gate|up)_proj/kernel", 0),
        (r"layer_\d+/mlp/down_proj/(kernel|bias)", -1),
        (r"final_norm/scale", 0),
    ]
    if not model.tied:
        patterns.append((r"head/kernel", 0))
    return Group(tuple(patterns))

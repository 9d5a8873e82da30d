"""Parameters of looped models stacked for `scan`, and unstacked."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of the looped model as those of the scanned one (`scan=True`).

    Stacks every leaf along a new axis 0, compressed ones included. Raises ValueError
    where there is no `layer_0` or the layers differ in structure or shape.

    Args:
      params: of a looped model.

    Example:
      >>> stacked = jc.models.stack_layers(params)
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
    """Return parameters of the scanned model as those of the looped one (`scan=False`).

    Args:
      params: of a scanned model.

    Example:
      >>> same = jc.models.unstack_layers(jc.models.stack_layers(params))
    """
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

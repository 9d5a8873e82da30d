"""`layout`: which axes of each kernel a model contracts, found without computing."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcompress.tracing.interpreter import Use, trace_uses
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import is_leaf
from jaxcompress.tree.paths import roots
from jaxcompress.types import Params

NOT_INPUTS = ("mask", "labels", "targets")  # keys of a batch no Linen module is given


def find_layouts(model: Any, params: Params, batch: Any) -> dict[str, Layout]:
    """The `Layout` of every kernel and embedding that the model multiplies or reads.

    Traces the model abstractly: nothing is computed, and `params` and `batch` may hold
    `jax.ShapeDtypeStruct`. A weight that is changed first (normalized, scaled, sliced)
    is not found.

    Args:
      model: a Linen module, called as `model.apply({"params": params}, inputs)`; or any
        function of `(params, batch)`, for instance one that merges an NNX model.
      params: pytree of arrays and leaves; a leaf counts as the array it stands for.
      batch: what the function takes. For a Linen module an array, or a dict whose keys
        "mask", "labels" and "targets" are dropped; one remaining entry is passed by
        position, several by name.

    Returns:
      Layouts by leaf name, in the order in which the model uses the weights.

    Raises:
      ValueError: a weight used in two ways that no one layout describes.
      TypeError: a model or a batch of another kind.
    """
    function = model_function(model)
    found: dict[str, Layout] = {}

    def note(use: Use) -> dict[str, jax.Array]:
        found[use.name] = use.layout
        return {}

    weights, rebuild = flat_weights(params)
    matrices = [name for name, value in weights.items() if value.ndim > 1]

    def run(weights: Any, batch: Any) -> Any:
        call = lambda weights, batch: function(rebuild(weights), batch)  # noqa: E731
        return trace_uses(call, weights, batch, note, tagged=matrices)

    jax.eval_shape(run, weights, batch)
    return found


def flat_weights(params: Params) -> tuple[dict[str, Any], Callable[..., Params]]:
    """Shapes of the dense weights by name, and what puts weights back into the tree."""
    named = list(roots(params))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in named}
    treedef = jax.tree.structure(params, is_leaf=is_leaf)
    names = [name for name, _ in named]

    def rebuild(weights: Mapping[str, Any]) -> Params:
        return jax.tree.unflatten(treedef, [weights[name] for name in names])

    return shapes, rebuild


def model_function(model: Any) -> Callable[[Params, Any], Any]:
    """The function `(params, batch) -> anything` that runs a model."""
    if hasattr(model, "apply"):
        return lambda params, batch: _apply(model, params, batch)
    if not callable(model):
        raise TypeError(
            f"a model is a Linen module or a function of (params, batch), not a "
            f"{type(model).__name__}; wrap it in a function"
        )
    return model


def _apply(model: Any, params: Params, batch: Any) -> Any:
    variables = {"params": params}
    if not isinstance(batch, Mapping):
        if not hasattr(batch, "shape"):
            raise TypeError(
                f"a batch of a Linen module is an array or a dict of arrays, not a "
                f"{type(batch).__name__}; for other calls pass a function of "
                "(params, batch) as the model"
            )
        return model.apply(variables, batch)
    inputs = {key: x for key, x in batch.items() if key not in NOT_INPUTS}
    if not inputs:
        raise TypeError(
            f"the batch has only {sorted(batch)}, and none of these is given to a "
            "Linen module; add the inputs, or pass a function of (params, batch)"
        )
    if len(inputs) == 1:
        return model.apply(variables, *inputs.values())
    return model.apply(variables, **inputs)

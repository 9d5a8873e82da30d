"""Models of any kind as functions of `(params, batch)`."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcompress.tree.leaf import is_leaf
from jaxcompress.types import Params

# Keys of a batch that a module is given only if it has an argument of that name.
NOT_INPUTS = ("mask", "labels", "targets")


def model_function(
    model: Any, variables: Mapping[str, Any] | None = None
) -> Callable[[Params, Any], Any]:
    """Return the function `(params, batch) -> anything` that runs a model.

    Args:
      model: a Linen module or its `apply`, an NNX module, a Flax model of
        transformers, or such a function.
      variables: further collections of a Linen module, by name.
    """
    if inspect.isclass(model):
        raise TypeError(
            f"{model.__name__} is a class; pass a module made of it, as "
            f"{model.__name__}(...)"
        )
    if inspect.ismethod(model) and model.__name__ == "apply":
        model = model.__self__  # as a TrainState's `apply_fn`
    if is_nnx(model):
        return lambda params, batch: _call_nnx(model, params, batch)
    if hasattr(model, "apply"):
        return lambda params, batch: _apply(model, params, batch, variables or {})
    if not callable(model):
        raise TypeError(
            f"a model is a Linen or an NNX module, or a function of (params, batch), "
            f"not a {type(model).__name__}; wrap it in a function"
        )
    if hasattr(getattr(model, "module", None), "apply"):
        return lambda params, batch: _call_holder(model, params, batch)
    return model


def is_nnx(model: Any) -> bool:
    """Return whether a model is an NNX module; imports nothing."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def _call_nnx(model: Any, params: Params, batch: Any) -> Any:
    from jaxcompress.tracing.modules_nnx import with_params

    positional, named = _arguments(batch, type(model).__call__)
    return with_params(model, params)(*positional, **named)


def _call_holder(model: Any, params: Params, batch: Any) -> Any:
    """Call what holds a Linen module and takes `params=`, as transformers' models."""
    positional, named = _arguments(batch, type(model).__call__)
    return model(*positional, **named, params=params)


def _apply(model: Any, params: Params, batch: Any, variables: Mapping[str, Any]) -> Any:
    positional, named = _arguments(batch, type(model).__call__)
    try:
        return model.apply({**variables, "params": params}, *positional, **named)
    except Exception as error:
        reached = type(error).__name__ == "ScopeParamNotFoundError"
        reached = reached or "GetAttrKey" in str(error)
        if reached and any(map(is_leaf, jax.tree.leaves(params, is_leaf=is_leaf))):
            raise TypeError(
                f"{type(model).__name__} changes its parameters as a tree before its "
                "layers read them (nn.WeightNorm, nn.SpectralNorm, nn.map_variables), "
                f"and reaches the parts of a compressed leaf: {error}. Fold the norm "
                "into the kernel and leave the wrapper out, keep the kernels inside it "
                "by a rule (pattern, None), or apply materialize(small)"
            ) from error
        if type(error).__name__ == "ScopeCollectionNotFound":
            raise TypeError(
                f"{type(model).__name__} reads other collections than params: {error}. "
                "Pass them as variables={'batch_stats': ...}, or a function of "
                "(params, batch) as the model"
            ) from error
        raise


def _arguments(batch: Any, call: Any) -> tuple[tuple, dict[str, Any]]:
    """Return the positional and the named arguments of a module for a batch."""
    if not isinstance(batch, Mapping):
        if not hasattr(batch, "shape"):
            raise TypeError(
                f"a batch of a module is an array or a dict of arrays, not a "
                f"{type(batch).__name__}; for other calls pass a function of "
                "(params, batch) as the model"
            )
        return (batch,), {}
    taken = inspect.signature(call).parameters
    inputs = {k: x for k, x in batch.items() if k not in NOT_INPUTS or k in taken}
    if not inputs:
        raise TypeError(
            f"the batch has only {sorted(batch)}, and none of these is given to a "
            "module; add the inputs, or pass a function of (params, batch)"
        )
    if len(inputs) == 1:
        return tuple(inputs.values()), {}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if surplus := [] if open_ended else sorted(inputs.keys() - taken.keys()):
        raise TypeError(
            f"the batch has {', '.join(map(repr, surplus))}, which the module has no "
            f"argument for; it has {', '.join(list(taken)[1:])}. Leave them out of the "
            "batch, or pass a function of (params, batch) as the model"
        )
    return (), dict(inputs)

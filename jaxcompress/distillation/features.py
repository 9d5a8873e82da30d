"""Features of unmodified Linen models, by name.

Names are those of modules, `layer_0/mlp/up_proj`, meaning what they return, and of
what modules sow, `layer_0/attention/attention`. They are checked against the model
while it is traced: a name that is not there is an error, never an empty result.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax

from jaxcompress.tree.names import nearest
from jaxcompress.tree.paths import key_name
from jaxcompress.types import Params

_SOWN = "intermediates"
_CALL = "__call__"


def capture(model: nn.Module, names: Iterable[str]) -> Callable[..., Any]:
    """Return a function `(params, *args, **options) -> (output, {name: array})`.

    Runs `model.apply({"params": params}, *args, **options)` and returns what the
    names mean too; traceable, and the names are checked whenever it is traced. A module
    that is called again has its later outputs as `name[1]` and so on, one that returns
    several arrays as `name/0`, `name/1`. Layers under `nn.scan` give one array with the
    layers first, if the scan carries the collection "intermediates", as ours do.
    Attention maps are seen only where a module sows them
    (`Transformer(sow_intermediates=True)`); `relations` need none.

    Args:
      model: a Linen module.
      names: of `feature_names`.

    Raises:
      TypeError: not a Linen module.
      ValueError: no names; when called, a name that the model does not have: says the
        nearest.

    Example:
      >>> run = jc.distillation.capture(model, ["layer_0/mlp/up_proj"])
      >>> logits, features = run(params, tokens)
    """
    names = () if isinstance(names, str) else tuple(names)
    if not names:
        raise ValueError(
            "capture needs a list of names; feature_names(model, params, ...) lists "
            "those that there are"
        )

    def run(params: Params, *args: Any, **options: Any) -> Any:
        output, features = _run(model, params, args, options, names)
        missing = [name for name in names if name not in features]
        if missing:
            everything = feature_names(model, params, *args, **options)
            raise ValueError(
                f"the model gives nothing called {', '.join(missing)}; the nearest of "
                f"its {len(everything)} names are {nearest(missing[0], everything)}. "
                "Inside nn.scan, modules are seen only if variable_axes has "
                "'intermediates'"
            )
        return output, {name: features[name] for name in names}

    _check(model)
    return run


def feature_names(
    model: nn.Module, params: Params, *args: Any, **options: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """List shape and dtype of all that `capture` can give, by name; nothing is
    computed.

    Args:
      model: a Linen module.
      params: its parameters.
      args, options: of `model.apply`.

    Example:
      >>> "layer_0/mlp/up_proj" in jc.distillation.feature_names(model, params, tokens)
      True
    """
    _check(model)
    shapes = jax.eval_shape(
        lambda params, args: _run(model, params, args, options, None)[1], params, args
    )
    return dict(shapes)


def _run(
    model: nn.Module,
    params: Params,
    args: tuple,
    options: dict[str, Any],
    names: tuple[str, ...] | None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Return output, and features by name: all of them, or those of certain modules."""

    def wanted(module: nn.Module, method: str) -> bool:
        path = "/".join(module.path)
        below = names is None or any(name.startswith(path) for name in names)
        return method == _CALL and bool(path) and below

    output, state = model.apply(
        {"params": params},
        *args,
        **options,
        capture_intermediates=wanted,
        mutable=[_SOWN],
    )
    flat, _ = jax.tree_util.tree_flatten_with_path(state.get(_SOWN, {}))
    features = {}
    for path, value in flat:
        dicts = [
            i for i, key in enumerate(path) if isinstance(key, jax.tree_util.DictKey)
        ]
        depth = next((i for i, at in enumerate(dicts) if i != at), len(dicts))
        name = "/".join(key_name(k) for k in path[:depth] if key_name(k) != _CALL)
        rest = [key_name(key) for key in path[depth:]]
        if rest and rest[0] != "0":  # of several calls
            name += f"[{rest[0]}]"
        features["/".join([name, *rest[1:]])] = value
    return output, features


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"capture takes a Linen module, not a {type(model).__name__}; other models "
            "return what is to be aligned themselves"
        )

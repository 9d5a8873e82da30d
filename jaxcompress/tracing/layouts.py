"""`find_layouts`: which axes of each kernel a model contracts, without computing."""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing.interpreter import Use, trace_uses
from jaxcompress.tracing.modules import model_function
from jaxcompress.tracing.options import fix_options, with_options
from jaxcompress.tree.compress import NAMED
from jaxcompress.tree.containers import check_tree
from jaxcompress.tree.layouts import Layout, suggestion
from jaxcompress.tree.leaf import is_leaf, nbytes
from jaxcompress.tree.names import nearest
from jaxcompress.tree.paths import check_names, roots, shape_of
from jaxcompress.tree.selection import SMALLEST
from jaxcompress.types import Model, Params

Where = str | Callable[[str], bool] | None


def find_layouts(
    model: Model,
    params: Params,
    batch: Any,
    *,
    where: Where = None,
    variables: Mapping[str, Any] | None = None,
) -> dict[str, Layout]:
    """Return `Layout` of every kernel and embedding that the model multiplies or reads.

    Traces the model abstractly: nothing is computed, and `params` and `batch` may hold
    `jax.ShapeDtypeStruct`. Weights are followed through casts, slices, gathers,
    reversals, concatenations, arithmetic with constants, loops and `shard_map`.

        layouts = jc.find_layouts(model, params, batch)
        small = jc.compress(params, "symmetric(bits=4)", layouts=layouts)

    Args:
      model: a Linen module, called as `model.apply({"params": params}, inputs)`; an NNX
        module, called with the inputs; or any function of `(params, batch)`.
      params: pytree of arrays and leaves; a leaf counts as the array it represents.
      batch: what the function takes. For a module an array, or a dict of arguments: one
        is passed by position, several by name. The keys "mask", "labels" and "targets"
        are passed only where the module has arguments of these names. Booleans and
        strings are passed as they are.
      where: pattern that fully matches names, or a function of a name: which weights
        are wanted. None: all.
      variables: further collections of a Linen module, as `{"batch_stats": ...}`.

    Returns:
      Layouts by leaf name, in the order in which the model uses the weights.

    Warns of a weight used in two ways that no one layout describes (the first counts),
    and of large arrays of two axes or more that are not seen in a product, with the
    `Layout` to write.

    Raises:
      TypeError: a model or a batch of another kind.
      ValueError: `where` matches no array of two axes or more.

    Example:
      >>> layouts = jc.find_layouts(model, params, batches[0])
      >>> layouts["layer_0/mlp/down_proj/kernel"].inputs
      (0,)
    """
    function = with_options(model_function(model, variables))
    batch = fix_options(batch)
    layouts: dict[str, Layout] = {}

    def note(use: Use) -> dict[str, jax.Array]:
        layouts[use.name] = use.layout
        return {}

    weights, rebuild = flat_weights(params)
    matrices = [name for name, value in weights.items() if value.ndim > 1]
    if where is not None:
        matrices = matching(matrices, where)

    def run(weights: Any, batch: Any) -> Any:
        call = lambda weights, batch: function(rebuild(weights), batch)  # noqa: E731
        return trace_uses(call, weights, batch, note, tagged=matrices)

    jax.eval_shape(run, weights, batch)
    warn_unseen({n: weights[n] for n in matrices if n not in layouts}, weights)
    return layouts


def matching(names: list[str], where: Where) -> list[str]:
    """Return the names that a pattern fully matches, or for which a function is true.

    Raises ValueError where there are none.
    """
    if callable(where):
        chosen = [name for name in names if where(name)]
    else:
        chosen = [name for name in names if re.fullmatch(where, name)]
    if not chosen:
        pattern = where if isinstance(where, str) else "kernel"
        raise ValueError(
            f"no weight is selected by where={where!r}; the nearest of the "
            f"{len(names)} arrays of two axes or more are {nearest(pattern, names)}"
        )
    return chosen


def warn_unseen(unseen: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Warn of large arrays that the trace did not see in a product."""
    large = {
        name: x
        for name, x in unseen.items()
        if x.size >= SMALLEST and jnp.issubdtype(x.dtype, jnp.inexact)
    }
    share = nbytes(large) / max(1, nbytes(weights))
    if share < NAMED:
        return
    name, first = max(large.items(), key=lambda item: item[1].size)
    warnings.warn(
        f"{share:.0%} of the bytes are in arrays that the trace does not see in a "
        f"product or a lookup: {', '.join(list(large)[:5])}"
        f"{', ...' if len(large) > 5 else ''}. If one is a weight, add its layout by "
        f"hand, as {suggestion(name, first.shape)}",
        stacklevel=3,
    )


def flat_weights(params: Params) -> tuple[dict[str, Any], Callable[..., Params]]:
    """Return shapes of the dense weights by name, and what puts weights back into the
    tree.
    """
    check_tree(params)
    named = list(roots(params))
    check_names([name for name, _ in named])
    shapes = {name: shape_of(x) for name, x in named}
    treedef = jax.tree.structure(params, is_leaf=is_leaf)
    names = [name for name, _ in named]

    def rebuild(weights: Mapping[str, Any]) -> Params:
        return jax.tree.unflatten(treedef, [weights[name] for name in names])

    return shapes, rebuild

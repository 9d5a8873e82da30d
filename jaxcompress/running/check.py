"""`check`: whether a model takes a compressed tree, found without computing."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax

from jaxcompress.tracing.modules import model_function
from jaxcompress.tree.leaf import is_leaf, materialize
from jaxcompress.tree.paths import leaf_names
from jaxcompress.types import Params


def check(
    model: Any,
    small: Params,
    batch: Any,
    *,
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Apply a model abstractly to a compressed tree, and name a leaf that fails.

    Nothing is computed. Warns where the tree has no compressed leaf any more: an
    operation such as `flax.linen.unbox` made all of them dense.

        jc.check(model, jc.compress(params, "symmetric(bits=4)"), tokens)

    Args:
      model: as for `find_layouts`.
      small: pytree of arrays and leaves.
      batch, variables: as for `find_layouts`.

    Raises:
      ValueError: the model takes the dense tree but not this one; names the leaf that
        it cannot take by itself, or says that only several together fail.
      Exception: whatever the model raises of the dense tree too.

    Example:
      >>> jc.check(model, jc.compress(params, "symmetric(bits=4)"), tokens)
    """
    function = model_function(model, variables)
    leaves, treedef = jax.tree.flatten(small, is_leaf=is_leaf)
    if not any(map(is_leaf, leaves)):
        warnings.warn(
            "the tree has no compressed leaf; pass what compress returns, and remove "
            "Flax's boxes by jc.tree.unbox, which keeps leaves",
            stacklevel=2,
        )
    try:
        jax.eval_shape(function, small, batch)
        return
    except Exception as error:
        failure = error
    dense = jax.eval_shape(materialize, small)
    jax.eval_shape(function, dense, batch)  # if this fails, it is not the leaves
    arrays = jax.tree.leaves(dense)
    names = leaf_names(dense)
    for number, leaf in enumerate(leaves):
        if not is_leaf(leaf):
            continue
        one = [*arrays[:number], leaf, *arrays[number + 1 :]]
        try:
            jax.eval_shape(function, jax.tree.unflatten(treedef, one), batch)
        except Exception as error:
            raise ValueError(
                f"{names[number]}: the model cannot take a {type(leaf).__name__} "
                f"there: {error}. Keep this leaf with a rule (pattern, None), or pass "
                "materialize(small)"
            ) from error
    raise ValueError(
        f"the model cannot take these leaves together: {failure}"
    ) from failure

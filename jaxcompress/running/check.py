"""`check`: whether a model takes a compressed tree, found without computing."""

import warnings
from collections.abc import Mapping
from typing import Any

from jaxcompress.tracing.modules import model_function
from jaxcompress.tracing.options import fix_options, with_options
from jaxcompress.tracing.refusal import find_refusal
from jaxcompress.tree.compress import is_compressed
from jaxcompress.tree.containers import check_tree
from jaxcompress.types import Model, Params


def check(
    model: Model,
    small: Params,
    batch: Any,
    *,
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Apply a model abstractly to a compressed tree, and name a leaf that fails.

    Nothing is computed. A model that changes the parts of a leaf (`nn.map_variables`)
    is found too, even where it would run, with other weights. Warns where the tree has
    no compressed leaf any more: an operation such as `flax.linen.unbox` made all of
    them dense.

        jc.check(model, jc.compress(params, "symmetric(bits=4)"), tokens)

    Args:
      model: as for `find_layouts`.
      small: pytree of arrays and leaves.
      batch, variables: as for `find_layouts`.

    Raises:
      ValueError: the model takes the dense tree but not this one; names the leaf that
        it cannot take by itself, or says that only several together fail.
      TypeError: a state of training.
      Exception: whatever the model raises of the dense tree too.

    Example:
      >>> jc.check(model, jc.compress(params, "symmetric(bits=4)"), tokens)
    """
    function = with_options(model_function(model, variables))
    check_tree(small)
    if not is_compressed(small):
        warnings.warn(
            "the tree has no compressed leaf; pass what compress returns, and remove "
            "Flax's boxes by jc.tree.unbox, which keeps leaves",
            stacklevel=2,
        )
    if refusal := find_refusal(function, small, fix_options(batch)):
        raise ValueError(refusal)

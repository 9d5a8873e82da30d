"""Parts of a batch that are no arrays: flags and names that a model branches on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Option:
    """A Python value in a batch, fixed while a model is traced."""

    value: Any


def fix_options(batch: Any) -> Any:
    """Return the batch with booleans, strings and other objects fixed.

    Traced, `train=False` would be an array, on which no model can branch.
    """

    def fixed(x: Any) -> Any:
        flag = isinstance(x, bool | np.bool_)
        array = hasattr(x, "dtype") or isinstance(x, int | float | complex)
        return Option(x) if flag or not array else x

    return jax.tree.map(fixed, batch)


def with_options(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the function of `(params, batch)` that takes batches with fixed parts."""

    def is_option(x: Any) -> bool:
        return isinstance(x, Option)

    def call(params: Any, batch: Any) -> Any:
        free = lambda x: x.value if is_option(x) else x  # noqa: E731
        return function(params, jax.tree.map(free, batch, is_leaf=is_option))

    return call

"""Names of the types that appear in signatures; no logic.

Axis legend, used in every docstring: `...` stack axes (layers of a scanned model),
`inputs` and `outputs` of a kernel, `rows` and `features` of an embedding, `blocks` of
consecutive inputs that share a scale, `batch`, `tokens`, `vocabulary`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Any  # a pytree of arrays and leaves: nested dicts, as Flax makes them
Masks = Any  # a pytree like Params: boolean arrays, None where a leaf stays dense
Batch = Mapping[str, Any]  # arrays whose first axis is the batch; optional "mask"
Method = Callable[..., Any]  # f(x, moments=None, *, options) -> leaf
Rule = tuple[str, "Method | str | None"]  # full-match pattern on the name, method
Recipe = Any  # a method, its string, a list of rules, or a chain: what `compress` takes


@runtime_checkable
class LazyParams(Protocol):
    """Parameters that are read leaf by leaf, as they are asked for.

    An open checkpoint (`open_checkpoint`) is one, and what `models` reads of files of
    other programs. `tree` has the name of a leaf in the place of each.
    """

    @property
    def tree(self) -> Params: ...

    def __getitem__(self, name: str) -> Any:
        """Return the leaf of this name."""
        ...

    def describe(self, name: str) -> tuple[str, tuple[int, ...], str]:
        """Type, dense shape and dense dtype of a leaf, without reading it."""
        ...

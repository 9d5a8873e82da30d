"""Names of the types that appear in signatures; no logic.

Axis legend, used in every docstring: `...` stack axes (layers of a scanned model),
`inputs` and `outputs` of a kernel, `rows` and `features` of an embedding, `blocks` of
consecutive inputs that share a scale, `batch`, `tokens`, `vocabulary`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

import jax
import numpy as np

Options = ParamSpec("Options")
Result = TypeVar("Result", covariant=True)
Array = jax.Array | np.ndarray
DType = jax.typing.DTypeLike  # a dtype, its name, or a scalar type
Params = Any  # a pytree of arrays and leaves: nested dicts, as Flax makes them
Masks = Any  # a pytree like Params: boolean arrays, None where a leaf stays dense
Batch = Mapping[str, Any]  # arrays whose first axis is the batch; optional "mask"
Method = Callable[..., Any]  # f(x, moments=None, *, options) -> leaf
Rule = tuple[str, "Method | str | None"]  # full-match pattern on the name, method
Recipe = Any  # a method, its string, a list of rules, or a chain: what `compress` takes


class RegisteredMethod(Protocol[Options, Result]):
    """Methods of `jc.method`: of an array the leaf; without one, a method to put in a
    recipe, with these options set.
    """

    __name__: str

    @overload
    def __call__(self, *args: Options.args, **options: Options.kwargs) -> Result: ...

    @overload
    def __call__(self, **options: Any) -> Method: ...


class LinenModel(Protocol):
    """Modules that are given their variables at each call, as those of Flax Linen."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


# What `model=` takes: a Linen module; an NNX module or a model of transformers, which
# are called; a function of `(params, batch)`.
Model = LinenModel | Callable[..., Any]


# What `progress=` takes: True for a bar, False for none, or a wrapper of an iterable.
Progress = bool | Callable[[Any], Iterable[Any]]


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

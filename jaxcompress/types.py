"""Names of the types that appear in signatures; no logic.

Axis legend, used in every docstring: `...` stack axes (layers of a scanned model),
`inputs` and `outputs` of a kernel, `rows` and `features` of an embedding, `blocks` of
consecutive inputs that share a scale, `batch`, `tokens`, `vocabulary`.
"""

from collections.abc import Callable, Mapping
from typing import Any

Params = Any  # a pytree of arrays and leaves: nested dicts, as Flax makes them
Masks = Any  # a pytree like Params: boolean arrays, None where a leaf stays dense
Batch = Mapping[str, Any]  # arrays whose first axis is the batch; optional "mask"
Method = Callable[..., Any]  # f(x, moments=None, *, options) -> leaf
Rule = tuple[str, "Method | str | None"]  # full-match pattern on the name, method
Recipe = Any  # a method, its string, a list of rules, or a chain: what `compress` takes

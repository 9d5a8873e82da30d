"""Running an unmodified NNX model on compressed parameters.

Import it as `from jaxcompress.running import nnx`; the package itself does not, so that
only those who use NNX pay for it.
"""

import difflib
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict

from jaxcompress.tree.leaf import Leaf, dense
from jaxcompress.tree.paths import roots
from jaxcompress.types import Params


class CompressedParam(nnx.Param):
    """A `Param` that stores a leaf and gives the layers its dense array.

    `nnx.state`, `split`, `merge` and `nnx.jit` carry the stored arrays;
    `nnx.to_pure_dict` and `param[...]` give dense ones: read the stored ones with
    `params_of`.
    """

    def get_value(self, *, index: Any = ...) -> jax.Array:
        value = dense(stored(self))
        return value if index is ... else value[index]


if not hasattr(nnx.Param, "get_value"):  # flax 0.11 reads the property
    CompressedParam.value = property(CompressedParam.get_value, nnx.Param.value.fset)


def stored(variable: nnx.Variable) -> Any:
    """What an NNX variable really holds: a leaf, an array, or its abstract shape."""
    if hasattr(variable, "get_raw_value"):
        return variable.get_raw_value()
    return variable.raw_value


def params_of(module: nnx.Module) -> Params:
    """The `Param`s of a module as nested dicts of stored values: what `compress` takes.

    Keys are strings, list indices too. A parameter that several layers share appears
    once, under one of its paths.
    """
    return unflatten_dict(
        {path: stored(variable) for path, variable in _variables(module).items()}
    )


def with_params(module: nnx.Module, params: Params) -> nnx.Module:
    """A copy of the module that runs on these parameters, compressed or not.

    The module itself is untouched, and may be abstract (`nnx.eval_shape`). Variables
    that are not `Param`s (batch statistics, random streams) are copied.

    Args:
      module: an NNX module.
      params: nested dicts as `params_of` makes them, each array or leaf in the shape
        its parameter has.

    Raises:
      ValueError: a parameter is missing, surplus or of another shape; names it.
    """
    copy = nnx.clone(module)
    given = dict(roots(params))
    variables = {"/".join(path): v for path, v in _variables(copy).items()}
    for name in sorted(given.keys() ^ variables.keys()):
        where, other = ("module", variables) if name in given else ("tree", given)
        near = difflib.get_close_matches(name, other, n=3, cutoff=0.0)
        raise ValueError(
            f"{name}: the {where} has no such parameter; nearest: {', '.join(near)}. "
            "Start from params_of(module)"
        )
    new: dict[int, nnx.Variable] = {}
    for name, variable in variables.items():
        value, shape = given[name], tuple(stored(variable).shape)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name}: shape {tuple(value.shape)}, the module wants {shape}"
            )
        new[id(variable)] = _holding(variable, value)
    for _, node in list(nnx.iter_graph(copy)):
        _replace(node, new)
    for path, variable in _variables(copy).items():
        if id(variable) in new:
            raise ValueError(
                f"{'/'.join(path)}: its container can't be written to; hold parameters "
                "in modules, lists or dicts"
            )
    return copy


def _variables(module: nnx.Module) -> dict[tuple[str, ...], nnx.Variable]:
    """Every `Param` once, by its path."""
    found: dict[int, tuple[tuple[str, ...], nnx.Variable]] = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            found.setdefault(id(node), (tuple(map(str, path)), node))
    return dict(found.values())


def _holding(variable: nnx.Variable, value: Any) -> nnx.Variable:
    """A variable like this one that stores `value`."""
    if not isinstance(value, Leaf):
        return variable.replace(value)
    return CompressedParam.from_metadata(value, dict(variable.get_metadata()))


def _replace(node: Any, new: dict[int, nnx.Variable]) -> None:
    """Puts the new variables where a module, list or dict holds the old ones."""
    if isinstance(node, nnx.Variable):
        return
    if isinstance(node, dict):
        items, put = node.items(), node.__setitem__
    elif isinstance(node, list):
        items, put = enumerate(node), node.__setitem__
    else:
        items, put = getattr(node, "__dict__", {}).items(), node.__setattr__
    for key, value in list(items):
        if id(value) in new:
            put(key, new[id(value)])

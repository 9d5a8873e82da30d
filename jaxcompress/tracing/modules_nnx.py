"""Parameters of NNX modules as trees, and modules that run on such trees."""

import contextlib
import dataclasses
import functools
import warnings
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from jaxcompress.tree.leaf import Leaf, nbytes, unboxed
from jaxcompress.tree.names import nearest
from jaxcompress.tree.paths import roots
from jaxcompress.types import Params

LARGE = 4096  # weights in an array that deserves a warning


class _Compressed:
    """Mixed into a type of variables, which then store leaves and give dense arrays."""

    def get_value(self, *, index: Any = ...) -> jax.Array:
        value = stored(self)
        if not all(
            isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(value)
        ):
            return value  # a description of the module, as it is printed
        value = unboxed(value)
        return value if index is ... else value[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if index is not ...:
            raise TypeError(
                f"a compressed {type(self).__name__} cannot be set in part; set all of "
                "it by variable[...] = x, which makes it dense, or change the arrays "
                "of params_of(module) and use with_params"
            )
        store(self, value)


if not hasattr(nnx.Param, "get_value"):  # flax 0.11 reads the property
    _Compressed.value = property(_Compressed.get_value, nnx.Param.value.fset)


class CompressedParam(_Compressed, nnx.Param):
    """A `Param` that stores a leaf and gives the layers its dense array.

    A variable of another type is stored in a subclass of both its type and
    this mechanism, so that `nnx.state(module, LoRAParam)` selects it as before.

    `nnx.state`, `split`, `merge` and `nnx.jit` carry the stored arrays;
    `nnx.to_pure_dict` and `param[...]` give dense ones: read the stored ones with
    `params_of`.
    """


@functools.cache
def _compressed_type(cls: type[nnx.Variable]) -> type[nnx.Variable]:
    """Return the type that stores leaves for variables of a type."""
    if issubclass(cls, _Compressed):
        return cls
    if cls is nnx.Param:
        return CompressedParam
    bases = (CompressedParam, cls) if issubclass(cls, nnx.Param) else (_Compressed, cls)
    return type(f"Compressed{cls.__name__}", bases, {"__doc__": cls.__doc__})


def stored(variable: nnx.Variable) -> Any:
    """Return what an NNX variable really holds: a leaf, an array, or its abstract
    shape.
    """
    if hasattr(variable, "get_raw_value"):
        return variable.get_raw_value()
    return variable.raw_value


def store(variable: Any, value: Any) -> None:
    """Let an NNX variable hold a leaf or an array, without its hooks."""
    if hasattr(variable, "set_raw_value"):
        variable.set_raw_value(value)
    else:
        variable.raw_value = value


def params_of(module: nnx.Module, of: Any = nnx.Param) -> Params:
    """Return the `Param`s of a module as nested dicts of stored values: what `compress`
    takes.

    Keys are strings, list indices too. A parameter that several layers share appears
    once, under one of its paths.

    Args:
      module: an NNX module.
      of: the type of the variables, or a tuple of types.

    Warns where large arrays are in variables of other types, which stay dense.
    """
    others = _variables(module, nnx.Variable)
    own = _variables(module, of)
    large = {
        "/".join(path): x
        for path, variable in others.items()
        if path not in own and _is_large(x := stored(variable))
    }
    if large and of is nnx.Param:
        warnings.warn(
            f"{', '.join(large)}: {nbytes(large)} bytes in variables that are no "
            "nnx.Param, and are left out; pass of=(nnx.Param, their type) to "
            "params_of",
            stacklevel=2,
        )
    return unflatten_dict({path: stored(variable) for path, variable in own.items()})


def _is_large(x: Any) -> bool:
    floating = hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, np.floating)
    return floating and len(x.shape) > 1 and x.size >= LARGE


def with_params(module: nnx.Module, params: Params) -> nnx.Module:
    """Return a copy of the module that runs on these parameters, compressed or not.

    The module itself is untouched, and may be abstract (`nnx.eval_shape`). Variables
    that are not `Param`s (batch statistics, random streams) are copied.

    Args:
      module: an NNX module.
      params: nested dicts as `params_of` makes them, each array or leaf in the shape
        its parameter has.

    Warns where the module is abstract and other variables than `Param`s stay shapes.

    Raises:
      ValueError: a parameter is missing, surplus or of another shape; names it.
    """
    copy = nnx.clone(module)
    values = dict(roots(params))
    variables = {"/".join(path): v for path, v in _variables(copy, nnx.Param).items()}
    others = {"/".join(p): v for p, v in _variables(copy, nnx.Variable).items()}
    variables |= {name: others[name] for name in values if name in others}
    for name in sorted(values.keys() ^ variables.keys()):
        where, other = ("module", variables) if name in values else ("tree", values)
        raise ValueError(
            f"{name}: the {where} has no such parameter; nearest: "
            f"{nearest(name, other)}. Start from params_of(module)"
        )
    linen = _inside_linen(copy)
    new: dict[int, nnx.Variable] = {}
    for name, variable in variables.items():
        value, shape = values[name], tuple(stored(variable).shape)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name}: shape {tuple(value.shape)}, the module wants {shape}"
            )
        new[id(variable)] = _holding(variable, value, name in linen)
    for _, node in list(nnx.iter_graph(copy)):
        _replace(node, new)
    empty = []
    for path, variable in _variables(copy, nnx.Variable).items():
        if isinstance(stored(variable), jax.ShapeDtypeStruct):
            empty += [] if isinstance(variable, nnx.RngState) else ["/".join(path)]
        if id(variable) in new:
            raise ValueError(
                f"{'/'.join(path)}: its container can't be written to; hold parameters "
                "in modules, lists or dicts"
            )
    if empty:
        warnings.warn(
            f"{', '.join(empty[:5])}: shapes without values, and the tree has none for "
            "them; take them along by params_of(module, nnx.Variable), or pass a "
            "module with values",
            stacklevel=2,
        )
    return copy


def _variables(module: nnx.Module, of: Any) -> dict[tuple[str, ...], nnx.Variable]:
    """Return every variable of these types once, by its path."""
    by_id: dict[int, tuple[tuple[str, ...], nnx.Variable]] = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, of):
            by_id.setdefault(id(node), (tuple(map(str, path)), node))
    return dict(by_id.values())


def _inside_linen(module: nnx.Module) -> set[str]:
    """Return names of the parameters of Linen modules that `nnx.bridge.ToNNX` wraps."""
    paths = [
        tuple(map(str, path))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.bridge.ToNNX)
    ]
    names = _variables(module, nnx.Param)
    return {"/".join(n) for n in names for path in paths if n[: len(path)] == path}


def _holding(variable: nnx.Variable, value: Any, linen: bool) -> nnx.Variable:
    """Return a variable like this one that stores `value`; Linen modules unbox it."""
    if linen or not isinstance(value, Leaf):
        return variable.replace(value)
    cls = _compressed_type(type(variable))
    return cls.from_metadata(value, dict(variable.get_metadata()))


def _replace(node: Any, new: dict[int, nnx.Variable]) -> None:
    """Put the new variables where a module, list or dict holds the old ones."""
    if isinstance(node, nnx.Variable):
        return
    if isinstance(node, dict):
        items, put = node.items(), node.__setitem__
    elif isinstance(node, list):
        items, put = enumerate(node), node.__setitem__
    else:
        items, put = getattr(node, "__dict__", {}).items(), node.__setattr__
    for key, value in list(items):
        changed = _replaced(value, new)
        if changed is not value:
            # What stays as it was in a frozen container is named by `with_params`.
            with contextlib.suppress(dataclasses.FrozenInstanceError):
                put(key, changed)


def _replaced(value: Any, new: dict[int, nnx.Variable]) -> Any:
    """Return the new variable for an old one; of a tuple, a tuple of these."""
    if id(value) in new:
        return new[id(value)]
    if not isinstance(value, tuple):
        return value
    items = [_replaced(item, new) for item in value]
    if all(a is b for a, b in zip(items, value, strict=True)):
        return value
    changed = type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return nnx.data(changed) if hasattr(nnx, "data") else changed

"""A tree of arrays and leaves as JSON; the arrays themselves are kept elsewhere.

A node of the JSON is `null` (None), or an object of one of these forms:

    {"dict": [[key, node], ...]}    {"list": [node, ...]}    {"tuple": [node, ...]}
    {"array": dtype, "shape": [size, ...]}
    {"leaf": type, "fields": {field: node}, "static": {field: value}}
    {"leaf": type, "stored": {name: node}, "static": {field: value}}
    {"box": type, "names": [name | null | [name, ...], ...], "value": node}
    {"same": name}

A leaf also tells the `"dense"` dtype and shape of what it represents. The last form is
that of a leaf type with `stored() -> dict` and a class method `restored(arrays,
static) -> leaf`, which keeps arrays in files that are shorter than its fields. A box
is Flax's own metadata around a parameter: the names of its axes for sharding. `same`
means the array or leaf that an earlier name of the tree has, stored once. An
array is called by its path, joined by "/"; a box adds no step to it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress.storage import static_json
from jaxcompress.storage.static_json import DTYPES
from jaxcompress.tree import boxes
from jaxcompress.tree.containers import check_tree
from jaxcompress.tree.leaf import (
    Leaf,
    data_fields,
    is_box,
    is_variable,
    leaf_type,
    static_fields,
)
from jaxcompress.types import Params

_LARGEST = 2**63  # elements; no file holds more

Path = tuple[str, ...]


# What a leaf type may raise of fields that it does not understand.
ODD = ArithmeticError, AttributeError, LookupError, TypeError, ValueError


class FileDamaged(ValueError):
    """A file is not what was written: altered, cut short, or inconsistent.

    Example:
      >>> issubclass(jc.FileDamaged, ValueError)
      True
    """


@dataclasses.dataclass(frozen=True)
class Slot:
    """One array of a tree: its dtype's name, its shape, and how to get it."""

    dtype: str
    shape: tuple[int, ...]
    fetch: Callable[[], Any]


def encode(params: Params, *, compact: bool) -> tuple[Any, dict[str, Slot]]:
    """Return the tree as a JSON node, and its arrays by name; holds no copies.

    Containers are dicts (of other mappings, `FrozenDict` is told apart elsewhere),
    lists, tuples and None. Keys of a dict are strings or integers; their order is not
    kept.

    Args:
      params: the tree.
      compact: keep what `stored()` gives of a leaf type that has it, not its fields.

    Raises:
      TypeError: the tree holds something else, or a static field that is not what its
        leaf type declares; names it.
    """
    check_tree(params)
    slots: dict[str, Slot] = {}
    first: dict[int, str] = {}  # the name under which each object was met
    latest: list[Any] = [None, None]  # a leaf and what it stored: made once in a row

    def stored(x: Leaf) -> dict[str, Any]:
        if latest[0] is not x:
            latest[:] = x, x.stored()
        return latest[1]

    def array(x: Any, path: Path, fetch: Callable[[], Any]) -> Any:
        name = join(path)
        _check_array(name, x)
        shape = tuple(int(size) for size in x.shape)
        slots[name] = Slot(x.dtype.name, shape, fetch)
        return {"array": x.dtype.name, "shape": list(shape)}

    def leaf(x: Leaf, path: Path) -> Any:
        cls = _registered(x, path)
        if not cls.for_files:
            raise TypeError(
                f"{join(path)} is of type {cls.__name__}, which is made for running "
                "and has no place in files; save the tree that it was made of"
            )
        static = {}
        for field in dataclasses.fields(cls):
            if field.metadata.get("static"):
                value = getattr(x, field.name)
                static_json.check_static(join((*path, field.name)), field, value)
                static[field.name] = static_json.to_json(value)
        node = {"leaf": cls.__name__, **_dense(x), "static": static}
        if compact and hasattr(cls, "stored"):
            node["stored"] = {
                key: array(value, (*path, key), lambda key=key: stored(x)[key])
                for key, value in sorted(stored(x).items())
            }
        else:
            node["fields"] = {
                key: walk(getattr(x, key), (*path, key), within=True)
                for key in data_fields(cls)
            }
        return node

    def walk(x: Any, path: Path, *, within: bool = False) -> Any:
        """Return node of a subtree; `within` a leaf, nothing is shared with others."""
        below = functools.partial(walk, within=within)
        if x is None:
            return None
        if is_variable(x):  # of an nnx.State: it adds nothing to names
            return walk(
                x.get_raw_value() if hasattr(x, "get_raw_value") else x.raw_value, path
            )
        if isinstance(x, Mapping):
            keys = _sorted_keys(x, path)
            return {"dict": [[key, below(x[key], (*path, str(key)))] for key in keys]}
        if type(x) in (list, tuple):
            items = [below(child, (*path, str(i))) for i, child in enumerate(x)]
            return {type(x).__name__: items}
        if is_box(x):
            name, axes = boxes.describe(x, join(path))
            value = walk(x.value, path, within=True)
            return {"box": name, "names": axes, "value": value}
        if not within and first.setdefault(id(x), join(path)) != join(path):
            return {"same": first[id(x)]}
        return leaf(x, path) if isinstance(x, Leaf) else array(x, path, lambda: x)

    return walk(params, ()), slots


def decode(
    node: Any,
    read: Callable[[str, str, tuple[int, ...]], Any],
    path: Path = (),
    earlier: dict[str, Any] | None = None,
) -> Any:
    """Return the tree of a JSON node; `read(name, dtype, shape)` gives its arrays.

    `earlier` holds the leaves of earlier names, for nodes of the form `same`.

    Raises:
      FileDamaged: the node is not of a known form, or contradicts its leaf type.
      KeyError: the leaf type is not registered; names the known ones.
    """
    earlier = {} if earlier is None else earlier
    kind, children = inside(node, path)
    if kind == "array":
        earlier[join(path)] = read(join(path), node["array"], tuple(node["shape"]))
        return earlier[join(path)]
    if kind == "same":
        if node["same"] not in earlier:
            raise _wrong(path, f"the same as {node['same']!r}, which is not earlier")
        return earlier[node["same"]]
    if kind == "box":
        value = decode(node["value"], read, path, earlier)
        return boxes.make(node["box"], node["names"], value)
    below = [
        (key, decode(child, read, (*path, str(key)), earlier))
        for key, child in children
    ]
    if kind == "none":
        return None
    if kind == "dict":
        return dict(below)
    if kind in ("list", "tuple"):
        values = [value for _, value in below]
        return values if kind == "list" else tuple(values)
    cls = leaf_type(node["leaf"])
    static = _static_of(cls, node, path)
    if kind == "stored" and not hasattr(cls, "restored"):
        raise _wrong(path, f"{cls.__name__} has no restored()")
    if kind == "fields" and {key for key, _ in below} != set(data_fields(cls)):
        have, want = sorted(key for key, _ in below), sorted(data_fields(cls))
        raise _wrong(path, f"the fields {have}, a {cls.__name__} has {want}")
    try:
        if kind == "stored":
            leaf = cls.restored(dict(below), static)
        else:
            leaf = cls(**dict(below), **static)
        dense = _dense(leaf).get("dense")
    except ODD as error:
        raise _wrong(path, f"{cls.__name__}: {error}") from error
    if node.get("dense", dense) != dense:
        raise _wrong(path, f"it represents {dense}, not {node['dense']}")
    earlier[join(path)] = leaf
    return leaf


def inside(node: Any, path: Path) -> tuple[str, list[tuple[Any, Any]]]:
    """Return the kind of a node, checked, and its named children."""
    if node is None:
        return "none", []
    match node:
        case {"array": str(dtype), "shape": list(shape)} if len(node) == 2:
            sizes = all(type(n) is int and 0 <= n < _LARGEST for n in shape)
            if dtype in DTYPES and sizes:
                return "array", []
        case {"dict": list(items)} if len(node) == 1:
            pairs = all(type(i) is list and len(i) == 2 for i in items)
            plain = pairs and all(type(key) in (str, int) for key, _ in items)
            if plain and len({str(key) for key, _ in items}) == len(items):
                return "dict", [(key, child) for key, child in items]
        case {"list": list(items)} | {"tuple": list(items)} if len(node) == 1:
            return next(iter(node)), list(enumerate(items))
        case {"same": str()} if len(node) == 1:
            return "same", []
        case {"box": str(name), "names": list(), "value": dict(value)}:
            if len(node) == 3 and name in boxes.TYPES and "box" not in value:
                return "box", []
        case {"leaf": str(), "static": dict()}:
            kind = "stored" if "stored" in node else "fields"
            rest = node.keys() - {"leaf", "static", kind, "dense"}
            dense = node.get("dense", ["", []])
            if not rest and type(node.get(kind)) is dict and _is_dense(dense):
                return kind, list(node[kind].items())
    raise _wrong(path, f"not a node: {str(node)[:80]}")


def _is_dense(value: Any) -> bool:
    match value:
        case [str(), list(shape)]:
            return all(type(n) is int for n in shape)
    return False


def arrays(node: Any, path: Path = ()) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every array of a JSON node, checked."""
    kind, children = inside(node, path)
    if kind == "array":
        yield join(path), node["array"], tuple(node["shape"])
    if kind == "box":
        yield from arrays(node["value"], path)
    for key, child in children:
        yield from arrays(child, (*path, str(key)))


def outline(node: Any) -> tuple[Any, dict[str, tuple[Any, Path]]]:
    """Return the tree with the names of outermost leaves and arrays in their places.

    Also, by name, the node and the path of each.
    """
    nodes: dict[str, tuple[Any, Path]] = {}

    def walk(node: Any, path: Path) -> Any:
        kind, children = inside(node, path)
        if kind == "none":
            return None
        if kind not in ("dict", "list", "tuple"):
            if kind == "same" and node["same"] not in nodes:
                raise _wrong(path, f"the same as {node['same']!r}, which is later")
            nodes[join(path)] = node, path
            return join(path)
        below = [(key, walk(child, (*path, str(key)))) for key, child in children]
        if kind == "dict":
            return dict(below)
        values = [value for _, value in below]
        return values if kind == "list" else tuple(values)

    return walk(node, ()), nodes


def join(path: Path) -> str:
    """Return name of a path; "/" and "~" in a step are written ~1 and ~0 (RFC 6901)."""
    return "/".join(step.replace("~", "~0").replace("/", "~1") for step in path)


def _wrong(path: Path, why: str) -> FileDamaged:
    return FileDamaged(f"{join(path) or 'the tree'}: {why}")


def _sorted_keys(x: Any, path: Path) -> list[Any]:
    keys = list(x)
    odd = [key for key in keys if type(key) not in (str, int)]
    if odd or len({type(key) for key in keys}) > 1:
        raise TypeError(
            f"{join(path) or 'the tree'}: keys {keys[:5]} of a dict; files keep dicts "
            "whose keys are all strings, or all integers"
        )
    return sorted(keys)


def _check_array(name: str, x: Any) -> None:
    where = name or "the tree"
    if type(x) in (bool, int, float, complex, str):
        raise TypeError(
            f"{where} is the Python {type(x).__name__} {x!r}; store it as an array, "
            "jnp.asarray(x), or in the metadata"
        )
    if isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"{where} is a {type(x).__module__}.{type(x).__qualname__}; files keep "
            "concrete arrays and leaf types in dicts, lists and tuples. Convert it: of "
            "an NNX module jaxcompress.running.nnx.params_of(module), of Flax's boxes "
            "jc.tree.unbox, of other objects flax.serialization.to_state_dict"
        )
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise TypeError(f"{where} holds random keys; store jax.random.key_data(x)")
    if x.dtype.name not in DTYPES:
        raise TypeError(f"{where} has dtype {x.dtype}; files keep numbers and booleans")


def _registered(x: Leaf, path: Path) -> type[Leaf]:
    cls = type(x)
    try:
        registered = leaf_type(cls.__name__)
    except KeyError:
        registered = None
    if registered is not cls:
        raise TypeError(
            f"{join(path)}: {cls} is not registered; decorate it with @leaf"
        )
    return cls


def _dense(x: Leaf) -> dict[str, Any]:
    """Return the dense dtype and shape of a leaf; half a partitioned one has none."""
    try:
        return {"dense": [jnp.dtype(x.dtype).name, [int(size) for size in x.shape]]}
    except (AttributeError, TypeError, IndexError):
        return {}


def _static_of(cls: type[Leaf], node: Any, path: Path) -> dict[str, Any]:
    static = {key: static_json.from_json(x) for key, x in node["static"].items()}
    for field in dataclasses.fields(cls):
        if field.metadata.get("static") and field.name in static:
            try:
                static_json.check_static(field.name, field, static[field.name])
            except TypeError as error:
                raise _wrong(path, str(error)) from error
    optional = {f.name for f in dataclasses.fields(cls) if _has_default(f)}
    missing = set(static_fields(cls)) - static.keys() - optional
    surplus = static.keys() - set(static_fields(cls))
    if missing or surplus:
        raise _wrong(
            path,
            f"static fields {sorted(static)}, {cls.__name__} has "
            f"{sorted(static_fields(cls))}",
        )
    return static


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING

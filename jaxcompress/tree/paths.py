"""Names of the leaves of a tree, and a walk that sees inside leaf types."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tree.containers import check_tree
from jaxcompress.tree.layouts import (
    DENSE,
    Layout,
    choose_layout,
    leading,
    leaf_layout,
    matricize,
    restore,
    trailing,
    with_layout,
)
from jaxcompress.tree.leaf import Leaf, data_fields, dense, is_box, is_variable
from jaxcompress.types import Params

KERNEL, EMBEDDING = "kernel", "embedding"
VECTORS = ("bias", "scale", "mean", "var")  # one axis in a layer that is not stacked


@dataclasses.dataclass(frozen=True)
class Entry:
    """One addressable array of a tree, with what its position implies.

    `value` is an array, or a lossless leaf in place of one. `depth` counts the leaf
    types around it: 0 for an array of the original tree. `weight`: it is a kernel
    or an embedding, or a weight inside a leaf in its place. `root` is the name of
    the outermost leaf or array it belongs to. `stack` counts the leading axes that hold
    layers, as far as its place tells: all but the last of a vector by name (`VECTORS`),
    all but the last two of any other array, and no fewer than the axes that everything
    in some subtree around it shares, kernels with stack axes among them.
    `moments` are those of its inputs; `caller_layout` is what `layouts=` says of it.
    """

    name: str
    value: Any
    depth: int
    weight: bool
    embedding: bool
    root: str
    stack: int
    moments: Any = None
    caller_layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """The axes of the value that are stack, inputs and outputs.

        Raises ValueError where they are unknown, or contradict the moments'.
        """
        shape, seen = self.value.shape, getattr(self.moments, "layout", None)
        if len(shape) < 2:
            raise ValueError(
                f"{self.name} needs a matrix, this has shape {shape}; narrow the "
                "pattern, or put (pattern, None) for it before"
            )
        if not self.depth:
            return choose_layout(
                self.name,
                shape,
                self.caller_layout,
                self.moments,
                embedding=self.embedding,
            )
        if seen is not None:
            raise ValueError(
                f"{self.root} was compressed along other axes than those of the "
                f"moments, which were collected with {seen} (axes counted from the "
                "last); compress the dense weights with these moments, or with "
                "layouts=find_layouts(model, params, batch)"
            )
        return leading(DENSE, len(shape))

    def matrix(self, value: Any = None) -> jax.Array:
        """Return the value, or another in its place, as `[..., inputs, outputs]`.

        Args:
          value: an array or a leaf of the same shape.
        """
        value = self.value if value is None else value
        return matricize(dense(value), self.layout)

    def restore(self, matrix: Any) -> Any:
        """Return a leaf or an array `[..., inputs, outputs]` in the shape of the
        value.
        """
        return restore(matrix, self.value.shape, self.layout)


def key_name(key: Any) -> str:
    """Return one step of a JAX key path as text: dict key, index or attribute."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def children(node: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Return the named children of one pytree node, and the treedef that rebuilds it.

    A metadata box such as `nn.Partitioned` adds nothing to the name of what it holds.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    if is_box(node) or is_variable(node):
        return [("", child) for _, child in flat], treedef
    named = [("/".join(key_name(key) for key in path), child) for path, child in flat]
    return named, treedef


def map_entries(
    function: Callable[[Entry], Any],
    params: Params,
    moments: Any = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Any:
    """Return the tree with every entry's value replaced by `function(entry)`.

    `moments` maps names of dense kernels to their `Moments`; inside a leaf they follow
    where they still mean something (`Leaf.inner_moments`). What `moments` or `layouts`
    name is a weight, whatever it is called. Python numbers and strings stay.

    Raises TypeError for a `TrainState`.
    """
    moments, layouts = moments or {}, layouts or {}
    traced = {*moments, *layouts}
    check_tree(params)
    seen: Memo = {}

    def walk(
        node: Any,
        name: str,
        depth: int,
        root: str | None,
        above: tuple[Any, ...] = (),
        **place: Any,
    ) -> Any:
        if isinstance(node, Leaf) and not node.lossless:
            root = name if root is None else root
            if depth == 0:
                place["weight"] = place["weight"] or name in traced
                place["moments"] = _of_leaf(node, moments.get(name))
            stack = place["stack"] if is_transparent(node) else len(node.shape) - 2
            changed = {}
            for field in data_fields(node):
                child = getattr(node, field)
                if child is None:
                    continue
                inner = {
                    "weight": place["weight"] and field in node.weights,
                    "embedding": place["embedding"],
                    "stack": stack,
                    "moments": inner_moments(node, field, place["moments"]),
                }
                below = name if is_transparent(node) else join(name, field)
                changed[field] = walk(child, below, depth + 1, root, **inner)
            if all(new is getattr(node, field) for field, new in changed.items()):
                return node
            return node.with_parts(**changed)
        named, treedef = ([], None) if isinstance(node, Leaf) else children(node)
        if treedef is None or (len(named) == 1 and named[0][1] is node):
            if not hasattr(node, "dtype"):
                return node
            if depth == 0:
                place["weight"] = place["weight"] or name in traced
                place["moments"] = moments.get(name)
                place["caller_layout"] = layouts.get(name)
                place["stack"] = _stack_axes(node, name, above, seen)
            return function(Entry(name, node, depth, root=root or name, **place))
        rebuilt = []
        for key, child in named:
            inner = dict(place)
            if depth == 0 and not (is_box(node) or is_variable(node)):
                last = key.rsplit("/", 1)[-1]
                inner["embedding"] = last == EMBEDDING
                inner["weight"] = last in (KERNEL, EMBEDDING)
            around = (*above, node)
            rebuilt.append(walk(child, join(name, key), depth, root, around, **inner))
        if all(new is old for new, (_, old) in zip(rebuilt, named, strict=True)):
            return node
        return jax.tree.unflatten(treedef, rebuilt)

    start = {"weight": False, "embedding": False, "stack": 0, "moments": None}
    return walk(params, "", 0, None, **start)


Shared = tuple[tuple[int, ...], int]  # leading axes in common, most axes of any
Memo = dict[int, tuple[Any, Shared]]  # by id of a node, and the node, which keeps it


def _stack_axes(x: Any, name: str, above: tuple[Any, ...], seen: Memo) -> int:
    """Count the leading axes of an array that hold layers; see `Entry`.

    Without a trace, `[rows, columns]` under an unknown name may be a plain matrix or a
    vector of each layer. All arrays of a scanned module share the axes of the scan, its
    kernels `[layers, inputs, outputs]` among them; a plain matrix has no such company.

    Args:
      above: the nodes around the array, outermost first.
      seen: memo of `_shared_axes`.
    """
    last = name.rsplit("/", 1)[-1]
    layers = max(0, x.ndim - (1 if last in VECTORS else 2))
    if x.ndim < 2 or last in (KERNEL, EMBEDDING, *VECTORS):
        return layers
    for node in above:
        shared, most = _shared_axes(node, seen)
        layers = max(layers, min(len(shared), most - 2, x.ndim - 1))
    return layers


def _shared_axes(node: Any, seen: Memo) -> Shared:
    """Return the leading sizes that all arrays below a node share, and their rank."""
    if id(node) in seen:
        return seen[id(node)][1]
    named, _ = ([], None) if isinstance(node, Leaf) else children(node)
    if isinstance(node, Leaf) or (len(named) == 1 and named[0][1] is node):
        shape = tuple(getattr(node, "shape", ()))
        result = shape, len(shape)
    else:
        parts = [_shared_axes(child, seen) for _, child in named]
        axes = zip(*(shape for shape, _ in parts), strict=False)
        alike = itertools.takewhile(lambda sizes: len(set(sizes)) == 1, axes)
        result = tuple(a[0] for a in alike), max((n for _, n in parts), default=0)
    seen[id(node)] = node, result
    return result


def entries(
    params: Params,
    moments: Any = None,
    layouts: Mapping[str, Layout] | None = None,
) -> list[Entry]:
    """Return every addressable array of the tree, in order."""
    result: list[Entry] = []

    def keep(entry: Entry) -> Any:
        result.append(entry)
        return entry.value

    map_entries(keep, params, moments, layouts)
    return result


def check_names(names: list[str]) -> None:
    """Raise ValueError where two leaves of a tree have one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"{twice[0]}: {len(twice)} names each belong to two leaves, because a key "
            f"contains '/' (as {{'a/b': ...}} next to {{'a': {{'b': ...}}}}); rename "
            "the keys"
        )


def leaf_names(params: Params) -> list[str]:
    """List the names that recipe patterns match: path components joined by "/".

    A leaf's data fields are components too (`mlp/kernel/codes`), except inside a
    lossless leaf, which represents one array, and inside `Reshaped`, which adds none.

    Args:
      params: pytree of arrays and leaves.

    Example:
      >>> jc.leaf_names({"mlp": {"kernel": x}})
      ['mlp/kernel']
    """
    return [entry.name for entry in entries(params)]


def array_names(params: Params) -> Any:
    """Return a tree like `params` with the name of each array in its place.

    As `leaf_names`, but inside lossless leaves too; parts may be None, as `partition`
    leaves them.
    """

    def walk(node: Any, name: str) -> Any:
        named, treedef = children(node)
        if len(named) == 1 and named[0][1] is node:
            return name
        inside = isinstance(node, Leaf) and is_transparent(node)
        below = [
            walk(child, name if inside else join(name, key)) for key, child in named
        ]
        return jax.tree.unflatten(treedef, below)

    return walk(params, "")


def roots(params: Params, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of every outermost leaf or array, in order.

    Raises TypeError for a state of training.
    """
    if isinstance(params, Leaf):
        yield name, params
        return
    if not name:
        check_tree(params)
    for key, child in children(params)[0]:
        if child is params:
            yield name, params
        else:
            yield from roots(child, join(name, key))


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of an array, a leaf, or a Python number."""
    if not hasattr(x, "dtype"):
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # keys
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def is_transparent(leaf: Leaf) -> bool:
    """Return a leaf with a single data field called `inner` adds nothing to names."""
    return data_fields(leaf) == ("inner",)


def inner_moments(leaf: Leaf, field: str, moments: Any) -> Any:
    """Return moments of the inputs of a leaf's field, given those of the leaf's
    inputs.
    """
    if moments is None or field not in leaf.weights:
        return None
    layout = getattr(moments, "layout", None)
    return with_layout(leaf.inner_moments(field, moments), layout)


def _of_leaf(leaf: Leaf, moments: Any) -> Any:
    """Return moments for what a leaf holds, which is `[..., inputs, outputs]` already.

    They lose their layout where the leaf was compressed along it, and keep it where
    they contradict the leaf.
    """
    layout = getattr(moments, "layout", None)
    agrees = layout is None or trailing(layout) == leaf_layout(leaf)
    return with_layout(moments, None) if agrees else moments


def join(name: str, key: str) -> str:
    return f"{name}/{key}" if name and key else name or key


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)

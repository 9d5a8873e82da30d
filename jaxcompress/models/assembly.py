"""Maps third-party checkpoint tensors onto Transformer parameters, one at a time."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcompress.models.transformer import Transformer
from jaxcompress.tree.leaf import Leaf
from jaxcompress.types import DType, Params

Modules = Mapping[str, str]  # our module's path -> theirs; "layer" holds a {}

_SHOWN = 5  # names in an error message


@dataclasses.dataclass(frozen=True)
class Assembled:
    """Parameters in a third-party file, each read when it is asked for.

    `tree` has names in the places of the leaves, as `storage.open` gives it.
    """

    tree: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    kind: Callable[[str], str]  # the dtype's name, without reading the weight
    fetch: Callable[[str], jax.Array]

    def __getitem__(self, name: str) -> jax.Array:
        return self.fetch(name)

    def describe(self, name: str) -> tuple[str, tuple[int, ...], str]:
        """Type, shape and dtype of one leaf, without reading it."""
        return "array", tuple(self.shapes[name]), self.kind(name)

    def read_all(self) -> Params:
        return jax.tree.map(self.fetch, self.tree)


def parameter_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the looped model, in order.

    Raises ValueError where the model's settings contradict each other.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if model.scan:  # refuses layers that differ
        jax.eval_shape(model.init, jax.random.key(0), tokens)
    looped = model.clone(scan=False)
    variables = jax.eval_shape(looped.init, jax.random.key(0), tokens)
    flat = flatten_dict(variables["params"], sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def foreign_name(name: str, modules: Modules) -> str:
    """Return a file's name of our parameter: `layer_3/mlp/up_proj/kernel` by its
    modules.
    """
    *path, leaf = name.split("/")
    suffix = "bias" if leaf == "bias" else "weight"
    if match := re.fullmatch(r"layer_(\d+)", path[0]):
        prefix = modules["layer"].format(match[1])
        return f"{prefix}.{modules['/'.join(path[1:])]}.{suffix}"
    return f"{modules['/'.join(path)]}.{suffix}"


def foreign_names(name: str, shape: tuple[int, ...], modules: Modules) -> list[str]:
    """List the tensors in a file that hold our parameter: one, or one an expert."""
    path = name.split("/")
    if len(shape) < 3 or path[-1] != "kernel":
        return [foreign_name(name, modules)]
    stacks = {key.replace("experts/", "mlp/"): x for key, x in modules.items()
              if key.startswith("experts/")}  # fmt: skip
    foreign = foreign_name(name, {**modules, **stacks})
    if "{}" not in foreign:
        return [foreign]
    return [foreign.format(i) for i in range(shape[0])]


def assemble(
    model: Transformer,
    available: Iterable[str],
    fetch: Callable[[str, str], np.ndarray],
    modules: Modules,
    *,
    kind: Callable[[str], str] = lambda foreign: "float32",
    ignorable: str = "(?!)",
    dtype: DType | None = None,
    source: str,
) -> Assembled:
    """Return model's parameters, looped or scanned as `model.scan` says, still unread.

    `available` are the tensors the file has, `fetch(foreign, ours)` reads one in the
    file's own orientation: kernels [outputs, inputs], which are transposed here; or
    a leaf in ours.
    `kind(foreign)` is the name of its dtype.
    Tensors whose names fully match the pattern `ignorable` are left where they are;
    `dtype=None` keeps the type of each. Besides what was read, one tensor is held at a
    time (one stack of tensors where the model is scanned). Raises ValueError naming
    missing tensors and surplus tensors, and, on reading, a tensor of the wrong shape.
    """
    shapes = parameter_shapes(model)
    foreign = {
        name: foreign_names(name, shape, modules) for name, shape in shapes.items()
    }
    needed = {name for names in foreign.values() for name in names}
    available = set(available)
    missing = sorted(needed - available)
    surplus = sorted(
        name for name in available - needed if not re.fullmatch(ignorable, name)
    )
    if missing or surplus:
        raise ValueError(
            f"{source} does not fit its configuration: "
            f"{_listed('missing', missing)}, {_listed('surplus', surplus)}. "
            "The file is incomplete, or describes another architecture"
        )

    def read_one(name: str, tensor: str, wanted: tuple[int, ...]) -> Any:
        array = fetch(tensor, name)
        if isinstance(array, Leaf):  # codes, in our orientation already
            return _checked(array, tensor, wanted, source)
        if name.endswith("/kernel"):
            wanted = (*wanted[:-2], wanted[-1], wanted[-2])
        if array.shape != wanted:
            raise ValueError(
                f"{source}: tensor {tensor} has shape {array.shape}; its configuration "
                f"makes it {wanted}"
            )
        if name.endswith("/kernel"):
            array = array.swapaxes(-1, -2)
        return array if dtype is None else array.astype(dtype)

    def read(name: str) -> Any:
        tensors, shape = foreign[name], shapes[name]
        if len(tensors) == 1:
            return read_one(name, tensors[0], shape)
        experts = [read_one(name, tensor, shape[1:]) for tensor in tensors]
        return jax.tree.map(lambda *x: np.stack(x), *experts)

    ours: dict[str, list[str]] = {}  # the looped model's names, by this model's
    for name in shapes:
        place = re.fullmatch(r"layer_(\d+)/(.+)", name)
        if not model.scan or not place:
            ours[name] = [name]
        elif place[1] == "0":
            layers = range(model.layers)
            ours[f"layers/{place[2]}"] = [f"layer_{i}/{place[2]}" for i in layers]

    def fetch_ours(name: str) -> jax.Array:
        if model.scan and name.startswith("layers/"):
            return _stack(read, ours[name])
        return jax.tree.map(jnp.asarray, read(name))

    def shape(name: str) -> tuple[int, ...]:
        one = shapes[ours[name][0]]
        stacked = model.scan and name.startswith("layers/")
        return (len(ours[name]), *one) if stacked else one

    return Assembled(
        unflatten_dict({name: name for name in ours}, sep="/"),
        {name: shape(name) for name in ours},
        lambda name: (
            kind(foreign[ours[name][0]][0]) if dtype is None else jnp.dtype(dtype).name
        ),
        fetch_ours,
    )


def _checked(leaf: Leaf, foreign: str, shape: tuple[int, ...], source: str) -> Leaf:
    if tuple(leaf.shape) != tuple(shape):
        raise ValueError(
            f"{source}: tensor {foreign} holds codes of shape {leaf.shape[::-1]}; its "
            f"configuration makes it {shape[::-1]}"
        )
    return leaf


def _stack(read: Callable[[str], np.ndarray], names: list[str]) -> jax.Array:
    first = read(names[0])
    if isinstance(first, Leaf):
        leaves = [first, *map(read, names[1:])]
        return jax.tree.map(lambda *x: jnp.stack(x), *leaves)
    stacked = np.empty((len(names), *first.shape), first.dtype)
    stacked[0] = first
    for i, name in enumerate(names[1:], start=1):
        stacked[i] = read(name)
    return jnp.asarray(stacked)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return f"nothing {what}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"

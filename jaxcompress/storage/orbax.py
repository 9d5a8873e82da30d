"""Orbax checkpoints of compressed parameters, for several hosts.

The checkpoint has two items: `arrays`, nested dicts of the arrays under the steps of
their paths, and `tree`, the JSON of `tree_json`, from which leaf types and static
fields return. Orbax writes both under other names and renames; process 0
writes the JSON.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxcompress.storage import tree_json
from jaxcompress.tree.containers import freeze_at, frozen_paths, thaw
from jaxcompress.types import Params

FORMAT, VERSION = "jaxcompress", 3

# Dtypes that Orbax does not save, or only lately, and what holds their values exactly.
_HELD_AS = {
    "int2": "int8",
    "uint2": "uint8",
    "uint4": "uint8",
    "float4_e2m1fn": "float32",
    "float8_e4m3": "uint8",  # its bits
}

Place = Callable[[str, tuple[int, ...]], Sharding]


def save_orbax(path: str | os.PathLike, params: Params) -> None:
    """Save parameters, sharded over any number of hosts, as an Orbax checkpoint.

    On several hosts every process calls it, with arrays sharded over all of them or
    with equal arrays of its own. Leaf types are kept field by field, without the
    shorter form that `save` has for some.

    Args:
      path: a directory that does not exist; on several hosts, one that all see.
      params: the tree; what it may hold is what `save` takes.

    Raises:
      TypeError: the tree holds something that files do not keep.
      ValueError: the directory exists.

    Example:
      >>> jc.save_orbax("checkpoint", jc.compress(params, "symmetric(bits=4)"))
    """
    import orbax.checkpoint as ocp

    node, slots = tree_json.encode(params, compact=False)
    about = {"format": FORMAT, "format_version": VERSION, "tree": node}
    if frozen := frozen_paths(params):
        about["frozen"] = [list(path) for path in frozen]
    items = {"tree": ocp.args.JsonSave(about)}
    # Orbax refuses empty arrays; the tree says all there is to say about them.
    arrays = {
        k: _held(slot.fetch()) for k, slot in slots.items() if 0 not in slot.shape
    }
    if arrays:
        items["arrays"] = ocp.args.PyTreeSave(_nested(arrays))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(_absolute(path), args=ocp.args.Composite(**items))


def restore_orbax(path: str | os.PathLike, *, sharding: Any = None) -> Params:
    """Restore the parameters that `save_orbax` saved; no target is needed.

    64-bit arrays are restored as NumPy arrays unless `jax_enable_x64` is set.

    Args:
      path: the directory.
      sharding: where arrays are put: one `Sharding`; a function of an array's name and
        shape that returns one; or a tree of them, a prefix of the parameters. Names are
        those of arrays in leaves too (`mlp/kernel/codes`), and so are shapes. Without
        it: the default device; on several hosts, a copy on every device.

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: not a checkpoint of `save_orbax`, or of a newer format; a sharding
        that does not fit an array, named.

    Example:
      >>> jc.save_orbax("checkpoint", {"kernel": x})
      >>> params = jc.restore_orbax("checkpoint")
    """
    import orbax.checkpoint as ocp

    path = _absolute(path)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        about = _about(checkpointer, path)
        node = about.get("tree")
        place = _place(node, sharding)
        target, how = {}, {}
        for name, dtype, shape in tree_json.arrays(node):
            if 0 in shape:
                continue
            held = jnp.dtype(_HELD_AS.get(dtype, dtype))
            target[name] = jax.ShapeDtypeStruct(shape, held)
            if jax.dtypes.canonicalize_dtype(held) != held:
                how[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=held)
            else:
                how[name] = ocp.ArrayRestoreArgs(
                    dtype=held, global_shape=shape, sharding=place(name, shape)
                )
        restored = {}
        if target:
            arrays = ocp.args.PyTreeRestore(_nested(target), restore_args=_nested(how))
            args = ocp.args.Composite(arrays=arrays)
            restored = checkpointer.restore(path, args=args)["arrays"]

    def read(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        if name not in target:
            x = np.zeros(shape, jnp.dtype(dtype))
            is_wide = jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
            return x if is_wide else jax.device_put(x, place(name, shape))
        x = restored
        for step in name.split("/"):
            x = x[step]
        return _freed(x, dtype)

    return freeze_at(tree_json.decode(node, read), about.get("frozen", []))


def is_orbax(path: str | os.PathLike) -> bool:
    """Return whether a directory on this machine is, or has in it, an Orbax
    checkpoint.

    Args:
      path: of a directory.

    Example:
      >>> jc.storage.is_orbax("no_such_directory")
      False
    """
    marks = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")
    return any(set(marks) & set(names) for _, _, names in os.walk(path))


def _absolute(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(path)


def _about(checkpointer: Any, path: str) -> dict[str, Any]:
    """Return the JSON that describes a checkpoint's tree."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(tree=ocp.args.JsonRestore())
    try:
        about = checkpointer.restore(path, args=args)["tree"]
    except KeyError:
        about = None
    if type(about) is not dict or about.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not a checkpoint of save_orbax; restore it with Orbax"
        )
    version = about.get("format_version")
    if version != VERSION:
        newer = type(version) is int and version > VERSION
        raise ValueError(
            f"{path}: of format {version}, this jaxcompress reads {VERSION}; "
            f"{'update it' if newer else 'restore and save it with what wrote it'}"
        )
    return about


def _held(x: Any) -> Any:
    """Return an array as Orbax takes it, in the same places."""
    if isinstance(x, jax.Array) and x.is_fully_addressable and jax.process_count() > 1:
        x = np.asarray(x)  # every host has its own: process 0 writes it
    held = _HELD_AS.get(x.dtype.name)
    if held is None:
        return np.asarray(x) if isinstance(x, np.generic) else x
    if x.dtype.name == "float8_e4m3":
        bits = jax.lax.bitcast_convert_type
        return bits(x, jnp.uint8) if isinstance(x, jax.Array) else x.view(np.uint8)
    return x.astype(jnp.dtype(held))


def _freed(x: Any, dtype: str) -> Any:
    """Return the array that `_held` changed."""
    if x.dtype.name == dtype:
        return x
    if dtype == "float8_e4m3":
        return jax.lax.bitcast_convert_type(x, jnp.dtype(dtype))
    return x.astype(jnp.dtype(dtype))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return names joined by "/" as dicts in dicts."""
    root: dict[str, Any] = {}
    for name, value in flat.items():
        *steps, last = name.split("/")
        inner = root
        for step in steps:
            inner = inner.setdefault(step, {})
        inner[last] = value
    return root


def _place(node: Any, sharding: Any) -> Place:
    """Choose the sharding of the array of a name and shape."""
    if sharding is None:
        everywhere = _everywhere()
        return lambda name, shape: everywhere
    if isinstance(sharding, Sharding):
        choose: Place = lambda name, shape: sharding  # noqa: E731
    elif callable(sharding):
        choose = sharding
    else:
        named = _spread(node, sharding)
        choose = lambda name, shape: named[name]  # noqa: E731

    def place(name: str, shape: tuple[int, ...]) -> Sharding:
        chosen = choose(name, shape)
        try:
            chosen.shard_shape(shape)
        except (ValueError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{name} {shape} can't be placed as {chosen}: {error}. Pass a function "
                "of the name and shape, and replicate small arrays: PartitionSpec()"
            ) from error
        return chosen

    return place


def _everywhere() -> Sharding:
    if jax.process_count() == 1:
        return jax.device_put(np.float32(0)).sharding
    mesh = Mesh(np.asarray(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def _spread(node: Any, tree: Params) -> dict[str, Sharding]:
    """Return sharding of each array by its name, from a prefix of the parameters."""
    names: dict[int, str] = {}
    held = []

    def read(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        held.append(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
        names[id(held[-1])] = name
        return held[-1]

    params = tree_json.decode(node, read)
    by_name: dict[str, Sharding] = {}

    def assign(sharding: Sharding, below: Any) -> None:
        for x in jax.tree.leaves(below):
            by_name[names[id(x)]] = sharding

    jax.tree.map(assign, thaw(tree), params, is_leaf=lambda x: isinstance(x, Sharding))
    return by_name

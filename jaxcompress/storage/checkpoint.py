"""Parameters in one `.safetensors` file, or in shards with an index, bit for bit.

`checksummed_file` describes the bytes. The tree (`tree_json`), the user's metadata and
the versions are one JSON object, the array `__about__`.
"""

import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

from jaxcompress import __version__
from jaxcompress.storage import shards, tree_json
from jaxcompress.storage.checksummed_file import (
    VERSION,
    to_json,
)
from jaxcompress.storage.file_writer import beside, write
from jaxcompress.storage.stored_params import StoredParams
from jaxcompress.tree.containers import frozen_paths
from jaxcompress.types import Params

CODINGS = ("size", "decode", "none")


def save(
    path: str | os.PathLike,
    params: Params,
    metadata: Mapping[str, Any] | None = None,
    *,
    coding: str = "size",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write parameters to a file from which `load` gives the same tree, bit for bit.

    Leaf types and their static fields, dicts, lists, tuples, None, dtypes and shapes
    are kept, and Flax's `FrozenDict`; other mappings are restored as dicts, an
    `nnx.State` as one of values. Same parameters, metadata and versions give the same
    bytes. The file is written next to `path` and renamed: an
    error leaves an old file as it was. One array is on the host at a time, or 64 MiB
    of small ones.

    Arrays are coded without loss where that makes them smaller (docs/format.md, section
    4): the coding belongs to the file, and the tree that `load` gives is the one that
    was saved.

    Args:
      path: of the file. Where the arrays take more than `max_shard_bytes`, shards
        `name-00001-of-0000N.safetensors` and `name.safetensors.index.json` are
        written next to it instead, and `path` still loads.
      params: the tree.
      metadata: what to keep next to the tree, for instance the recipe; JSON, so tuples
        are restored as lists.
      coding: "size" for the smallest file of these (integers after `entropy_code()`
        are a little smaller still); "decode" for a coding that decodes sooner
        (`code_floats`); "none" leaves every array as it is, so that any reader of
        .safetensors sees its numbers.
      max_shard_bytes: bytes of arrays in a file; a larger array has its own.

    Raises:
      TypeError: the tree holds something that files do not keep, such as a Python
        number; or metadata that JSON does not know.
      ValueError: an array is not of this host alone: `save_orbax` saves those.

    Example:
      >>> small = jc.compress(params, "symmetric(bits=4)")
      >>> jc.save("small.safetensors", small, metadata={"bits": 4})
    """
    if coding not in CODINGS:
        raise ValueError(
            f"save takes coding={', '.join(map(repr, CODINGS))}, not {coding!r}"
        )
    path = os.path.realpath(path)
    node, slots = tree_json.encode(params, compact=True)
    about = describe(node, {} if metadata is None else metadata)
    if frozen := frozen_paths(params):
        about["frozen"] = [list(path) for path in frozen]
    parts = shards.split(slots, max_shard_bytes)
    if len(parts) > 1:
        shards.save(path, parts, about, coding=coding)
        return
    with beside(path) as file:
        write(file, slots, about, coding=coding)
    shards.remove(path)


def describe(node: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object that describes the tree of a node.

    Raises:
      TypeError: metadata that JSON does not know.
    """
    try:
        to_json(dict(metadata))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be JSON: {error}") from error
    return {"metadata": dict(metadata), "tree": node, "versions": versions()}


def load(path: str | os.PathLike, *, numpy: bool = False) -> Params:
    """Load the parameters that `save` wrote, bit for bit; every byte read is checked.

    Memory: the result and one leaf more, or some small ones. Arrays are put on the
    default device; 64-bit arrays stay NumPy arrays unless `jax_enable_x64` is set, as
    JAX would round them.

    Args:
      path: what `save` was given, or an index of shards.
      numpy: leave every array on the host, as a NumPy array.

    Raises:
      FileDamaged: the file is not what was written; says what and where.
      ValueError: not a file of `save`, or of a newer format; an unknown leaf type.

    Example:
      >>> jc.save("small.safetensors", {"kernel": x})
      >>> jc.load("small.safetensors")["kernel"].shape
      (64, 64)
    """
    with open_checkpoint(path) as file:
        return file.read_tree(numpy=numpy)


def open_checkpoint(path: str | os.PathLike) -> StoredParams:
    """Open a file of `save` to read leaf by leaf.

    Reads and checks what describes the tree; an array is read, and checked, when it is
    asked for. Use it in a `with` statement, or call `close()`.

    Args:
      path: what `save` was given, or an index of shards.

    Raises: as `load`.

    Example:
      >>> jc.save("small.safetensors", {"mlp": {"kernel": x}})
      >>> with jc.open_checkpoint("small.safetensors") as stored:
      ...     kernel = stored["mlp/kernel"]
    """
    return StoredParams(path)


def verify(path: str | os.PathLike) -> dict[str, int]:
    """Check every byte of a file, or of all shards, with little memory.

    Returns the `format_version` and the numbers of `files`, `leaves` (outermost leaf
    types and arrays), `arrays` and `bytes` (of the files).

    Args:
      path: what `save` was given, or an index of shards.

    Raises: as `load`.

    Example:
      >>> jc.save("small.safetensors", {"kernel": x})
      >>> jc.verify("small.safetensors")["arrays"]
      1
    """
    with open_checkpoint(path) as stored:
        files = stored.files()
        for file in files:
            for name in file.spans:
                file.check(name)
        return {
            "format_version": VERSION,
            "files": len(files),
            "leaves": len(stored.names),
            "arrays": sum(len(file.spans) for file in files),
            "bytes": stored.index_bytes + sum(file.size for file in files),
        }


def versions() -> dict[str, str]:
    """Return versions of the packages that a file names as its writers."""
    by_package = {"jaxcompress": __version__}
    for package in ("jax", "flax"):
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_package[package] = "not installed"
    return by_package

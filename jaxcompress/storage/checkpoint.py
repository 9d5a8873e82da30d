"""Parameters in one `.safetensors` file, or in shards with an index, bit for bit.

`checksummed_file` describes the bytes. The tree (`tree_json`), the user's metadata and
the versions are one JSON object, the array `__about__`.
"""

import contextlib
import gc
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress import __version__
from jaxcompress.coding.threads import in_groups, of_arrays
from jaxcompress.storage import shards, tree_json
from jaxcompress.storage.checksummed_file import (
    ADVICE,
    VERSION,
    TensorFile,
    count_bytes,
    damaged,
    to_json,
)
from jaxcompress.storage.file_writer import beside, write
from jaxcompress.storage.tree_json import ODD, FileDamaged, Slot
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.names import nearest
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
    are kept; other mappings come back as dicts. Same parameters, metadata and
    versions give the same bytes. The file is written beside `path` and renamed: an
    error leaves an old file as it was. One array is on the host at a time, or 64 MiB
    of small ones.

    Arrays are coded without loss where that makes them smaller (`coding.array_codecs`):
    the coding belongs to the file, and the tree that `load` gives is the one that was
    saved.

    Args:
      path: of the file. Where the arrays take more than `max_shard_bytes`, shards
        `name-00001-of-0000N.safetensors` and `name.safetensors.index.json` stand
        beside it instead, and `path` still loads.
      params: the tree.
      metadata: what to keep beside the tree, for instance the recipe; JSON, so tuples
        come back as lists.
      coding: "size" for the smallest file; "decode" for a coding that decodes sooner
        (`code_floats`); "none" leaves every array as it is, so that any reader of
        .safetensors sees its numbers.
      max_shard_bytes: bytes of arrays in a file; a larger array has its own.

    Raises:
      TypeError: the tree holds something that files do not keep, such as a Python
        number; or metadata that JSON does not know.
      ValueError: an array is not of this host alone: `save_orbax` saves those.
    """
    if coding not in CODINGS:
        raise ValueError(
            f"save takes coding={', '.join(map(repr, CODINGS))}, not {coding!r}"
        )
    path = os.path.realpath(path)
    node, slots = tree_json.encode(params, compact=True)
    about = describe(node, {} if metadata is None else metadata)
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
    """Return the parameters that `save` wrote, bit for bit; every byte read is checked.

    Memory: the result and one leaf more, or some small ones. Arrays go to the default
    device; 64-bit arrays stay NumPy arrays unless `jax_enable_x64` is set, as JAX
    would round them.

    Args:
      path: what `save` was given, or an index of shards.
      numpy: leave every array on the host, as a NumPy array.

    Raises:
      FileDamaged: the file is not what was written; says what and where.
      ValueError: not a file of `save`, or of a newer format; an unknown leaf type.
    """
    with open_checkpoint(path) as file:
        return file.read_tree(numpy=numpy)


def open_checkpoint(path: str | os.PathLike) -> "StoredParams":
    """Return file of `save`, to read leaf by leaf: `open(path)["layer_0/mlp/kernel"]`.

    Reads and checks what describes the tree; an array is read, and checked, when it is
    asked for. Use it in a `with` statement, or call `close()`.

    Raises: as `load`.
    """
    return StoredParams(path)


def verify(path: str | os.PathLike) -> dict[str, int]:
    """Check every byte of a file, or of all shards, with little memory.

    Returns the `format_version` and the numbers of `files`, `leaves` (outermost leaf
    types and arrays), `arrays` and `bytes` (of the files).

    Raises: as `load`.
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


class StoredParams:
    """Parameters in a file; made by `open`.

    Attributes:
      path: of the file, or of the index of shards.
      names: of the outermost leaves and arrays, in order; "/" and "~" in a key are
        written ~1 and ~0.
      tree: the tree with these names in the places of the leaves.
      metadata: what `save` was given.
      versions: of the packages that wrote the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        index = shards.index_path(self.path)
        self._files: dict[str, TensorFile] = {}
        self._shards = None
        self.index_bytes = 0
        if index is None:
            file = TensorFile(self.path)
            self._files[""] = file
            about, names = file.about, file.spans.keys()
            if "shard" in about:
                file.close()
                raise ValueError(
                    f"{self.path} is shard {about['shard']}; load the file ending in "
                    f"{shards.SUFFIX} beside it"
                )
        else:
            self.path = index
            self._shards = shards.Index(index)
            self.index_bytes = self._shards.size
            about, names = self._shards.about, self._shards.files.keys()
        try:
            self._describe(about, set(names))
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Any:
        """Return the leaf or array of this name, on the default device."""
        return self.read(name)

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def __enter__(self) -> "StoredParams":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, name: str, *, numpy: bool = False) -> Any:
        """Return the leaf or array of this name.

        Raises:
          KeyError: no such name; says the nearest.
          FileDamaged: its bytes are not those written.
        """
        return self._leaf(name, self._read, numpy)

    def read_tree(self, *, numpy: bool = False) -> Params:
        """Read the whole tree, as `load` does; small arrays are decoded in threads."""
        nodes = {name: node for name, (node, _) in self._nodes.items()}
        same = {name: node["same"] for name, node in nodes.items() if "same" in node}
        own = [name for name in self.names if name not in same]
        wanted = [one for name in own for one in self._arrays(name)]
        with contextlib.closing(self._decoded(wanted)) as found:
            ahead: dict[str, np.ndarray] = {}

            def take(name: str, *_: Any) -> np.ndarray:
                while name not in ahead:
                    ahead.update([next(found)])
                return ahead.pop(name)

            leaves = {name: self._leaf(name, take, numpy) for name in own}
        leaves |= {name: leaves[other] for name, other in same.items()}
        return jax.tree.map(leaves.pop, self.tree)

    def _decoded(
        self, wanted: list[tuple[str, str, tuple[int, ...]]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Decode arrays by name, dtype and shape, in order; yield names and values."""
        kinds = {name: Slot(dtype, shape, None) for name, dtype, shape in wanted}
        sizes = {name: count_bytes(slot) for name, slot in kinds.items()}

        def work(item: tuple[str, TensorFile], threads: int = 1) -> Any:
            name, file = item
            kind = kinds[name].dtype, kinds[name].shape
            return name, file.read(name, *kind, threads=threads)

        for small, group in in_groups(kinds, sizes):
            items = ((name, self._file_of(name)) for name in group)
            if small:
                yield from of_arrays(work, items, lambda item: sizes[item[0]])
            else:
                yield work(next(items), None)

    def _leaf(self, name: str, read: Any, numpy: bool) -> Any:
        node, path = self._find(name)
        try:
            leaf = tree_json.decode(node, read, path)
        except KeyError as error:
            raise ValueError(f"{self.path}: {name}: {error.args[0]}") from error
        except FileDamaged as error:
            raise self._in_file(error) from error
        if numpy:
            return jax.tree.map(np.asarray, leaf)
        moved = jax.block_until_ready(jax.tree.map(_device, leaf))
        del leaf
        gc.collect(0)  # where JAX lets go of the host arrays it has copied
        return moved

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Return rows `first` to before `last` of an array, without reading all of it.

        Of an array that the file codes, the chunks of a million numbers that hold the
        rows are read and checked; others, and leaves, are read whole.

        Raises:
          KeyError: no such name; says the nearest.
          ValueError: rows outside the array.
          FileDamaged: the bytes are not those written.
        """
        node, path = self._find(name)
        shape = self.describe(name)[1]
        if not shape or not 0 <= first <= last <= shape[0]:
            raise ValueError(
                f"{self.path}: rows {first} to {last} of {name}, whose shape is "
                f"{shape}; rows lie between 0 and {shape[0] if shape else 0}"
            )
        if "array" not in node:
            leaf = self.read(name)
            try:
                return np.asarray(dense(leaf)[first:last])
            except ODD as error:
                raise damaged(self.path, f"{name}: {error}") from error
        file = self._file_of(tree_json.join(path))
        return file.read_rows(tree_json.join(path), node["array"], shape, first, last)

    def nbytes(self, name: str) -> int:
        """Return bytes that the arrays of one leaf take in the file."""
        spans = [self._file_of(x).spans[x] for x, _, _ in self._arrays(name)]
        return sum(span.stop - span.start for span in spans)

    def describe(self, name: str) -> tuple[str, tuple[int, ...], str]:
        """Type, dense shape and dense dtype of one leaf, without reading it."""
        node, _ = self._find(name)
        node = node.get("value", node)  # of a box
        if "array" in node:
            return "array", tuple(node["shape"]), node["array"]
        dtype, shape = node.get("dense", ("", ()))
        return node["leaf"], tuple(shape), dtype

    def files(self) -> list[TensorFile]:
        """Return all files, opened and checked against each other."""
        if self._shards is not None:
            for file in sorted(set(self._shards.files.values())):
                self._open(file)
        return list(self._files.values())

    def _find(self, name: str) -> tuple[Any, tree_json.Path]:
        if name not in self._nodes:
            near = nearest(name, self.names)
            raise KeyError(f"{self.path} has no leaf {name!r}; near: {near}")
        node, path = self._nodes[name]
        if "same" in node:
            return self._find(node["same"])
        return node, path

    def _arrays(self, name: str) -> list[tuple[str, str, tuple[int, ...]]]:
        return list(tree_json.arrays(*self._find(name)))

    def _read(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._file_of(name).read(name, dtype, shape)

    def _file_of(self, name: str) -> TensorFile:
        return self._open("" if self._shards is None else self._shards.files[name])

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = self._shards.open(file)
            self._compare(self._files[file])
        return self._files[file]

    def _describe(self, about: Mapping[str, Any], names: set[str]) -> None:
        """Read what describes the tree, and compare it with the arrays."""
        needs = about.get("needs", [])
        if needs:
            raise ValueError(
                f"{self.path} needs {needs!r}, which this jaxcompress does not know; "
                "update it"
            )
        try:
            node = about["tree"]
            self.metadata, self.versions = about["metadata"], about["versions"]
            if type(self.metadata) is not dict or type(self.versions) is not dict:
                raise ValueError("metadata or versions that are no mapping")
            found = list(tree_json.arrays(node))
            self.tree, self._nodes = tree_json.outline(node)
        except FileDamaged as error:
            raise self._in_file(error) from error
        except (LookupError, ValueError, TypeError, RecursionError) as error:
            raise damaged(self.path, f"its metadata lack a tree ({error})") from error
        self.names = list(self._nodes)
        self._wanted = {name: tuple(kind) for name, *kind in found}
        for name in self._wanted.keys() ^ names:
            where = "tree" if name in self._wanted else "file"
            raise damaged(self.path, f"only its {where} has the array {name!r}")
        for file in self._files.values():
            self._compare(file)

    def _compare(self, file: TensorFile) -> None:
        for name, span in file.spans.items():
            if not file.holds(name, *self._wanted[name]):
                raise damaged(
                    file.path,
                    f"{name} is {span.code} {span.shape}, the tree says "
                    f"{self._wanted[name]}",
                )

    def _in_file(self, error: FileDamaged) -> FileDamaged:
        """Return the error with the name of a file; of a shard it has one."""
        text = str(error)
        return error if text.endswith(ADVICE) else damaged(self.path, text)


def versions() -> dict[str, str]:
    """Return versions of the packages that a file names as its writers."""
    found = {"jaxcompress": __version__}
    for package in ("jax", "flax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _device(x: Any) -> Any:
    if isinstance(x, jax.Array) or jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        return x
    return jax.device_put(x)

"""Parameters in a file, read and checked leaf by leaf."""

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.coding.threads import in_groups, of_arrays
from jaxcompress.storage import shards, tree_json
from jaxcompress.storage.checksummed_file import (
    ADVICE,
    TensorFile,
    count_bytes,
    damaged,
)
from jaxcompress.storage.tree_json import ODD, FileDamaged, Slot
from jaxcompress.tree.containers import freeze_at
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.names import nearest
from jaxcompress.types import Params


class Part(NamedTuple):
    """One array of a leaf as a file stores it.

    `name` in the file; dtype and shape of the array; `coding` of section 4 of
    docs/format.md, empty where it is stored plainly; `nbytes` in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    nbytes: int


class StoredParams:
    """Parameters in a file; made by `open_checkpoint`.

    Attributes:
      path: of the file, or of the index of shards.
      names: of the outermost leaves and arrays, in order; "/" and "~" in a key are
        written ~1 and ~0. Those of `models.save` begin with "params/".
      tree: the tree with these names in the places of the leaves.
      metadata: what `save` was given.
      versions: of the packages that wrote the file.

    Example:
      >>> jc.save("small.safetensors", {"kernel": x})
      >>> jc.open_checkpoint("small.safetensors").names
      ['kernel']
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
                    f"{shards.SUFFIX} next to it"
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
        with contextlib.closing(self._decoded(wanted)) as arrays:
            ahead: dict[str, np.ndarray] = {}

            def take(name: str, *_: Any) -> np.ndarray:
                while name not in ahead:
                    ahead.update([next(arrays)])
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
        gc.collect(0)  # where JAX releases the host arrays it has copied
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
                f"{shape}; rows are between 0 and {shape[0] if shape else 0}"
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

    def parts(self, name: str) -> list[Part]:
        """Return the arrays of one leaf as they are stored, without reading them."""
        listed = []
        for array, dtype, shape in self._arrays(name):
            file = self._file_of(array)
            span = file.spans[array]
            coding = file.codings.get(array, "")
            listed.append(Part(array, dtype, shape, coding, span.stop - span.start))
        return listed

    def overhead(self) -> dict[str, int]:
        """Return the bytes of all files that are no parameters, by what they hold."""
        files = self.files()
        arrays = sum(span.stop - span.start for f in files for span in f.spans.values())
        about, seals = (sum(f.own_bytes[i] for f in files) for i in range(2))
        header = sum(file.size for file in files) - arrays - about - seals
        total = {"header": header, "description": about, "checksums": seals}
        return total | ({"index": self.index_bytes} if self._shards else {})

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
            described = list(tree_json.arrays(node))
            self.tree, self._nodes = tree_json.outline(node)
        except FileDamaged as error:
            raise self._in_file(error) from error
        except (LookupError, ValueError, TypeError, RecursionError) as error:
            raise damaged(self.path, f"its metadata lack a tree ({error})") from error
        try:
            self.tree = freeze_at(self.tree, about.get("frozen", []))
        except ODD as error:
            raise damaged(self.path, f"no dict to freeze: {error}") from error
        self.names = list(self._nodes)
        self._wanted = {name: tuple(kind) for name, *kind in described}
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


def _device(x: Any) -> Any:
    if isinstance(x, jax.Array) or jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        return x
    return jax.device_put(x)

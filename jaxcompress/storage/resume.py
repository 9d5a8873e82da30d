"""Results of a long run in a directory, which an interrupted run finds again."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress.storage import checkpoint
from jaxcompress.types import Params


@dataclasses.dataclass(frozen=True)
class Results:
    """A directory of checkpoints, one for each result; None keeps nothing.

    A file is written under another name and renamed, so that a killed run leaves whole
    ones. What a result depends on belongs into its name, or into its metadata, which
    `load` compares.

        parts = Results("parts")
        small = parts.get(f"part-{digest(recipe)}", lambda: compress(params, recipe))
    """

    directory: str | os.PathLike | None
    coding: str = "size"  # as in `save`; "none" for what is read again soon

    def path(self, name: str) -> Path:
        return Path(self.directory or "") / f"{name}.safetensors"

    def load(
        self, name: str, wanted: Mapping[str, Any] | None = None, advice: str = ""
    ) -> tuple[Params, dict[str, Any]] | None:
        """Read a result and its metadata; None where it is not there.

        Args:
          name: of the result.
          wanted: metadata that it must have.
          advice: what to do about a result of something else, for the error.

        Raises:
          ValueError: the metadata are others.
          FileDamaged: the file is not what was written.
        """
        path = self.path(name)
        if self.directory is None or not path.exists():
            return None
        with checkpoint.open_checkpoint(path) as file:
            for key, value in (wanted or {}).items():
                recorded = file.metadata.get(key)
                if recorded != value:
                    raise ValueError(
                        f"{path} was made by another {key} ({recorded!r}) than this "
                        f"one ({value!r}); {advice}"
                    )
            return file.read_tree(), file.metadata

    def save(
        self, name: str, tree: Params, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write a result; makes the directory where it does not exist."""
        if self.directory is None:
            return
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        checkpoint.save(self.path(name), tree, metadata, coding=self.coding)

    def get(self, name: str, compute: Callable[[], Params]) -> Params:
        """Read a result, or compute it and write it."""
        stored = self.load(name)
        if stored is not None:
            return stored[0]
        tree = compute()
        self.save(name, tree)
        return tree


def digest(about: Any, tree: Params = None, *, size: int = 16) -> str:
    """Hash JSON values, and names, dtypes, shapes and bits of a tree's arrays.

    Args:
      about: whatever JSON knows.
      tree: arrays and leaves, in containers that JAX knows.
      size: of the digest in bytes; it has twice as many letters.
    """
    hasher = hashlib.blake2b(json.dumps(about, sort_keys=True).encode())
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(x)
        name = jax.tree_util.keystr(path)
        hasher.update(f"{name} {array.dtype} {array.shape} ".encode())
        hasher.update(array.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()[: 2 * size]

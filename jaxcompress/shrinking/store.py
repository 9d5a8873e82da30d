"""Finished steps of a shrink on disk, by a digest of all that they depend on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import __version__
from jaxcompress.calibration.moments import Moments
from jaxcompress.storage import checkpoint
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.paths import roots


@dataclasses.dataclass(frozen=True)
class Store:
    """A directory of results, one file each; None keeps nothing.

    A file is written beside its place and renamed, so that a killed run leaves whole
    ones; its name has the digest, so that results of other models are never taken.
    """

    directory: str | os.PathLike | None

    def get(self, name: str, about: Any, compute: Callable[[], Any]) -> Any:
        """Return the tree that `compute` returns, read where it was computed before.

        Args:
          name: what it is, the start of the file's name.
          about: JSON values that it depends on.
          compute: the work.
        """
        if self.directory is None:
            return compute()
        path = Path(self.directory) / f"{name}-{digest(about)}.safetensors"
        if path.exists():
            return checkpoint.load(path)
        found = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, found)
        return found

    def get_moments(
        self, name: str, about: Any, compute: Callable[[], Mapping[str, Moments]]
    ) -> dict[str, Moments]:
        """Return stored moments by name, as `get`."""
        stored = self.get(name, about, lambda: _to_tree(compute()))
        return _from_tree(stored)


def digest(about: Any) -> str:
    """Return a short name of JSON values, and of the version that works on them."""
    text = json.dumps([__version__, about], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest_arrays(tree: Any) -> str:
    """Return a digest of names, dtypes, shapes and bits of a tree's arrays."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in roots(tree):
        for x in jax.tree.leaves(value):
            array = np.asarray(x)
            found.update(f"{name} {array.dtype} {array.shape} ".encode())
            found.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return found.hexdigest()


def _to_tree(moments: Mapping[str, Moments]) -> dict[str, Any]:
    tree = {}
    for name, value in moments.items():
        fields = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.name != "layout" and getattr(value, field.name) is not None
        }
        if value.layout is not None:
            axes = [getattr(value.layout, f.name) for f in _axes()]
            text = json.dumps(axes).encode()
            fields["layout"] = np.frombuffer(text, np.uint8)
        tree[name] = fields
    return tree


def _from_tree(tree: Mapping[str, Any]) -> dict[str, Moments]:
    moments = {}
    for name, fields in tree.items():
        fields = dict(fields)
        layout = None
        if "layout" in fields:
            axes = json.loads(np.asarray(fields.pop("layout")).tobytes())
            layout = Layout(*map(tuple, axes))
        arrays = {key: jnp.asarray(x) for key, x in fields.items()}
        moments[name] = Moments(**arrays, layout=layout)
    return moments


def _axes() -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(Layout)

"""Finished steps of a shrink on disk, by a digest of all that they depend on."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress import __version__
from jaxcompress.calibration.moments import Moments
from jaxcompress.storage.resume import Results, digest
from jaxcompress.tree.layouts import Layout


@dataclasses.dataclass(frozen=True)
class Store:
    """Steps in a directory, named by a digest of what they depend on; or nowhere."""

    directory: str | os.PathLike | None

    def get(self, name: str, about: Any, compute: Callable[[], Any]) -> Any:
        """Return the tree that `compute` returns, read where it was computed before.

        Args:
          name: what it is, the start of the file's name.
          about: JSON values that it depends on.
          compute: the work.
        """
        key = digest([__version__, about], size=8)
        return Results(self.directory).get(f"{name}-{key}", compute)

    def get_moments(
        self, name: str, about: Any, compute: Callable[[], Mapping[str, Moments]]
    ) -> dict[str, Moments]:
        """Return stored moments by name, as `get`."""
        stored = self.get(name, about, lambda: _to_tree(compute()))
        return _from_tree(stored)


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

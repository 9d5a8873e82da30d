"""Lazily read parameters: trees whose leaves are fetched when they are used."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.storage import checkpoint
from jaxcompress.storage.resume import digest
from jaxcompress.tree.leaf import is_leaf
from jaxcompress.tree.paths import check_names, roots, shape_of
from jaxcompress.types import LazyParams, Params


class Source(NamedTuple):
    """Leaves by name: `shapes` of the dense arrays, and `fetch(name)` for one of them.

    `tree` has leaves or shapes in their places; `rebuild` puts leaves by name there.
    """

    shapes: dict[str, jax.ShapeDtypeStruct]
    fetch: Callable[[str], Any]
    tree: Params
    rebuild: Callable[[Mapping[str, Any]], Params]

    def digests(self) -> dict[str, str]:
        """Hash each leaf by name: names, dtypes, shapes and bits; one is in memory."""
        return {name: digest(None, self.fetch(name)) for name in self.shapes}


@contextlib.contextmanager
def source_of(params: Params | LazyParams | str | os.PathLike) -> Iterator[Source]:
    """Return the source of a tree, of a path, or of an open checkpoint.

    Where a stored tree is `{"params": ..., ...}` the parameters are meant.
    """
    if isinstance(params, str | os.PathLike):
        with checkpoint.open_checkpoint(params) as file:
            yield _stored(file)
    elif isinstance(params, LazyParams):
        yield _stored(params)
    else:
        named = dict(roots(params))
        check_names([name for name, _ in roots(params)])
        yield Source(
            {name: shape_of(x) for name, x in named.items()},
            named.__getitem__,
            params,
            _rebuilder(params, list(named)),
        )


def _stored(file: LazyParams) -> Source:
    tree = file.tree
    if isinstance(tree, Mapping) and "params" in tree:
        tree = tree["params"]
    names = [name for name, _ in roots(tree)]
    places = dict(zip(names, jax.tree.leaves(tree), strict=True))
    shapes = {}
    for name, place in places.items():
        _, shape, dtype = file.describe(place)
        shapes[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    rebuild = _rebuilder(tree, names)
    return Source(shapes, lambda name: file[places[name]], rebuild(shapes), rebuild)


def _rebuilder(tree: Params, names: list[str]) -> Callable[[Mapping[str, Any]], Params]:
    structure = jax.tree.structure(tree, is_leaf=is_leaf)
    return lambda leaves: jax.tree.unflatten(structure, [leaves[n] for n in names])

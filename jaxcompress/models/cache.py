"""The keys and values that a language model has seen: their length, and more room."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Cache = dict[str, Any]  # as `Transformer.init_cache` makes it


def cache_length(cache: Cache) -> int:
    """Return the number of tokens a cache has room for."""
    layer = cache["layers"] if "layers" in cache else cache["layer_0"]
    return layer["key"].shape[-1]


@functools.partial(jax.jit, static_argnums=1)
def grow_cache(cache: Cache, length: int) -> Cache:
    """Return the same cache with room for so many tokens."""

    def grow(path, x):
        axis = -1 if path[-1].key == "key" else -2
        room = [(0, 0)] * x.ndim
        room[axis] = (0, length - x.shape[axis])
        return jnp.pad(x, room)

    return {
        name: part if name == "index" else jax.tree_util.tree_map_with_path(grow, part)
        for name, part in cache.items()
    }

"""Checks of arguments, worded in one way everywhere."""

from typing import Any

import jax


def check_concrete(params: Any, name: str) -> None:
    """Raise TypeError under a trace."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
        raise TypeError(
            f"{name} reads values on the host, so it can't run under jit, vmap or "
            "scan; plan outside and use the recipe inside"
        )

"""Checks of arguments, worded in one way everywhere: they name the method."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_concrete(params: Any, name: str) -> None:
    """Raise TypeError under a trace."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(params)):
        raise TypeError(
            f"{name} reads values on the host, so it can't run under jit, vmap or "
            "scan; plan outside and use the recipe inside"
        )


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer; booleans are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite real number; booleans are none."""
    if isinstance(value, jax.Array) and not isinstance(value, Tracer):
        value = np.asarray(value)[()]  # a scalar where there are no axes
    real = isinstance(value, int | float | np.integer | np.floating)
    return real and not isinstance(value, bool) and math.isfinite(value)


def integer(
    method: str, option: str, value: Any, *, least: int = 1, most: int | None = None
) -> None:
    """Raise ValueError where an option is not an integer from `least` to `most`."""
    if not is_integer(value) or value < least or (most is not None and value > most):
        reach = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{method} takes an integer {option} {reach}, not {value!r}")


def fraction(
    method: str, option: str, value: Any, *, zero: bool = False, one: bool = False
) -> None:
    """Raise ValueError where an option is not a number between 0 and 1.

    Args:
      method, option, value: for the message.
      zero, one: whether these are allowed, too.
    """
    inside = is_number(value) and 0 <= value <= 1
    if not inside or (value == 0 and not zero) or (value == 1 and not one):
        low = "at least 0" if zero else "above 0"
        high = "at most 1" if one else "below 1"
        raise ValueError(f"{method} takes {option} {low} and {high}, not {value!r}")


def positive(method: str, option: str, value: Any, *, zero: bool = False) -> None:
    """Raise ValueError where an option is not a finite number above 0 (or of 0)."""
    if not is_number(value) or value < 0 or (value == 0 and not zero):
        reach = "of 0 or more" if zero else "above 0"
        raise ValueError(f"{method} takes {option} {reach}, not {value!r}")


def one_of(method: str, option: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError where an option is none of those allowed."""
    allowed = list(allowed)
    if value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise ValueError(f"{method} takes {option}={choices}, not {value!r}")


def weights(method: str, x: jax.Array, *, outputs: bool = True) -> None:
    """Raise where an array is not floating-point `[..., inputs, outputs]`.

    Args:
      method, x: for the message; the array.
      outputs: there must be some, as there must be inputs.

    Raises:
      TypeError: another dtype.
      ValueError: fewer than two axes, or no inputs.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{method} takes floating-point weights, not {x.dtype}")
    if x.ndim < 2 or not x.shape[-2] or (outputs and not x.size):
        raise ValueError(
            f"{method} takes weights [..., inputs, outputs] of one input or more, not "
            f"shape {x.shape}; reshape a vector to [inputs, 1]"
        )

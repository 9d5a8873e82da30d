"""Leaves as `flax.serialization` writes and reads them: state dicts of their arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import serialization


def register_state_dict(cls: type) -> None:
    """Let `flax.serialization` write and read the arrays of a leaf type.

    Static fields are those of the target that is read into.
    """
    serialization.register_serialization_state(
        cls, _state_dict, _from_state_dict, override=True
    )


def _names(x: Any) -> list[str]:
    fields = dataclasses.fields(x)
    return [field.name for field in fields if not field.metadata.get("static")]


def _state_dict(x: Any) -> dict[str, Any]:
    return {name: serialization.to_state_dict(getattr(x, name)) for name in _names(x)}


def _from_state_dict(target: Any, state: Mapping[str, Any]) -> Any:
    """Return `target` with the arrays of a state dict; ValueError on other fields."""
    names = _names(target)
    if set(state) != set(names):
        raise ValueError(
            f"the state has {sorted(state)}, a {type(target).__name__} has "
            f"{sorted(names)}; compress the target by the same recipe"
        )
    parts = {
        name: serialization.from_state_dict(getattr(target, name), state[name], name)
        for name in names
    }
    return dataclasses.replace(target, **parts)

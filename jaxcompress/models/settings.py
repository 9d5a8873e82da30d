"""Tables of settings: what each key of a foreign configuration does to the model.

A loader that skips keys it does not know computes another model than the file
describes. Every family and every GGUF architecture has one table instead, and a key in
no table is refused by name.
"""

import dataclasses
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of a table.

    Attributes:
      effect: "affects" (the loader reads it), "harmless" (logits do not depend on it),
        or "refused" (only the values in `only` leave the model as it is).
      only: values that are accepted where `effect` is "refused".
      reason: what another value would do.
      alternative: changes to a configuration under which this key alters the logits;
        the tests compare them with the reference implementation's.
      like: name of the recorded case that has these logits, where it is another's.
    """

    effect: str
    only: tuple[Any, ...] = ()
    reason: str = ""
    alternative: Mapping[str, Any] | None = None
    like: str = ""


Table = Mapping[str, Setting]

# Numbers whose recorded alternative happens to be whole.
_FRACTIONS = ("query_pre_attn_scalar",)

HARMLESS = Setting("harmless")


def affects(**alternative: Any) -> Setting:
    """Mark a key that the loader reads, with the recorded alternative."""
    return Setting("affects", alternative=alternative)


def only(*values: Any, reason: str) -> Setting:
    """Mark a key of which no other value is supported; null counts as absent."""
    return Setting("refused", only=values, reason=reason)


def harmless(keys: str) -> dict[str, Setting]:
    """Mark several keys, separated by spaces, as harmless."""
    return dict.fromkeys(keys.split(), HARMLESS)


def check(
    settings: Mapping[str, Any],
    table: Table,
    *,
    of: str,
    source: str,
    ignore: Collection[str] = (),
) -> None:
    """Raise on a key in no table, and on a value that is not supported or of another
    type than the recorded one.

    Args:
      settings: keys and values of the configuration.
      table: of the family.
      of: name of the family, for the message.
      source: the file, for the message.
      ignore: keys to pass over unread.

    Raises:
      ValueError: naming every such key, its value and what to do.
    """
    unknown, refused = [], []
    for key, value in settings.items():
        if key in ignore or value is None:
            continue
        setting = table.get(key)
        if setting is None:
            unknown.append(key)
        elif wanted := _wanted(key, value, setting):
            refused.append(f"{key} is {_short(value)}: {wanted} is wanted")
        elif setting.effect == "refused" and not _among(value, setting.only):
            refused.append(f"{key} is {_short(value)}: {setting.reason}")
    if unknown:
        named = ", ".join(f"{key} = {_short(settings[key])}" for key in unknown)
        raise ValueError(
            f"{source}: {named}: not known for {of}, and it may change what the model "
            "computes. Where you know that it does not, pass it over: "
            f"load(..., ignore={tuple(unknown)!r})"
        )
    if refused:
        raise ValueError(f"{source} ({of}): " + "; ".join(refused))


def _wanted(key: str, value: Any, setting: Setting) -> str:
    """Return what a value should be, by the recorded alternative; empty if it is."""
    alternative = setting.alternative or {}
    example: Any = alternative.get(key)
    for inner in alternative.values():
        if example is None and isinstance(inner, Mapping):
            example = inner.get(key)
            is_int = isinstance(example, int) and not isinstance(example, bool)
            example = float(example) if is_int else example
    is_bool = isinstance(value, bool | np.bool_)
    if isinstance(example, bool):
        return "" if is_bool else "true or false"
    if isinstance(example, str):
        return "" if isinstance(value, str) else "a name"
    if isinstance(example, Mapping):
        return "" if isinstance(value, Mapping) else "an object"
    if isinstance(example, list):
        return "" if isinstance(value, list | tuple) else "a list"
    if isinstance(example, float) or key in _FRACTIONS:
        return "" if isinstance(value, numbers.Real) and not is_bool else "a number"
    if isinstance(example, int):
        whole = isinstance(value, numbers.Integral) and not is_bool
        return "" if whole else "a whole number"
    return ""


def agree(spellings: Iterable[tuple[str, Any]], *, source: str) -> Any:
    """Return the one value of a setting that has several spellings, or None.

    Raises ValueError where two of them differ.
    """
    values = [(name, value) for name, value in spellings if value is not None]
    for name, value in values[1:]:
        if value != values[0][1]:
            raise ValueError(
                f"{source} has two spellings of one setting, and they differ: "
                f"{values[0][0]} = {_short(values[0][1])}, {name} = {_short(value)}. "
                "Remove the wrong one from the file"
            )
    return values[0][1] if values else None


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(
        value == x and isinstance(value, bool) == isinstance(x, bool) for x in values
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

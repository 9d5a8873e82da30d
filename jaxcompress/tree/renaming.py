"""Trees of parameters under the names and in the shapes of another program."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcompress.tree.leaf import is_leaf
from jaxcompress.tree.names import nearest
from jaxcompress.tree.paths import key_name
from jaxcompress.types import Params

Source = str | tuple[Any, ...]  # a name, or names and a function of their values

_SHOWN = 5  # names in an error message


def rename(
    params: Params, names: Mapping[str, Source], *, drop: str | None = None
) -> Params:
    """Rename, split, join and reshape parameters by a map of names.

    The map lists every parameter of the result. `{}` means a number, such as that
    of a layer, which both names have.

    Args:
      params: pytree of arrays and leaves; a name joins the keys of a path by "/".
      names: new name to old name; or to old names followed by a function that takes
        their values and returns the new one. An old name may be used several times.
      drop: a pattern on old names; those that it fully matches may stay unused.

    Returns:
      Nested dicts, one for each "/" of the new names.

    Raises:
      ValueError: an old name that `params` lack, one that nothing uses, a new name that
        two entries give, or one that is also the path to another.

    Example:
      >>> names = {"layers/{}/up": ("layer_{}/mlp/up_proj/kernel", lambda w: w.T)}
      >>> renamed = jc.tree.rename(params, names, drop=".*")
      >>> renamed["layers"]["1"]["up"].shape
      (64, 64)
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    old = {"/".join(key_name(key) for key in path): value for path, value in flat}
    new: dict[str, Any] = {}
    used: set[str] = set()
    for template, source in names.items():
        sources, function = _parts(template, source)
        for numbers in _numbers(template, sources[0], old):
            taken = [_filled(name, numbers) for name in sources]
            if missing := [name for name in taken if name not in old]:
                raise ValueError(_lacking(template, missing[0], old))
            used.update(taken)
            name = _filled(template, numbers)
            if name in new:
                raise ValueError(f"two entries of names give {name}; keep one")
            values = [old[name] for name in taken]
            new[name] = values[0] if function is None else function(*values)
    unused = [
        name
        for name in old
        if name not in used and not (drop is not None and re.fullmatch(drop, name))
    ]
    if unused:
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        raise ValueError(
            f"nothing in names uses {', '.join(unused[:_SHOWN])}{more}; add them, or "
            "pass drop= with a pattern that matches them"
        )
    return _nested(new)


def _parts(template: str, source: Source) -> tuple[list[str], Callable | None]:
    """Return the old names of an entry and its function; check them."""
    *sources, last = (source,) if isinstance(source, str) else source
    function = None if isinstance(last, str) else last
    sources = [*sources, last] if function is None else sources
    is_function = function is None or callable(function)
    if not is_function or not sources or (function is None and len(sources) > 1):
        raise ValueError(
            f"{template}: {source!r} must be an old name, or old names followed by a "
            "function of their values"
        )
    counts = {name: name.count("{}") for name in (template, *sources)}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{template}: the names of an entry need as many {{}} as each other, not "
            + ", ".join(f"{name} {count}" for name, count in counts.items())
        )
    return sources, function


def _numbers(
    template: str, source: str, old: Mapping[str, Any]
) -> list[tuple[int, ...]]:
    """Return the numbers of `{}` in old names, in order.

    Raises ValueError where no old name matches.
    """
    pattern = r"(\d+)".join(re.escape(part) for part in source.split("{}"))
    matches = [re.fullmatch(pattern, name) for name in old]
    numbers = sorted(tuple(map(int, m.groups())) for m in matches if m)
    if not numbers:
        raise ValueError(_lacking(template, source, old))
    return numbers


def _filled(template: str, numbers: tuple[int, ...]) -> str:
    first, *rest = template.split("{}")
    return first + "".join(f"{n}{x}" for n, x in zip(numbers, rest, strict=True))


def _lacking(template: str, name: str, old: Mapping[str, Any]) -> str:
    return (
        f"{template}: params have no {name}; the nearest of their names are "
        f"{nearest(name, old)}"
    )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return names joined by "/" as dicts in dicts."""
    root: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        inner = root
        for step in path:
            inner = inner.setdefault(step, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or last in inner:
            raise ValueError(f"{name} is also the path to another name; rename one")
        inner[last] = value
    return root

"""Which method a recipe chooses for each leaf, and why it leaves others alone."""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from jaxcompress.tree.layouts import suggestion
from jaxcompress.tree.leaf import Leaf
from jaxcompress.tree.methods import describe, parse, traits
from jaxcompress.tree.paths import Entry, check_names, entries, is_float
from jaxcompress.types import Method, Params

SMALLEST = 4096  # elements; below it a kernel is not worth a method by default


def choose(
    params: Params, stage: Any, *, part: bool = False, traced: Collection[str] = ()
) -> tuple[dict[str, Method], dict[str, str]]:
    """Return the method of each selected entry, and why each other entry is left alone.

    By default a method takes the weights that are `traced`, and those known by name.
    Raises ValueError where the stage says something of leaves that are not there,
    unless `params` are a `part` of a tree.
    """
    found = entries(params, traced=traced)
    check_names([entry.name for entry in found])
    choices: dict[str, Method] = {}
    why: dict[str, str] = {}
    if isinstance(stage, str) or callable(stage):
        f = parse(stage) if isinstance(stage, str) else stage
        for entry in found:
            why[entry.name] = _refused(entry, traits(f).selects, traced)
            if not why[entry.name]:
                choices[entry.name] = f
        if not choices and not part and traits(f).selects == "weights":
            reasons = ", ".join(f"{name} ({why[name]})" for name in list(why)[:3])
            raise ValueError(
                f"{describe(f)} takes no leaf of this tree by default: {reasons}, ...; "
                "name the leaves with a list of (pattern, method)"
            )
        return choices, why
    if not isinstance(stage, list | tuple):
        raise ValueError(
            f"{stage!r} is not a recipe; give a method, its string, a list of "
            "(pattern, method) or a chain of these"
        )
    names = [entry.name for entry in found]
    rules = [_rule(rule) for rule in stage]
    for pattern, _ in rules:
        if not part and not any(pattern.fullmatch(name) for name in names):
            near = difflib.get_close_matches(pattern.pattern, names, n=3, cutoff=0.0)
            raise ValueError(
                f"the pattern {pattern.pattern!r} matches no leaf; the nearest names "
                f"are {', '.join(near)}. leaf_names(params) lists all {len(names)}"
            )
    for name in names:
        why[name] = "no rule matches it"
        for pattern, f in rules:
            if pattern.fullmatch(name):
                why[name] = f"kept by the rule {pattern.pattern!r}"
                if f is not None:
                    choices[name] = f
                break
    return choices, why


def _rule(rule: Any) -> tuple[re.Pattern[str], Method | None]:
    if not isinstance(rule, tuple | list) or len(rule) != 2:
        raise ValueError(
            f"{rule!r} is not a rule; write (pattern, method), (pattern, string) or "
            "(pattern, None)"
        )
    pattern, f = rule
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a pattern: {error}") from error
    if not (f is None or isinstance(f, str) or callable(f)):
        raise ValueError(f"{pattern!r}: {f!r} is not a method, a string or None")
    if not isinstance(f, str):
        return compiled, f
    try:
        return compiled, parse(f)
    except ValueError as error:
        raise ValueError(f"the rule of {pattern!r}: {error}") from error


def _refused(entry: Entry, selects: str, traced: Collection[str]) -> str:
    """Return why a method leaves an entry alone by default; empty where it takes it."""
    if selects == "codes":
        whole = jnp.issubdtype(entry.value.dtype, jnp.integer) and entry.depth > 0
        coded = isinstance(entry.value, Leaf) and entry.value.entropy_coded
        return "" if whole and not coded else "not integer codes inside a leaf"
    if not is_float(entry.value):
        return "not floating point"
    if selects == "floats":
        return "" if not isinstance(entry.value, Leaf) else "coded already"
    if not entry.weight:
        return "not a kernel or an embedding"
    if entry.value.ndim < 2 or entry.value.size < SMALLEST:
        return f"fewer than {SMALLEST} weights"
    if traced and entry.root not in traced and not entry.depth and entry.value.ndim > 2:
        return f"not seen in the trace; {suggestion(entry.name, entry.value.shape)}"
    return ""


def with_data(
    params: Params,
    choices: Mapping[str, Method],
    moments: Mapping[str, Any] | None,
    instead: dict[str, str],
) -> dict[str, Method]:
    """Return the choices, of methods that their leaf's moments suffice for.

    Of an embedding that is only looked up moments know no inputs. `instead` takes note
    of why a leaf's method was replaced, by the name of the outermost leaf.
    """
    changed = dict(choices)
    for entry in entries(params, moments):
        if entry.name not in choices or not getattr(entry.moments, "looked_up", False):
            continue
        f = choices[entry.name]
        rule = traits(f).without_data
        if rule is not None and describe(rule) != describe(f):
            changed[entry.name] = rule
            instead[entry.root] = (
                f"only looked up, no inputs that {describe(f)} could go by: took "
                f"{describe(rule)}"
            )
    return changed


def _weight(x: Any, moments: Any = None) -> Any:
    """Return a method that changes nothing; what it takes by default is what is
    planned.
    """
    del moments
    return x


def planned_entries(
    params: Params, moments: Any, where: str | None, layouts: Any = None
) -> list[Entry]:
    """Return the leaves whose names the pattern matches, or that a method takes by
    default.
    """
    traced = {*(layouts or {}), *(moments or {})}
    stage = _weight if where is None else [(where, _weight)]
    chosen, _ = choose(params, stage, traced=traced)
    found = entries(params, moments, traced)
    return [entry for entry in found if entry.name in chosen]

"""Selection: the method that a recipe chooses for each leaf, or why it chooses none."""

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress.tree.layouts import Layout, suggestion
from jaxcompress.tree.leaf import Leaf
from jaxcompress.tree.methods import describe, parse, traits
from jaxcompress.tree.names import match
from jaxcompress.tree.paths import Entry, check_names, entries, is_float
from jaxcompress.types import Method, Params

SMALLEST = 4096  # elements; no method takes a smaller kernel by default


class Choices(NamedTuple):
    """A stage of a recipe, bound to the leaves of a tree.

    Args:
      entries: of the tree, in order.
      methods: of the selected ones, by name.
      reasons: why the others are left alone, by name.
      instead: why a leaf takes another method, by the name of the outermost leaf.
    """

    entries: list[Entry]
    methods: dict[str, Method]
    reasons: dict[str, str]
    instead: dict[str, str]

    @property
    def selected(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.name in self.methods]


def bind(
    params: Params,
    stage: Any,
    moments: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    *,
    part: bool = False,
    spare: bool = False,
    traced: Collection[str] = (),
) -> Choices:
    """Bind one stage of a recipe to a tree: a method for each leaf, or a reason.

    By default a method takes the weights that `moments` or `layouts` name, and those
    known by name. Of these, embeddings that are only looked up take a method that needs
    no data.

    Args:
      params: the tree; shapes are enough.
      stage: a method, its string, or rules.
      moments, layouts: by name.
      part: `params` are a part of a tree, which may lack what the stage names.
      spare: what has no moments is not used by the model, or not in a way that a trace
        follows: it takes a method that needs no data too, with a warning.
      traced: names that count as those of layouts do.

    Raises:
      ValueError: the stage is no recipe, or names leaves that are not there.
    """
    candidates = entries(params, moments, layouts)
    check_names([entry.name for entry in candidates])
    if isinstance(stage, str) or callable(stage):
        f = parse(stage) if isinstance(stage, str) else stage
        seen = {*(moments or {}), *(layouts or {}), *traced}
        bound = _bind_method(f, candidates, seen, part)
        return _spare_unseen(bound) if spare else bound
    if not isinstance(stage, list | tuple):
        raise ValueError(
            f"{stage!r} is not a recipe; give a method, its string, a list of "
            "(pattern, method) or a chain of these"
        )
    bound = _bind_rules([_rule(rule) for rule in stage], candidates, part)
    return _spare_unseen(bound) if spare else bound


def _bind_method(
    f: Method, candidates: list[Entry], traced: Collection[str], part: bool
) -> Choices:
    """Bind one method, which takes leaves by default."""
    kind, result = traits(f), Choices(candidates, {}, {}, {})
    for entry in candidates:
        why = _refused(entry, kind.selects, traced)
        result.reasons[entry.name] = why
        if why:
            continue
        result.methods[entry.name] = f
        rule = kind.without_data
        only_looked_up = getattr(entry.moments, "looked_up", False)
        if only_looked_up and rule is not None and describe(rule) != describe(f):
            result.methods[entry.name] = rule
            result.instead[entry.root] = (
                f"only looked up, no inputs that {describe(f)} could go by: took "
                f"{describe(rule)}"
            )
    if not result.methods and not part and kind.selects == "weights":
        if not candidates:
            raise ValueError(
                "the tree has no arrays; pass the parameters, as "
                'model.init(...)["params"] or params_of(module)'
            )
        if any(entry.depth for entry in candidates):
            raise ValueError(
                f"{describe(f)} takes no leaf of this tree by default: its weights are "
                "compressed already. Compress the dense tree, or materialize(params); "
                "to compress parts of leaves, name them by (pattern, method), as "
                f"({next(e.name for e in candidates if e.depth)!r}, ...)"
            )
        some = list(result.reasons.items())[:3]
        reasons = ", ".join(f"{name} ({why})" for name, why in some)
        raise ValueError(
            f"{describe(f)} takes no leaf of this tree by default: {reasons}, ...; "
            "pass layouts=find_layouts(model, params, batch), or name the leaves with "
            "a list of (pattern, method)"
        )
    return result


def _spare_unseen(bound: Choices) -> Choices:
    """Give leaves without moments methods that need none, and warn of them."""
    unseen = []
    for entry in bound.selected:
        f = bound.methods[entry.name]
        rule = traits(f).without_data
        if rule is None or describe(rule) == describe(f):
            continue
        if entry.moments is not None or entry.depth:
            continue
        unseen.append(entry.name)
        bound.methods[entry.name] = rule
        bound.instead[entry.root] = (
            f"its inputs were not seen, which {describe(f)} goes by: took "
            f"{describe(rule)}"
        )
    if unseen:
        warnings.warn(
            f"{', '.join(unseen[:5])}{', ...' if len(unseen) > 5 else ''}: not used by "
            "the model on these batches, or not by a product that the trace follows; "
            f"compressed without data, by {describe(bound.methods[unseen[0]])}. Keep "
            "them by rules (pattern, None), or pass batches that reach them",
            stacklevel=4,
        )
    return bound


def _bind_rules(
    rules: list[tuple[re.Pattern[str], Method | None]],
    candidates: list[Entry],
    part: bool,
) -> Choices:
    """Bind rules: of each leaf the first whose pattern fully matches its name."""
    names = [entry.name for entry in candidates]
    for pattern, _ in rules:
        if not part:
            match(pattern, names)
    result = Choices(candidates, {}, {}, {})
    for name in names:
        result.reasons[name] = "no rule matches it"
        for pattern, f in rules:
            if pattern.fullmatch(name):
                result.reasons[name] = f"kept by the rule {pattern.pattern!r}"
                if f is not None:
                    result.methods[name] = f
                break
    return result


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


def _weight(x: Any, moments: Any = None) -> Any:
    """Return a method that changes nothing; what it takes by default is what is
    planned.
    """
    del moments
    return x


def planned_entries(
    params: Params,
    moments: Mapping[str, Any] | None,
    where: str | None,
    layouts: Mapping[str, Layout] | None = None,
) -> list[Entry]:
    """Return the leaves whose names the pattern matches, or that a method takes by
    default.
    """
    stage = _weight if where is None else [(where, _weight)]
    return bind(params, stage, moments, layouts).selected

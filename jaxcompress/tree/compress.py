"""`compress`: a recipe decides which method takes which leaf."""

import dataclasses
import functools
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcompress.progress import each_item
from jaxcompress.tree.equality import share
from jaxcompress.tree.layouts import Layout, suggestion, with_layout
from jaxcompress.tree.leaf import Leaf, dense, is_box, is_leaf, nbytes
from jaxcompress.tree.methods import describe, traits, unwrap, with_default
from jaxcompress.tree.names import nearest
from jaxcompress.tree.paths import (
    Entry,
    is_float,
    key_name,
    map_entries,
    roots,
)
from jaxcompress.tree.record import LeafReport, leaf_reports
from jaxcompress.tree.selection import SMALLEST, Choices, bind
from jaxcompress.types import Method, Params, Progress, Recipe

NAMED = 0.01  # of all bytes: what is left alone and larger is named in a warning


@dataclasses.dataclass(frozen=True)
class Chain:
    """Recipes applied one after the other; names are recomputed after each."""

    stages: tuple[Any, ...]


def chain(*stages: Any) -> Chain:
    """Chain recipes: each stage compresses what the stage before it left.

    After `svd`, for one, the names `mlp/kernel/left` and `mlp/kernel/right` replace
    `mlp/kernel`.

    Args:
      stages: recipes, over the names that the stage before leaves.

    Returns:
      A recipe.

    Example:
      >>> factors = [(".*(left|right)", "symmetric(bits=4, block=32)")]
      >>> recipe = jc.chain("svd(rank=16)", factors)
      >>> small = jc.compress(params, recipe)
    """
    flat: list[Any] = []
    for stage in stages:
        flat.extend(stage.stages if isinstance(stage, Chain) else [stage])
    return Chain(tuple(flat))


def compress(
    params: Params,
    recipe: Recipe,
    moments: Mapping[str, Any] | None = None,
    *,
    layouts: Mapping[str, Layout] | None = None,
    record: list[LeafReport] | None = None,
    progress: Progress = False,
    part: bool = False,
    traced: Collection[str] = (),
) -> Params:
    """Replace the leaves that a recipe selects by what its methods return.

    Pure, and traceable where its methods are. Leaves that no rule selects are the
    identical arrays. One compilation serves all leaves of one shape.

    Args:
      params: pytree of arrays and leaves, nested dicts as Flax makes them.
      recipe: a method (`symmetric(bits=4)`), or its string, for the leaves it takes by
        default (those of `layouts` and `moments`, and those called "kernel" or
        "embedding", of 4 096 weights or more); or an ordered list of `(pattern,
        method | string | None)`: the first pattern that fully matches a leaf's name
        (`leaf_names`) decides, None keeps it; or a `chain` of recipes. An embedding
        that is only looked up has no inputs: where one method that needs them
        is the recipe, such a leaf takes a rule of the same width without data, and the
        report says so.
      moments: `Moments` by kernel name, for methods that need them.
      layouts: `Layout` by kernel name, from `find_layouts(model, params, batch)`. By
        default that under which the moments were collected, and of a matrix the one
        that its name suggests. Kernels of more than two axes need one of the two.
      record: a list that takes a `LeafReport` per leaf, reasons included. Not under a
        trace: errors are numbers.
      progress: True for a bar, or what wraps the list of names that a stage works on,
        such as `tqdm.tqdm`.
      part: `params` are a part of a larger tree: what the recipe says of leaves that
        are not there is left out, and leaves without moments take rules without data.
      traced: names that count as seen by a trace, with those of layouts and moments.

    Returns:
        The tree, with a leaf type in place of each selected array. One array under
        several names stays one where the results are equal.

    Warns of large leaves that a method leaves alone by default, with their share of
    the bytes.

    Raises:
      ValueError: a pattern that matches nothing, an unknown method or option, a kernel
        whose layout is unknown or contradicts the moments', NaN or Inf in a selected
        weight or its moments, moments of another model, two leaves of one name; names
        the leaf.
      TypeError: a host method under a trace, a `TrainState`.

    Example:
      >>> small = jc.compress(params, "symmetric(bits=4, block=64)")
      >>> rules = [(".*embedding", None), (".*kernel", "gptq(bits=4, block=64)")]
      >>> small = jc.compress(params, rules, moments)
    """
    layouts = layouts or {}
    _check_moments(params, moments)
    _check_layouts(params, layouts)
    done: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    instead: dict[str, str] = {}
    small = params
    for number, stage in enumerate(chain(recipe).stages):
        bound = bind(
            small, stage, moments, layouts, part=part, spare=part, traced=traced
        )
        if not part and not number and (isinstance(stage, str) or callable(stage)):
            _name_large(small, bound, {*layouts, *(moments or {})})
        small = _run(small, bound, moments, layouts, progress, done, reasons)
        instead |= bound.instead
    small = share(params, small)
    _check_boxes(small)
    if record is not None:
        record += leaf_reports(params, small, done, reasons, moments, layouts, instead)
    return small


def _check_boxes(params: Params) -> None:
    """Raise ValueError where a box of Flax would hide a stack axis from its leaf.

    `scan` asks the outermost box alone to remove an axis.
    """
    for path, x in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)[0]:
        if is_box(x) and getattr(x.value, "stack", ()):
            name = "/".join(map(key_name, path))
            raise ValueError(
                f"{name}: a {type(x).__name__} around a weight stacked along "
                f"axes {x.value.stack}; remove Flax's boxes first, by jc.tree.unbox"
            )


def _check_moments(params: Params, moments: Mapping[str, Any] | None) -> None:
    """Raise ValueError where none of the moments is of a leaf of this tree."""
    tree_names = [name for name, _ in roots(params)]
    if moments and not moments.keys() & set(tree_names):
        name = next(iter(moments))
        raise ValueError(
            f"the moments are of another model: they name {name!r} and "
            f"{len(moments) - 1} others, none of which this tree has; the nearest of "
            f"its names are {nearest(name, tree_names)}. Collect them with this model"
        )


def _check_layouts(params: Params, layouts: Mapping[str, Layout]) -> None:
    """Raise ValueError where a layout is of no leaf of this tree."""
    for name in layouts.keys() - {name for name, _ in roots(params)}:
        raise ValueError(
            f"the layout names {name!r}, which the tree does not have; "
            "make it from the same parameters"
        )


def _run(
    params: Params,
    bound: Choices,
    moments: Mapping[str, Any] | None,
    layouts: Mapping[str, Layout],
    progress: Progress,
    done: dict[str, list[str]],
    reasons: dict[str, str],
) -> Params:
    turns = iter(each_item(list(bound.methods), progress, label="compressing"))

    def replace(entry: Entry) -> Any:
        f = bound.methods.get(entry.name)
        if f is None:
            reasons.setdefault(entry.root, bound.reasons[entry.name])
            return entry.value
        next(turns, None)
        try:
            new = _apply(f, entry)
        except (ValueError, TypeError) as error:
            message = str(error)
            if message.startswith(entry.name):
                raise
            if hasattr(entry.moments, "mask") and "got none" in message:
                message = (
                    f"{describe(f)} cannot use moments after pruning; gptq and "
                    "rate_distortion can, and methods without data need none"
                )
            # JAX's own errors are made of tracers, not of a message.
            raised = TypeError if isinstance(error, TypeError) else ValueError
            raise raised(f"{entry.name}: {message}") from error
        if _gains_nothing(f, entry.value, new):
            reasons.setdefault(entry.root, f"{describe(f)} makes it no smaller")
            return entry.value
        done.setdefault(entry.root, []).append(describe(f))
        return new

    small = map_entries(replace, params, moments, layouts)
    for _ in turns:
        pass
    for name, methods in done.items():
        done[name] = list(dict.fromkeys(methods))
    return small


def _name_large(params: Params, bound: Choices, traced: Collection[str]) -> None:
    """Warn of large leaves that a method leaves alone by default."""
    if not bound.methods:
        return
    f = next(iter(bound.methods.values()))
    left = {
        entry.name: entry.value
        for entry in bound.entries
        if not entry.depth
        and entry.name not in bound.methods
        and is_float(entry.value)
        and not isinstance(entry.value, Leaf)
        and entry.value.ndim > 1
        and entry.value.size >= SMALLEST
    }
    share = nbytes(left) / max(1, nbytes(params))
    if traits(f).selects != "weights" or share < NAMED:
        return
    names = ", ".join(list(left)[:5]) + (", ..." if len(left) > 5 else "")
    name, first = max(left.items(), key=lambda item: item[1].size)
    advice = (
        "Without a trace only leaves called kernel or embedding are taken; pass "
        "layouts=find_layouts(model, params, batch), or a list of (pattern, method)"
    )
    if traced:
        advice = (
            "Neither layouts nor moments name them; if one is a weight, add "
            f"{suggestion(name, first.shape)}"
        )
    warnings.warn(
        f"{describe(f)} leaves {share:.0%} of the bytes alone: {names}. {advice}",
        stacklevel=3,
    )


def _apply(f: Method, entry: Entry) -> Any:
    x = dense(entry.value)
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(
            "a shape without values; jax.eval_shape(lambda params: compress(params, "
            "recipe), params) gives the shapes of the result"
        )
    if traits(f).selects != "weights":
        layout_of_leaf = entry.caller_layout or getattr(entry.moments, "layout", None)
        stack = entry.stack
        if layout_of_leaf is not None and not entry.depth:
            stack = x.ndim - len(layout_of_leaf.inputs) - len(layout_of_leaf.outputs)
        return _call(with_default(f, "stack", stack), x, entry.moments)
    if not is_float(x):
        raise ValueError(
            f"{describe(f)} takes floating-point weights, this is {x.dtype}; "
            "narrow the pattern, or put (pattern, None) before it"
        )
    _check_finite(x)
    moments = entry.moments if traits(f).data else None
    if hasattr(moments, "mask") and not traits(f).masked:
        moments = None  # as the weights that stay are no matrix of inputs any more
    if moments is not None and hasattr(moments, "checked"):
        moments = moments.checked(entry.name)
    matrix = entry.matrix(x)
    # Without the layout, so that equal shapes share a compilation.
    return entry.restore(_call(f, matrix, with_layout(moments, None)))


def _gains_nothing(f: Method, old: Any, new: Any) -> bool:
    """Return whether a lossless method saves no memory: it gave `old` back, or a larger
    leaf.

    Where `old` is packed already, a method sees its codes one to an array element.
    """
    if traits(f).selects == "weights":
        return False
    if isinstance(new, Leaf):
        return new.lossless and nbytes(new) >= nbytes(old)
    return new is old or isinstance(old, Leaf)


def _call(f: Method, x: jax.Array, moments: Any) -> Any:
    if not traits(f).traceable:
        return f(x, moments)
    f, options = unwrap(f)
    try:
        hash(key := tuple(sorted(options.items())))
    except TypeError:
        return f(x, moments, **options)
    return _jitted(x, moments, f, key)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _jitted(x: jax.Array, moments: Any, f: Method, options: tuple) -> Any:
    return f(x, moments, **dict(options))


def _check_finite(x: jax.Array) -> None:
    bad = _count_bad(x)
    if isinstance(bad, Tracer):  # of a constant too, while a function is traced
        return
    if bad := int(bad):
        raise ValueError(
            f"{bad} of {x.size} weights are NaN or infinite; repair the checkpoint, or "
            "keep this leaf with a rule (pattern, None)"
        )


@jax.jit
def _count_bad(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)


def is_compressed(params: Params) -> bool:
    """Return whether any leaf of the tree is a leaf type."""
    return any(map(is_leaf, jax.tree.leaves(params, is_leaf=is_leaf)))

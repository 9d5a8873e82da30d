"""Flax's containers of parameters: `FrozenDict` is kept, a training state refused."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax.core import FrozenDict, freeze, unfreeze

Steps = tuple[str | int, ...]

# What an object or dict with "params" has besides where it is a state of training.
_OF_TRAINING = ("opt_state", "optimizer_state", "optimizer", "tx")


def check_tree(params: Any) -> None:
    """Raise TypeError for a state of training, whose optimizer holds kernels too."""
    if isinstance(params, Mapping):
        training = "params" in params and any(key in params for key in _OF_TRAINING)
        pick, back = 'state["params"]', '{**state, "params": ...}'
    else:
        training = hasattr(params, "params")
        training = training and any(hasattr(params, key) for key in _OF_TRAINING)
        pick, back = "state.params", "state.replace(params=...)"
    if training:
        raise TypeError(
            f"a {type(params).__name__} with an optimizer's state is not a tree of "
            "parameters: the optimizer holds arrays of the same names. Pass "
            f"{pick}, and put the result back by {back}"
        )


def frozen_paths(tree: Any, *, within: bool = False) -> list[Steps]:
    """List paths of the `FrozenDict`s of a tree; dicts in them are frozen with them.

    `within`: the tree is a value of one, and no list or tuple is between.
    """
    frozen = isinstance(tree, FrozenDict)
    items: Any = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif type(tree) in (list, tuple):
        items = enumerate(tree)
    own: list[Steps] = [()] if frozen and not within else []
    return own + [
        (key, *path)
        for key, child in items
        for path in frozen_paths(child, within=frozen)
    ]


def freeze_at(tree: Any, paths: Sequence[Sequence[str | int]]) -> Any:
    """Return the tree with the dicts at these paths as `FrozenDict`s.

    Raises LookupError or TypeError where a path leads to no dict.
    """
    for path in reversed(paths):  # the inner ones first
        tree = _frozen(tree, tuple(path))
    return tree


def thaw(tree: Any) -> Any:
    """Return a `FrozenDict` as dicts; another tree as it is."""
    return unfreeze(tree) if isinstance(tree, FrozenDict) else tree


def _frozen(tree: Any, path: Steps) -> Any:
    if not path:
        return freeze(tree)
    first: Any = path[0]
    rest = path[1:]
    if isinstance(tree, tuple):
        inner = _frozen(tree[first], rest)
        return (*tree[:first], inner, *tree[first + 1 :])
    copy = tree.copy()
    copy[first] = _frozen(tree[first], rest)
    return copy

"""Optax transformations: which weights train, how fast, and within which constraints.

Those that constrain weights must be last in a chain: what `keep_masked_zero` and
`gradual_pruning` return makes a pruned weight exactly zero, whatever momentum or weight
decay did before. Masks are part of the optimizer state, so a checkpoint of the state
resumes with them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress import checks
from jaxcompress.pruning.masks import Scope, check_mask
from jaxcompress.pruning.masks import make as make_masks
from jaxcompress.training.relative_updates import relative, relative_adam
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.names import match
from jaxcompress.tree.paths import EMBEDDING, array_names
from jaxcompress.types import Masks, Params

__all__ = [
    "by_name",
    "cubic_sparsity",
    "gradual_pruning",
    "keep_masked_zero",
    "layerwise_rates",
    "project",
    "relative",
    "relative_adam",
]


class MaskedState(NamedTuple):
    """Boolean masks, None where dense."""

    masks: Masks


class PruningState(NamedTuple):
    """Steps done, int32, and the masks in force."""

    step: jax.Array
    masks: Masks


class ProjectionState(NamedTuple):
    """Steps done, int32."""

    step: jax.Array


def keep_masked_zero(masks: Masks) -> optax.GradientTransformation:
    """Set weights to zero where a mask is false, and keep them there; put it last.

    Args:
      masks: booleans like the parameters, None where dense (`masks.make`, `masks.of`).

    Raises:
      ValueError: in `init`, masks that do not fit the parameters; in `update`, no
        parameters.

    Example:
      >>> masks = jc.masks.make(params, jc.masks.magnitude_scores(params), sparsity=0.5)
      >>> keep = jc.optimizers.keep_masked_zero(masks)
      >>> optimizer = optax.chain(optax.adam(1e-3), keep)
    """

    def init(params: Params) -> MaskedState:
        _over(lambda mask, x: check_mask(mask, x), masks, params)
        # Copies: a donated state must not take the caller's masks with it.
        return MaskedState(jax.tree.map(jnp.array, masks))

    def update(
        updates: Any, state: MaskedState, params: Params | None = None
    ) -> tuple[Any, MaskedState]:
        return _to_zero(updates, state.masks, params), state

    return optax.GradientTransformation(init, update)


def gradual_pruning(
    score: Callable[[Params, Any], Any],
    schedule: Callable[[jax.Array], Any],
    *,
    every: int = 1,
    scope: Scope = "leaf",
    nm: str | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune more and more weights while the others train; put it last.

    A weight that is pruned stays so, unless the schedule falls.

    Args:
      score: `(params, gradients) -> scores`, `magnitude_scores` or `taylor_scores`;
        it is given the weights as they are after the step. Gradients are None but
        where the optimizer is called as
        `update(gradients, state, params, gradients=gradients)`.
      schedule: step, from 0, to the fraction of scored weights to drop, at least 0
        and below 1: `cubic_sparsity`, or any Optax schedule.
      every: steps between two choices of the masks; the first step makes one.
      scope: as in `masks.make`.
      nm: N:M: groups of M lose their weights as the schedule says, until N are
        left. Blocks: whole blocks are dropped.
      layouts: as in `masks.make`.

    Raises:
      ValueError: `every` below 1, no parameters, what `score` or `masks.make` raise.

    Example:
      >>> schedule = jc.optimizers.cubic_sparsity(0.5, start=0, stop=100)
      >>> prune = jc.optimizers.gradual_pruning(jc.masks.magnitude_scores, schedule)
      >>> optimizer = optax.chain(optax.adam(1e-3), prune)

    Source: Zhu and Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878).
    """
    checks.integer("gradual_pruning", "every", every)

    def init(params: Params) -> PruningState:
        scores = jax.eval_shape(score, params, params)
        masks = jax.tree.map(lambda s: jnp.ones(s.shape, bool), scores)
        return PruningState(jnp.zeros((), jnp.int32), masks)

    def update(
        updates: Any,
        state: PruningState,
        params: Params | None = None,
        *,
        gradients: Params = None,
        **others: Any,
    ) -> tuple[Any, PruningState]:
        del others
        moved = _to_zero(updates, state.masks, params)

        def choose() -> Masks:
            after = optax.apply_updates(params, moved)
            sparsity = jnp.asarray(schedule(state.step), jnp.float32)
            return make_masks(
                after,
                score(after, gradients),
                sparsity,
                scope=scope,
                nm=nm,
                layouts=layouts,
            )

        due = state.step % every == 0
        masks = jax.lax.cond(due, choose, lambda: state.masks)
        later = PruningState(optax.safe_increment(state.step), masks)
        return _to_zero(moved, masks, params), later

    return optax.GradientTransformationExtraArgs(init, update)


def cubic_sparsity(
    final: float, *, start: int = 0, stop: int, initial: float = 0.0
) -> Callable[[jax.Array], jax.Array]:
    """Build the schedule `final - (final - initial) (1 - t)^3`, the fraction dropped, t
    from 0 to 1.

    Fast where there is much to drop, slow towards the end; `initial` before step
    `start`, `final` from step `stop` on.

    Args:
      final, initial: fractions dropped at the end and at the start.
      start, stop: steps between which t grows.

    Raises:
      ValueError: a sparsity out of range, or steps out of order.

    Example:
      >>> schedule = jc.optimizers.cubic_sparsity(0.8, start=0, stop=100)
      >>> float(schedule(100))
      0.800000011920929

    Source: Zhu and Gupta 2017 (arXiv 1710.01878, equation 1).
    """
    for name, value in (("final", final), ("initial", initial)):
        if not (math.isfinite(value) and 0 <= value < 1):
            raise ValueError(
                f"cubic_sparsity takes a {name} sparsity of at least 0 and below 1, "
                f"not {value!r}"
            )
    if not 0 <= start < stop:
        raise ValueError(
            f"cubic_sparsity takes a start of 0 or more and a later stop, not from "
            f"{start} to {stop}"
        )
    return optax.polynomial_schedule(initial, final, 3, stop - start, start)


def _to_zero(updates: Any, masks: Masks, params: Params | None) -> Any:
    """Update that leave exact zeros where a mask is false."""
    if params is None:
        raise ValueError(
            "keeping weights at zero needs the parameters; call "
            "update(gradients, state, params)"
        )
    # Not cast to the dtype of the update: a rounded -x would leave a remainder.
    return _over(lambda mask, u, x: jnp.where(mask, u, -x), masks, updates, params)


def _over(function: Callable, masks: Masks, first: Any, *others: Any) -> Any:
    """Apply `function(mask, ...)` where there is a mask; return the first tree's part
    elsewhere.
    """

    def one(mask: jax.Array | None, x: Any, *rest: Any) -> Any:
        return x if mask is None else function(mask, x, *rest)

    return jax.tree.map(one, masks, first, *others, is_leaf=lambda x: x is None)


def by_name(
    rules: Sequence[tuple[str, optax.GradientTransformation | None]],
) -> optax.GradientTransformation:
    """Choose an optimizer by name: the first pattern that fully matches decides.

    Names are those of arrays, inside leaves too (`mlp/kernel/scale`, `leaf_names`).
    None freezes: no update, and no state. End with `(".*", optimizer)` for the rest.

    Args:
      rules: `(pattern, optimizer | None)`, in order.

    Raises:
      ValueError: in `init`, a pattern that matches no array, or an array that no
        pattern matches; a rule that is none.

    Example:
      >>> rules = [(".*norm/scale", None), (".*", optax.adam(1e-3))]
      >>> optimizer = jc.optimizers.by_name(rules)
    """
    for rule in rules:
        if len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(f"{rule!r} is not a rule; write (pattern, optimizer)")
    chosen = {
        str(number): optax.set_to_zero() if optimizer is None else optimizer
        for number, (_, optimizer) in enumerate(rules)
    }
    patterns = [re.compile(pattern) for pattern, _ in rules]

    def labels(params: Params) -> Any:
        names = array_names(params)
        flat = jax.tree.leaves(names)
        for pattern in patterns:
            match(pattern, flat, "array that trains")

        def label(name: str) -> str:
            for number, pattern in enumerate(patterns):
                if pattern.fullmatch(name):
                    return str(number)
            raise ValueError(
                f"no pattern matches {name}; end the rules with ('.*', optimizer), or "
                "('.*', None) to freeze the rest"
            )

        return jax.tree.map(label, names)

    return optax.multi_transform(chosen, labels)


def layerwise_rates(
    decay: float, *, looped: str = r"layer_(\d+)/.*", stacked: str = r"layers/.*"
) -> optax.GradientTransformation:
    """Scale updates by `decay` for every layer between an array and the head.

    The last layer and what follows it keep their updates; what is in no layer and is an
    embedding is one layer below the first. Put it after the optimizer.

    Args:
      decay: above 0 and at most 1.
      looped: pattern whose first group is the number of the layer in a name.
      stacked: pattern of arrays whose first axis is the layers.

    Raises:
      ValueError: decay out of range; in `update`, no layers among the names.

    Example:
      >>> rates = jc.optimizers.layerwise_rates(0.9)
      >>> optimizer = optax.chain(optax.adam(1e-3), rates)

    Source: Howard and Ruder 2018, "ULMFiT" (arXiv 1801.06146, section 3.2).
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; it must be above 0 and at most 1")

    def update(updates: Any, state: Any, params: Params | None = None) -> Any:
        del params
        names = array_names(updates)
        numbers = [
            int(layer[1])
            for name in jax.tree.leaves(names)
            if (layer := re.fullmatch(looped, name))
        ]
        stacks = [
            x.shape[0]
            for name, x in zip(*map(jax.tree.leaves, (names, updates)), strict=True)
            if re.fullmatch(stacked, name)
        ]
        if not numbers and not stacks:
            raise ValueError(
                f"no name matches {looped!r} or {stacked!r}, as in "
                f"{', '.join(jax.tree.leaves(names)[:3])}; say how layers are called"
            )
        layers = max([*stacks, *(number + 1 for number in numbers)])

        def scale(name: str, x: jax.Array) -> jax.Array:
            if layer := re.fullmatch(looped, name):
                return x * decay ** (layers - 1 - int(layer[1]))
            if re.fullmatch(stacked, name):
                rates = decay ** jnp.arange(layers - 1, -1, -1, dtype=jnp.float32)
                return x * rates.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
            return x * decay**layers if EMBEDDING in name.split("/") else x

        return jax.tree.map(scale, names, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def project(
    transform: Callable[[Params], Params], *, every: int = 1
) -> optax.GradientTransformation:
    """Put the parameters back where `transform` puts them; last in a chain.

    Onto a grid: `lambda p: materialize(compress(p, "symmetric(bits=4, block=64)"))`;
    onto fixed zeros: `lambda p: jc.masks.apply(p, masks)`. What arrives is right to the
    rounding of one addition, `params + (target - params)`; zeros are exact with
    `keep_masked_zero`.

    Args:
      transform: traceable, from parameters to parameters of the same shapes.
      every: steps between two projections; the first is after step `every`.

    Raises:
      ValueError: `every` below 1; in `update`, no parameters.

    Example:
      >>> on_grid = lambda p: jc.materialize(jc.compress(p, "symmetric(bits=4)"))
      >>> optimizer = optax.chain(optax.adam(1e-3), jc.optimizers.project(on_grid))
    """
    checks.integer("project", "every", every)

    def init(params: Params) -> ProjectionState:
        del params
        return ProjectionState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: ProjectionState, params: Params = None) -> Any:
        if params is None:
            raise ValueError(
                "a projection needs the parameters; call "
                "update(gradients, state, params)"
            )
        step = optax.safe_increment(state.step)

        def projected() -> Any:
            moved = optax.apply_updates(params, updates)
            back = lambda x, old, u: (x - old).astype(u.dtype)  # noqa: E731
            return jax.tree.map(back, transform(moved), params, updates)

        due = step % every == 0
        updates = jax.lax.cond(due, projected, lambda: updates)
        return updates, ProjectionState(step)

    return optax.GradientTransformation(init, update)

"""Optax transformations that keep pruned weights at zero while the others train.

They come last in a chain: what they return makes a pruned weight exactly zero, whatever
momentum or weight decay did before. Masks are part of the optimizer state, so a
checkpoint of the state resumes with them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.pruning.masks import Scope, check_mask, make_masks
from jaxcompress.tree.layouts import Layout
from jaxcompress.types import Masks, Params


class MaskedState(NamedTuple):
    """Boolean masks, None where dense."""

    masks: Masks


class PruningState(NamedTuple):
    """Steps done, int32, and the masks in force."""

    step: jax.Array
    masks: Masks


def keep_masked_zero(masks: Masks) -> optax.GradientTransformation:
    """Sets weights to zero where a mask is false, and keeps them there; put it last.

    Args:
      masks: booleans like the parameters, None where dense (`make_masks`, `masks_of`).

    Raises:
      ValueError: in `init`, masks that do not fit the parameters; in `update`, no
        parameters.
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
    pattern: str | None = None,
    layout: Mapping[str, Layout] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes more and more weights while the others train; put it last.

    A weight that is pruned stays so, unless the schedule falls.

    Args:
      score: `(params, gradients) -> scores`, `magnitude_scores` or `taylor_scores`;
        it is given the weights as they are after the step. Gradients are None but
        where the optimizer is called as
        `update(gradients, state, params, gradients=gradients)`.
      schedule: step, from 0, to the fraction of scored weights to drop, at least 0
        and below 1: `cubic_sparsity`, or any Optax schedule.
      every: steps between two choices of the masks; the first step makes one.
      scope: as in `make_masks`.
      pattern: N:M: groups of M lose their weights as the schedule says, until N are
        left. Blocks: whole blocks go.
      layout: as in `make_masks`.

    Raises:
      ValueError: `every` below 1, no parameters, what `score` or `make_masks` raise.

    Source: Zhu and Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878).
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"gradual_pruning chooses every 1 or more steps, not {every}")

    def init(params: Params) -> PruningState:
        scores = jax.eval_shape(score, params, params)
        masks = jax.tree.map(lambda s: jnp.ones(s.shape, bool), scores)
        return PruningState(jnp.zeros((), jnp.int32), masks)

    def update(
        updates: Any,
        state: PruningState,
        params: Params | None = None,
        *,
        gradients: Any = None,
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
                pattern=pattern,
                layout=layout,
            )

        due = state.step % every == 0
        masks = jax.lax.cond(due, choose, lambda: state.masks)
        later = PruningState(optax.safe_increment(state.step), masks)
        return _to_zero(moved, masks, params), later

    return optax.GradientTransformationExtraArgs(init, update)


def cubic_sparsity(
    final: float, *, start: int = 0, stop: int, initial: float = 0.0
) -> Callable[[jax.Array], jax.Array]:
    """Fraction dropped at a step: `final - (final - initial) (1 - t)^3`, t from 0 to 1.

    Fast where there is much to drop, slow towards the end; `initial` before step
    `start`, `final` from step `stop` on.

    Raises:
      ValueError: a sparsity out of range, or steps out of order.

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
            f"cubic_sparsity goes from a start of 0 or more to a later stop, not from "
            f"{start} to {stop}"
        )
    return optax.polynomial_schedule(initial, final, 3, stop - start, start)


def _to_zero(updates: Any, masks: Masks, params: Params | None) -> Any:
    """Updates that leave exact zeros where a mask is false."""
    if params is None:
        raise ValueError(
            "keeping weights at zero needs the parameters; call "
            "update(gradients, state, params)"
        )
    # Not cast to the dtype of the update: a rounded -x would leave a remainder.
    return _over(lambda mask, u, x: jnp.where(mask, u, -x), masks, updates, params)


def _over(function: Callable, masks: Masks, first: Any, *others: Any) -> Any:
    """`function(mask, ...)` where there is a mask; the first tree's part elsewhere."""

    def one(mask: jax.Array | None, x: Any, *rest: Any) -> Any:
        return x if mask is None else function(mask, x, *rest)

    return jax.tree.map(one, masks, first, *others, is_leaf=lambda x: x is None)

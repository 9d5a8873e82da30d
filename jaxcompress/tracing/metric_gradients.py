"""Gradients of weights in the metric of their inputs, at the price of a gradient.

A weight `[inputs, outputs]` that is multiplied by rows X and whose products have the
gradients D has the gradient `X^T D`. In the metric of a factor F it is `F X^T D`:
`(F X^T) D` takes far fewer operations than `F (X^T D)` where rows are few.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tracing.interpreter import run_uses
from jaxcompress.tracing.jaxpr_compat import bind
from jaxcompress.tracing.movements import moved
from jaxcompress.tracing.provenance import Joined, Weight, is_weight
from jaxcompress.tracing.same_inputs import SameInputs
from jaxcompress.tracing.uses import Use, uses_of
from jaxcompress.tree.layouts import Layout


@dataclasses.dataclass(frozen=True)
class Uses:
    """Uses of weights in a program.

    Args:
      layouts: by name of each weight that is multiplied or looked up, in order of use.
      plain: names of those that are only multiplied, whole and outside of loops.
      same: which of them meet the same rows.
    """

    layouts: Mapping[str, Layout]
    plain: frozenset[str]
    same: SameInputs


def find_uses(
    function: Callable[..., Any], weights: Mapping[str, Any], arguments: Any
) -> Uses:
    """Find how `function(weights, arguments)` uses its weights; traces abstractly."""
    layouts: dict[str, Layout] = {}
    counts: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    other: set[str] = set()  # what is added, or passed to a function unseen
    same = SameInputs()

    def visit(use: Use) -> dict[str, jax.Array]:
        same.note(use)
        layouts.setdefault(use.name, use.layout)
        counts[use.name] += 1
        return {}

    def multiply(eqn: Any, values: list, tags: Sequence, uses: list[Use]) -> list:
        product = eqn.primitive.name == "dot_general" and len(uses) == 1
        plain.update(use.name for use in uses if product and _is_plain(use))
        results = bind(eqn, values)
        if not uses and not any(map(is_weight, moved(eqn, values, tags, results))):
            other.update(name for tag in tags for name in _names(tag))
        return results

    def run(weights: Any, arguments: Any) -> None:
        run_uses(function, weights, arguments, visit)
        run_uses(function, weights, arguments, lambda use: {}, multiply=multiply)

    jax.eval_shape(run, dict(weights), arguments)
    names = {n for n in plain.keys() - other if plain[n] == counts[n]}
    return Uses(layouts, frozenset(names), same)


def run_in_metric(
    function: Callable[..., Any],
    weights: Mapping[str, jax.Array],
    arguments: Any,
    factors: Mapping[str, jax.Array],
) -> Any:
    """Run `function(weights, arguments)`, with other gradients of some weights.

    Traceable. The gradient of a weight, as a matrix `[inputs, outputs]`, is multiplied
    by its factor from the left.

    Args:
      factors: `[inputs, inputs]` by name of a `plain` weight of `find_uses`.
    """

    def multiply(eqn: Any, values: list, tags: Sequence, uses: list[Use]) -> list:
        if not uses or uses[0].name not in factors:
            return bind(eqn, values)
        return [_product(eqn, values, tags, factors[uses[0].name])]

    return run_uses(function, weights, arguments, lambda use: {}, multiply=multiply)[0]


def _names(tag: Any) -> list[str]:
    """Return names of the weights in a tag."""
    parts = [part for part, _, _ in tag.parts] if isinstance(tag, Joined) else [tag]
    return [part.name for part in parts if isinstance(part, Weight)]


def _is_plain(use: Use) -> bool:
    rest = use.lookup, use.looped, use.stack, use.picked, use.shared
    return not any(rest) and use.chosen is None and use.part == 1


def _product(eqn: Any, values: list, tags: Sequence, factor: jax.Array) -> jax.Array:
    side = [is_weight(tag) for tag in tags].index(True)
    assert isinstance(tags[side], Weight)

    def order(x: jax.Array, weight: jax.Array) -> list:
        return [x, weight] if side else [weight, x]

    def apply(x: jax.Array, weight: jax.Array) -> jax.Array:
        return bind(eqn, order(x, weight))[0]

    def rows(x: jax.Array, weight: jax.Array) -> jax.Array:
        operands = order(x, weight)
        return uses_of(eqn, operands, tags, mapped=False, experts=set())[0].inputs

    @jax.custom_vjp
    def product(x: jax.Array, weight: jax.Array, factor: jax.Array) -> jax.Array:
        return apply(x, weight)

    def forward(x: jax.Array, weight: jax.Array, factor: jax.Array) -> tuple:
        return apply(x, weight), (x, weight, factor)

    def backward(kept: tuple, slope: jax.Array) -> tuple:
        x, weight, factor = kept
        (of_x,) = jax.linear_transpose(lambda x: apply(x, weight), x)(slope)
        seen, back = jax.vjp(lambda x: rows(x, weight), x)  # moves axes only
        moved = jnp.matmul(
            seen.astype(factor.dtype), factor.T, precision=jax.lax.Precision.HIGHEST
        )
        (moved,) = back(moved.astype(seen.dtype))
        (of_weight,) = jax.linear_transpose(lambda w: apply(moved, w), weight)(slope)
        return of_x, of_weight, jnp.zeros_like(factor)

    product.defvjp(forward, backward)
    return product(values[1 - side], values[side], factor)

"""Unroll the loops of a program over stacked weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcompress.tracing.interpreter import CALLS
from jaxcompress.tracing.jaxpr_compat import bind, called, closed_of, scan_sizes
from jaxcompress.tracing.provenance import SAME


def scanned(closed: Any, tags: Sequence[str | None]) -> dict[str, tuple[int, int]]:
    """Find the loop that slices each weight, and its length, by the weight's name."""
    loops: dict[str, tuple[int, int]] = {}
    tag_of = dict(zip(closed.jaxpr.invars, tags, strict=False))
    for eqn in closed.jaxpr.eqns:
        operand_tags = [None if _literal(v) else tag_of.get(v) for v in eqn.invars]
        if not any(operand_tags):
            continue
        if eqn.primitive.name in CALLS and (inner := called(eqn)) is not None:
            loops |= scanned(inner, operand_tags)
        elif eqn.primitive.name == "scan":
            sliced = operand_tags[sum(scan_sizes(eqn.params, len(operand_tags))) :]
            loop = id(eqn), eqn.params["length"]
            loops |= {tag: loop for tag in sliced if tag}
        elif eqn.primitive.name in SAME:
            tag_of[eqn.outvars[0]] = operand_tags[0]
    return loops


@dataclasses.dataclass(frozen=True)
class Held:
    """Hold a value, and the number of the block it is a weight of (-1: of none)."""

    value: Any
    owner: int | None = None


class Stack(list):
    """The slices of a stacked weight, each a weight of its own."""

    @property
    def value(self) -> jax.Array:
        return jnp.stack([held.value for held in self])


def unroll(closed: Any, values: Sequence[Held | Stack]) -> list:
    """Run a program; open calls that read several blocks, and loops over them.

    Returns arrays.
    """
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(
        zip(jaxpr.constvars, map(Held, closed.consts), strict=True)
    )
    env |= zip(jaxpr.invars, values, strict=True)
    for eqn in jaxpr.eqns:
        inputs = [Held(v.val) if _literal(v) else env[v] for v in eqn.invars]
        stacks = [x for x in inputs if isinstance(x, Stack)]
        owners = {x.owner for x in inputs if isinstance(x, Held)} - {None}
        name = eqn.primitive.name
        several = stacks or len(owners) > 1
        if several and name in CALLS and (inner := called(eqn)) is not None:
            results = list(map(Held, unroll(inner, inputs)))
        elif stacks and name == "scan":
            results = list(map(Held, _turns(eqn, inputs)))
        elif stacks and name in SAME:
            each = [bind(eqn, [held.value])[0] for held in stacks[0]]
            owned = zip(each, stacks[0], strict=True)
            results = [Stack(Held(x, held.owner) for x, held in owned)]
        else:
            results = list(map(Held, bind(eqn, [x.value for x in inputs])))
            if name in SAME and owners:
                results = [Held(results[0].value, inputs[0].owner)]
        env |= zip(eqn.outvars, results, strict=True)
    return [v.val if _literal(v) else env[v].value for v in jaxpr.outvars]


def _turns(eqn: Any, inputs: Sequence[Held | Stack]) -> list:
    """Run a loop, its turns one after the other; return its results."""
    body, length = closed_of(eqn.params["jaxpr"]), eqn.params["length"]
    consts, carries = scan_sizes(eqn.params, len(inputs))
    fixed = [Held(x.value) if isinstance(x, Stack) else x for x in inputs[:consts]]
    carry = [Held(x.value) for x in inputs[consts : consts + carries]]
    collected: list[Any] = [None] * length
    turns = range(length)
    for i in reversed(turns) if eqn.params["reverse"] else turns:
        xs = [
            x[i] if isinstance(x, Stack) else Held(x.value[i])
            for x in inputs[consts + carries :]
        ]
        results = unroll(body, [*fixed, *carry, *xs])
        carry = list(map(Held, results[:carries]))
        collected[i] = results[carries:]
    stacked = [jnp.stack(ys) for ys in zip(*collected, strict=True)]
    return [x.value for x in carry] + stacked


def _literal(v: Any) -> bool:
    return isinstance(v, core.Literal)

"""Reading a traced program: where each weight is multiplied, and by what.

JAX turns any model into a list of primitive operations. `trace_uses` runs that list
with every weight tagged by its name and by what its axes hold; the tag follows the
weight through casts, transposes, reshapes and calls, to the products that consume it.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcompress.tracing.jaxpr_compat import (
    bind,
    called,
    closed_of,
    is_vmapped,
    scan_sizes,
)
from jaxcompress.tracing.mapped import mapped_axes
from jaxcompress.tracing.movements import moved
from jaxcompress.tracing.provenance import (
    CONSTANT,
    ONE_HOT,
    Scaled,
    Tag,
    Weight,
    is_followed,
    is_weight,
    sliced,
    tag,
)
from jaxcompress.tracing.sharded import run_sharded
from jaxcompress.tracing.stack_sums import stacked_sums
from jaxcompress.tracing.uses import Use, uses_of
from jaxcompress.tree.layouts import Layout

Sums = dict[str, dict[str, jax.Array]]  # per weight: named sums over tokens

# Several operands, as many results: each tag stays.
_EACH = {"optimization_barrier", "device_put"}
# Calls of a program on the operands: read it in their place.
CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}


Visit = Callable[[Use], dict[str, jax.Array]]
# What an operation on weights returns: of its equation, values, tags and uses, if any.
Multiply = Callable[[Any, list, Sequence, list[Use]], list]


def trace_uses(
    function: Callable[..., Any],
    weights: Mapping[str, jax.Array],
    arguments: Any,
    visit: Visit,
    *,
    tagged: Sequence[str] | None = None,
) -> Sums:
    """Run `function(weights, arguments)`, calling `visit` at every use of a weight.

    Traceable. What `visit` returns, sums over the `...` axes of `Use.inputs`, is added
    up over all uses of a weight, over calls and loops; a scan over stacked weights
    stacks it.

    Args:
      function: of a dict of dense weights and any pytree.
      weights: dense arrays by name.
      arguments: pytree of arrays.
      visit: function of a `Use`; stack axes lead in each array that it returns.
      tagged: names of the weights to follow; all by default.

    Warns of a weight used in two ways that no one layout describes: the first counts.
    """
    return run_uses(function, weights, arguments, visit, tagged=tagged)[1]


def run_uses(
    function: Callable[..., Any],
    weights: Mapping[str, jax.Array],
    arguments: Any,
    visit: Visit,
    *,
    tagged: Sequence[str] | None = None,
    multiply: Multiply | None = None,
) -> tuple[Any, Sums]:
    """Run `function`; return its result and that of `trace_uses`.

    With `multiply`, functions that bring their own derivative keep it: what happens to
    weights inside of them is not seen.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(
        dict(weights), arguments
    )
    names = sorted(weights)  # the order in which a dict is flattened
    follow = set(names if tagged is None else tagged)
    tags: list[Tag] = [
        tag(name, weights[name].shape) if name in follow else CONSTANT for name in names
    ]
    values = [weights[name] for name in names] + jax.tree.leaves(arguments)
    tags += [None] * (len(values) - len(tags))
    experts: set[str] = set()
    batched: set[str] = set()
    unclear: set[str] = set()
    stacks = any(isinstance(t, Weight) and len(t.axes) > 2 for t in tags)
    if stacks or any(jnp.ndim(x) for x in closed.consts):
        # What is multiplied decides whether a gather picks experts or rows of a table,
        # and whether a product with constants counts.
        probe = _Reader(
            lambda use: {}, {}, experts, batched, probing=True, unclear=unclear
        )
        jax.eval_shape(lambda *values: probe.run(closed, values, tags)[0], *values)
    if unclear:
        mapped = mapped_axes(function, weights, arguments)
        tags[: len(names)] = [
            tag(t.name, t.shape, mapped.get(t.name, ())) if isinstance(t, Weight) else t
            for t in tags[: len(names)]
        ]
    reader = _Reader(visit, {}, experts, batched, multiply=multiply)
    results, _, sums = reader.run(closed, values, tags)
    return jax.tree.unflatten(jax.tree.structure(shapes), results), sums


@dataclasses.dataclass(frozen=True)
class _Reader:
    visit: Visit
    layouts: dict[str, Layout]  # of the weights met so far
    experts: set[str]  # weights whose gathered slices are multiplied
    batched: set[str]  # weights multiplied by what depends on the batch
    probing: bool = False  # finding these two
    looped: bool = False
    mapped: bool = False  # inside a call that `vmap` made
    multiply: Multiply | None = None
    unclear: set[str] = dataclasses.field(default_factory=set)  # stacks or outputs

    def run(self, closed: Any, values: Sequence, tags: Sequence) -> tuple:
        """Return results, their tags, and sums of a program on tagged values."""
        jaxpr, consts = closed.jaxpr, closed.consts
        value_of: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        value_of.update(zip(jaxpr.invars, values, strict=True))
        tag_of: dict[Any, Tag] = dict.fromkeys(jaxpr.constvars, CONSTANT)
        tag_of.update(zip(jaxpr.invars, tags, strict=True))
        sums: Sums = {}

        def read(v: Any) -> Any:
            return v.val if isinstance(v, core.Literal) else value_of[v]

        def read_tag(v: Any) -> Tag:
            return CONSTANT if isinstance(v, core.Literal) else tag_of.get(v)

        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            operand_tags = [read_tag(v) for v in eqn.invars]
            if any(map(is_followed, operand_tags)) or eqn.primitive.name in CALLS:
                results, after, more = self.step(eqn, inputs, operand_tags)
                _add(sums, more)
            else:
                results = bind(eqn, inputs)
                after = moved(eqn, inputs, operand_tags, results)
            tag_of.update(zip(eqn.outvars, after, strict=True))
            value_of.update(zip(eqn.outvars, results, strict=True))
        results = [read(v) for v in jaxpr.outvars]
        return results, [read_tag(v) for v in jaxpr.outvars], sums

    def step(self, eqn: Any, values: list, tags: list) -> tuple[list, list, Sums]:
        """Return results, their tags, and sums of one operation that reads a weight."""
        name, mapped = eqn.primitive.name, self.mapped or is_vmapped(eqn)
        if self.multiply and name.startswith("custom_"):
            results = self.multiply(eqn, values, tags, [])
            return results, [None] * len(results), {}
        inside = dataclasses.replace(self, mapped=mapped)
        if name in CALLS and (inner := called(eqn)) is not None:
            return inside.run(inner, values, tags)
        if any(map(is_weight, tags)):
            if name in ("scan", "while", "cond"):
                inside = dataclasses.replace(inside, looped=True)
                kinds = {
                    "scan": inside.scan,
                    "while": inside.loop,
                    "cond": inside.branch,
                }
                return kinds[name](eqn, values, tags)
            if name == "shard_map":
                return run_sharded(inside.run, eqn, values, tags)
        sums: Sums = {}
        uses = [
            dataclasses.replace(use, looped=self.looped)
            for use in uses_of(eqn, values, tags, mapped=mapped, experts=self.experts)
        ]
        fixed = all(tag is not None and not isinstance(tag, Scaled) for tag in tags)
        for use in uses:
            if self.probing and mapped and len(use.layout.outputs) > 1:
                self.unclear.add(use.name)
            self.note(use, sums, fixed=fixed and not use.lookup)
        if self.multiply:
            results = self.multiply(eqn, values, tags, uses)
        else:
            results = bind(eqn, values)
        if name in _EACH and len(results) == len(tags):
            return results, list(tags), sums
        after = moved(eqn, values, tags, results)
        if not self.probing and (name == "gather" or ONE_HOT in tags):
            # Rows of a table, unless the slices are multiplied.
            tables = [t for t in tags if isinstance(t, Weight)]
            if any(t.name not in self.experts for t in tables):
                after = [None] * len(after)
        return results, after, sums

    def note(self, use: Use, sums: Sums, *, fixed: bool) -> None:
        """Add what `visit` returns for a use to the sums.

        `fixed`: no operand depends on the batch, as in a power iteration. It counts
        where the weight has no other use.
        """
        if self.probing:
            if use.chosen is not None or use.rearranged:
                self.experts.add(use.name)
            if not fixed:
                self.batched.add(use.name)
            return
        if fixed and use.name in self.batched:
            return
        first = self.layouts.setdefault(use.name, use.layout)
        if first == use.layout:
            _add(sums, {use.name: stacked_sums(use, self.visit)})
            return
        warnings.warn(
            f"{use.name}: one use of this weight has {first}, another has "
            f"{use.layout}, and no one matrix serves both; the first counts. To "
            f"compress it along the other, pass layouts={{{use.name!r}: jc.{use.layout}"
            "}, or leave it dense",
            stacklevel=2,
        )

    def scan(self, eqn: Any, values: list, tags: list) -> tuple[list, list, Sums]:
        params, inner = eqn.params, closed_of(eqn.params["jaxpr"])
        consts, carries = scan_sizes(params, len(values))
        xs = values[consts + carries :]
        # A carry may change; one that does not, JAX has made a constant.
        below = tags[:consts] + [None] * carries
        below += map(sliced, tags[consts + carries :])
        stacked = {t.name for t in tags[consts + carries :] if isinstance(t, Weight)}

        def body(state: Any, x: Any) -> Any:
            carry, totals = state
            results, _, sums = self.run(inner, [*values[:consts], *carry, *x], below)
            each = {k: v for k, v in sums.items() if k in stacked}
            _add(totals, {k: v for k, v in sums.items() if k not in stacked})
            return (results[:carries], totals), (results[carries:], each)

        carry = values[consts : consts + carries]
        first = [jax.tree.map(_first, x) for x in xs]
        totals: Sums = {}
        if any(map(is_weight, below)):
            shapes = jax.eval_shape(lambda c, x: body((c, {}), x)[0][1], carry, first)
            totals = _zeros(shapes)
        (carry, totals), (ys, each) = jax.lax.scan(
            body,
            (carry, totals),
            xs,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        _add(totals, each)
        return [*carry, *ys], [None] * (carries + len(ys)), totals

    def loop(self, eqn: Any, values: list, tags: list) -> tuple[list, list, Sums]:
        params = eqn.params
        test, inner = closed_of(params["cond_jaxpr"]), closed_of(params["body_jaxpr"])
        split = params["cond_nconsts"]
        start = split + params["body_nconsts"]
        below = tags[split:start] + [None] * len(tags[start:])

        def body(state: Any) -> Any:
            carry, totals = state
            results, _, sums = self.run(inner, [*values[split:start], *carry], below)
            _add(totals, sums)
            return results, totals

        def again(state: Any) -> jax.Array:
            return core.jaxpr_as_fun(test)(*values[:split], *state[0])[0]

        carry = values[start:]
        shapes = jax.eval_shape(lambda c: body((c, {}))[1], carry)
        carry, totals = jax.lax.while_loop(again, body, (carry, _zeros(shapes)))
        return list(carry), [None] * len(carry), totals

    def branch(self, eqn: Any, values: list, tags: list) -> tuple[list, list, Sums]:
        branches = [closed_of(b) for b in eqn.params["branches"]]
        index, *operands = values

        def run(branch: Any) -> Callable[..., tuple[list, Sums]]:
            def call(*operands: Any) -> tuple[list, Sums]:
                results, _, sums = self.run(branch, operands, tags[1:])
                return results, sums

            return call

        zeros: Sums = {}
        for branch in branches:
            _, shapes = jax.eval_shape(run(branch), *operands)
            for name, named in _zeros(shapes).items():
                zeros.setdefault(name, {}).update(named)

        def padded(branch: Any) -> Callable[..., tuple[list, Sums]]:
            def call(*operands: Any) -> tuple[list, Sums]:
                results, sums = run(branch)(*operands)
                _add(sums, zeros)
                return results, sums

            return call

        results, sums = jax.lax.switch(index, [padded(b) for b in branches], *operands)
        return results, [None] * len(results), sums


def _add(sums: Sums, more: Sums) -> None:
    for name, named in more.items():
        total = sums[name] = dict(sums.get(name, {}))
        for key, value in named.items():
            total[key] = total[key] + value if key in total else value


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _first(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

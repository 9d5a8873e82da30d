"""Choices of the weights that stay: sparsity, threshold, N:M, blocks."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import checks


class Choice(NamedTuple):
    """The number of weights that stay, and the groups that they compete in; hashable.

    Args:
      among: "leaf": all of a matrix; "row": those of one output; "group": `size[0]`
        consecutive inputs of one output; "block": whole blocks of `size` in a matrix.
      size: of a group or block, inputs and outputs; (1, 1) otherwise.
      of: how many compete.
      kept: how many of them stay.
    """

    among: str
    size: tuple[int, int]
    of: int
    kept: int

    @property
    def by_output(self) -> bool:
        """Whether every output keeps the same number of weights."""
        return self.among in ("row", "group")

    def count(self, inputs: int) -> int:
        """Return weights that stay, of each output if `by_output`, else of a matrix."""
        if self.among == "group":
            return self.kept * (inputs // self.size[0])
        return self.kept * (self.size[0] * self.size[1])


def choice(
    shape: tuple[int, ...],
    name: str,
    *,
    sparsity: float | None,
    nm: str | None,
    scope: str = "leaf",
) -> Choice:
    """Resolve the options of a method for weights of this shape.

    Raises ValueError where they are out of range, contradict each other, or do not
    divide the weights; the message calls the method by `name`.
    """
    inputs, outputs = shape[-2:]
    checks.one_of(name, "scope", scope, ("leaf", "row"))
    parsed = None if nm is None else _pattern(nm, name)
    if parsed and parsed[0] == ":":
        _, keep, group = parsed
        if sparsity is not None and sparsity != 1 - keep / group:
            raise ValueError(
                f"{name}: the pattern {nm} is a sparsity of {1 - keep / group:g}, "
                f"not {sparsity!r}; leave one out"
            )
        if inputs % group:
            raise ValueError(
                f"{name}: the pattern {nm} needs a multiple of {group} inputs, "
                f"these weights have {inputs}; prune by sparsity instead"
            )
        return Choice("group", (group, 1), group, keep)
    checks.fraction(name, "a sparsity (the fraction to drop)", sparsity, zero=True)
    if parsed:
        _, rows, columns = parsed
        if scope != "leaf":
            raise ValueError(f"{name}: blocks compete in the whole leaf, not per row")
        if inputs % rows or outputs % columns:
            raise ValueError(
                f"{name}: blocks of {nm} do not divide {inputs} inputs and "
                f"{outputs} outputs; prune by sparsity instead"
            )
        among, size, of = "block", (rows, columns), inputs * outputs // (rows * columns)
    elif scope == "row":
        among, size, of = "row", (1, 1), inputs
    else:
        among, size, of = "leaf", (1, 1), inputs * outputs
    kept = round((1 - sparsity) * of)
    if not kept:
        raise ValueError(
            f"{name} would keep none of {of} (sparsity={sparsity!r}); lower it"
        )
    return Choice(among, size, of, kept)


def _pattern(nm: str, name: str) -> tuple[str, int, int]:
    """Return separator and the two numbers of "2:4" or "16x16"."""
    parsed = re.fullmatch(r"(\d+)([:x])(\d+)", str(nm))
    first, separator, second = parsed.groups() if parsed else (0, "", 0)
    first, second = int(first), int(second)
    most = second if separator == ":" else first
    if not (1 <= first <= most and second >= 1):
        raise ValueError(
            f"{name} takes a pattern such as '2:4' (2 of 4 consecutive inputs stay) or "
            f"'16x16' (blocks of 16 inputs and 16 outputs), not {nm!r}"
        )
    return separator, first, second


@functools.partial(jax.jit, static_argnames=("axis",))
def keep_largest(score: jax.Array, kept: Any, *, axis: int = -1) -> jax.Array:
    """Return boolean: exactly the `kept` largest along an axis; of equal ones the
    first.

    The value of the last one to stay is found bit by bit: 31 passes over the scores,
    and no sort. `kept` may be traced. Scores are float32 and not negative; a negative
    one never stays.
    """
    # Non-negative floats are in the order of their bits.
    bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    total = functools.partial(jnp.sum, axis=axis, keepdims=True, dtype=jnp.int32)

    def next_bit(i: jax.Array, last: jax.Array) -> jax.Array:
        higher = last | (jnp.int32(1) << (30 - i))
        return jnp.where(total(bits >= higher) >= kept, higher, last)

    shape = list(score.shape)
    shape[axis] = 1
    last = jax.lax.fori_loop(0, 31, next_bit, jnp.zeros(shape, jnp.int32))
    above, tied = bits > last, bits == last
    room = kept - total(above)
    return above | (tied & (jnp.cumsum(tied, axis=axis, dtype=jnp.int32) <= room))


def select(score: jax.Array, chosen: Choice, kept: Any = None) -> jax.Array:
    """Mark the weights that stay, boolean like the scores `[..., inputs, outputs]`;
    traceable.

    The score of a block is the root of its sum of squares. `kept`, possibly traced,
    overrules the choice's.
    """
    kept = chosen.kept if kept is None else kept
    *stack, inputs, outputs = score.shape
    rows, columns = chosen.size
    if chosen.among == "row":
        return keep_largest(score, kept, axis=-2)
    if chosen.among == "group":
        groups = score.reshape((*stack, inputs // rows, rows, outputs))
        return keep_largest(groups, kept, axis=-2).reshape(score.shape)
    if chosen.among == "block":
        shape = (*stack, inputs // rows, rows, outputs // columns, columns)
        score = jnp.linalg.norm(jnp.swapaxes(score.reshape(shape), -3, -2), axis=-1)
        score = jnp.linalg.norm(score, axis=-1)
    mask = keep_largest(score.reshape((*stack, -1)), kept).reshape(score.shape)
    mask = jnp.repeat(mask, rows, axis=-2) if rows > 1 else mask
    return jnp.repeat(mask, columns, axis=-1) if columns > 1 else mask

"""Cutting a traced program into the blocks of a model, by the weights they read.

A program is a list of operations. Those that read the weights of one block, and what
is between them, are a segment; a loop over stacked blocks is unrolled first, so that
each of its turns is one. Between two segments the program is cut where the least is
carried on, in a transformer the residual stream. No help of the model is needed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxcompress.tracing.block_names import find_blocks, guess_blocks
from jaxcompress.tracing.jaxpr_compat import bind
from jaxcompress.tracing.unrolled import Held, Stack, scanned, unroll

Shapes = Mapping[str, Any]  # by weight name: anything with a shape and a dtype


@dataclasses.dataclass(frozen=True)
class Block:
    """A submodule, or one slice of a stack of them.

    `path` is that of the module; its weights are called `path/name` for each of
    `names`. `index` is the slice along their axis 0; None where they are whole.
    """

    path: str
    names: tuple[str, ...]
    index: int | None = None

    @property
    def label(self) -> str:
        return self.path if self.index is None else f"{self.path}[{self.index}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of a program: `segment(weights, values) -> values`.

    `block` is the block whose weights it reads, by their short names, or None; `outer`
    are the full names of other weights it reads, which `weights` has after a "/". It
    takes the values of `reads` and returns those of `writes`; `alive` are the
    variables that later segments read.
    """

    block: Block | None
    outer: tuple[str, ...]
    reads: tuple[Any, ...]
    writes: tuple[Any, ...]
    alive: frozenset[Any]
    equations: tuple[Any, ...]
    constants: Mapping[Any, Any]  # constants of the program
    weights: Mapping[Any, str]  # name by variable

    def __call__(self, weights: Mapping[str, Any], values: Sequence[Any]) -> list:
        held = {var: weights[name] for var, name in self.weights.items()}
        held |= self.constants
        held |= zip(self.reads, values, strict=True)
        for eqn in self.equations:
            inputs = [_read(held, v) for v in eqn.invars]
            held |= zip(eqn.outvars, bind(eqn, inputs), strict=True)
        return [held[var] for var in self.writes]


def cut(
    function: Callable[[Mapping[str, Any], Any], Any],
    shapes: Shapes,
    batch: Any,
    pattern: str | None,
) -> tuple[list[Segment], list[Any]]:
    """Return segments of `function(weights, batch)`, and the variables of the batch.

    Traces abstractly. What the function returns is not kept: the last segment ends
    with the last use of a weight. Without a pattern blocks are guessed; those that the
    model returns to after others are no blocks.

    Raises:
      ValueError: no submodule matches, or blocks do not follow one another.
    """
    closed = jax.make_jaxpr(function)(dict(shapes), batch)
    if pattern is not None:
        return _cut(closed, shapes, batch, find_blocks(list(shapes), pattern))
    order = sorted(shapes)
    loops = {name: loop for name, (loop, _) in scanned(closed, order).items()}
    groups = guess_blocks(order, loops)
    while True:
        try:
            return _cut(closed, shapes, batch, groups)
        except _Interleaved as error:
            groups = {p: n for p, n in groups.items() if p not in error.paths}


class _Interleaved(ValueError):
    """Blocks that do not follow one another; `paths` of those that others interrupt."""

    paths: frozenset[str] = frozenset()


def _cut(
    closed: Any, shapes: Shapes, batch: Any, groups: Mapping[str, list[str]]
) -> tuple[list[Segment], list[Any]]:
    """Cut a traced program into these blocks."""
    outer, blocks, flat, consts = _flattened(closed, shapes, batch, groups)
    sizes = [len(outer), *(len(block.names) for block in blocks)]
    owners: dict[Any, tuple[int, str]] = {}  # block number (-1: none) and name
    left = iter(flat.invars)
    for number, size in enumerate(sizes, start=-1):
        names = sorted(outer) if number < 0 else sorted(blocks[number].names)
        mark = "/" if number < 0 else ""
        owners |= {next(left): (number, mark + names[i]) for i in range(size)}
    constants = dict(zip(flat.constvars, consts, strict=True))
    inputs = list(left)
    return _segments(flat.eqns, blocks, owners, constants, inputs), inputs


def _flattened(
    closed: Any, shapes: Shapes, batch: Any, groups: Mapping[str, list[str]]
) -> tuple[list[str], list[Block], Any, list]:
    """Return outer names, blocks, and the program with its loops over blocks
    unrolled.
    """
    full = {f"{p}/{name}": (p, name) for p, names in groups.items() for name in names}
    order = sorted(shapes)
    tags = [name if name in full else None for name in order]
    lengths: dict[str, int] = {}
    for name, (_, length) in scanned(closed, tags).items():
        if lengths.setdefault(full[name][0], length) != length:
            raise ValueError(f"{name}: loops of unlike lengths run over its block")
    blocks, numbers = [], {}
    for path, names in groups.items():
        numbers[path] = len(blocks)
        indices = range(lengths[path]) if path in lengths else [None]
        blocks += [Block(path, tuple(names), index) for index in indices]
    outer = [name for name in order if name not in full]

    def run(outer: Any, parts: list[dict[str, Any]], batch: Any) -> Any:
        values: list[Any] = []
        for name in order:
            path, short = full.get(name, (None, name))
            first = numbers.get(path, -1)
            if path is None:
                values.append(Held(outer[name], -1))
            elif path not in lengths:
                values.append(Held(parts[first][short], first))
            else:
                turns = range(first, first + lengths[path])
                slices = [Held(parts[i][short], i) for i in turns]
                values.append(Stack(slices))
        return unroll(closed, values + list(map(Held, jax.tree.leaves(batch))))

    def shape(block: Block, name: str) -> jax.ShapeDtypeStruct:
        x = shapes[f"{block.path}/{name}"]
        size = x.shape if block.index is None else x.shape[1:]
        return jax.ShapeDtypeStruct(size, x.dtype)

    parts = [{name: shape(block, name) for name in block.names} for block in blocks]
    traced = jax.make_jaxpr(run)({name: shapes[name] for name in outer}, parts, batch)
    return outer, blocks, traced.jaxpr, traced.consts


def _segments(
    eqns: Sequence[Any],
    blocks: Sequence[Block],
    owners: Mapping[Any, tuple[int, str]],
    constants: Mapping[Any, Any],
    inputs: Sequence[Any],
) -> list[Segment]:
    # What follows from weights and constants alone is worked out where it is needed.
    pure: dict[Any, frozenset[Any]] = {var: frozenset([var]) for var in owners}
    pure |= dict.fromkeys(constants, frozenset())
    made_by: dict[Any, Any] = {}  # equation of each pure variable
    steps: list[Any] = []
    reads: list[frozenset[Any]] = []  # weights that the operands of each step depend on
    for eqn in eqns:
        operands = [v for v in eqn.invars if not _literal(v)]
        weights = frozenset().union(*(pure.get(v, frozenset()) for v in operands))
        if all(v in pure for v in operands):
            pure |= dict.fromkeys(eqn.outvars, weights)
            made_by |= dict.fromkeys(eqn.outvars, eqn)
        else:
            steps.append(eqn)
            reads.append(weights)
    spans = _spans(blocks, [{owners[w][0] for w in weights} for weights in reads])
    defined = dict.fromkeys(inputs, -1)
    last: dict[Any, int] = {}
    end = 1 + spans[-1][2]
    for i, eqn in enumerate(steps[:end]):
        for v in eqn.invars:
            if not _literal(v) and v not in pure:
                last[v] = i
        defined |= dict.fromkeys(eqn.outvars, i)
    bounds = [0, *_cuts(spans, defined, last), end]
    segments = []
    for (number, _, _), (start, stop) in zip(
        spans, itertools.pairwise(bounds), strict=True
    ):
        own = steps[start:stop]
        used = dict.fromkeys(v for e in own for v in e.invars if not _literal(v))
        names = dict.fromkeys(
            w for i in range(start, stop) for w in _in_order(reads[i], owners)
        )
        segments.append(
            Segment(
                block=None if number < 0 else blocks[number],
                outer=tuple(owners[w][1][1:] for w in names if owners[w][0] < 0),
                reads=tuple(v for v in used if v not in pure and defined[v] < start),
                writes=tuple(
                    v for e in own for v in e.outvars if last.get(v, -1) >= stop
                ),
                alive=frozenset(v for v, i in last.items() if defined[v] < stop <= i),
                equations=(*_recipe(used, made_by), *own),
                constants=constants,
                weights={w: owners[w][1] for w in names},
            )
        )
    return segments


def _in_order(weights: frozenset[Any], owners: Mapping[Any, tuple[int, str]]) -> list:
    return sorted(weights, key=lambda w: owners[w])


def _spans(
    blocks: Sequence[Block], readers: Sequence[set[int]]
) -> list[tuple[int, int, int]]:
    """Number (-1: outer), first and last step of each stretch, in order."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, numbers in enumerate(readers):
        for number in numbers - {-1}:
            first.setdefault(number, i)
            last[number] = i
    if (blocks and not first) or not any(readers):
        raise ValueError("the model uses no weight of any block on these batches")
    spans = sorted(((n, first[n], last[n]) for n in first), key=lambda span: span[1])
    _check_turns(blocks, spans)
    inside = {i for _, start, stop in spans for i in range(start, stop + 1)}
    for i, numbers in enumerate(readers):
        if -1 in numbers and i not in inside:
            spans.append((-1, i, i))
    spans.sort(key=lambda span: span[1])
    merged = [spans[0]]
    for number, start, stop in spans[1:]:
        if number == merged[-1][0] == -1:
            merged[-1] = (-1, merged[-1][1], stop)
        else:
            merged.append((number, start, stop))
    return merged


def _check_turns(
    blocks: Sequence[Block], spans: Sequence[tuple[int, int, int]]
) -> None:
    """Raise `_Interleaved` where a block begins before another ends.

    Of two such blocks the one that is used last is named in `paths`.
    """
    overlaps = [
        (a, b)
        for (a, _, stop), (b, start, _) in itertools.pairwise(spans)
        if start <= stop
    ]
    if not overlaps:
        return
    a, b = overlaps[0]
    error = _Interleaved(
        f"the blocks {blocks[a].label} and {blocks[b].label} do not follow one "
        "another: the model goes back to the first after it has used the second. Pass "
        "blocks= a pattern of modules that run in turn, or compress the model whole "
        "with collect_moments"
    )
    kept: list[tuple[int, int, int]] = []
    paths = set()
    for span in spans:
        while kept and span[1] <= kept[-1][2] and span[2] < kept[-1][2]:
            paths.add(blocks[kept.pop()[0]].path)
        if kept and span[1] <= kept[-1][2]:
            paths.add(blocks[span[0]].path)
        else:
            kept.append(span)
    error.paths = frozenset(paths)
    raise error


def _cuts(
    spans: Sequence[tuple[int, int, int]],
    defined: Mapping[Any, int],
    last: Mapping[Any, int],
) -> list[int]:
    """Choose before which step to cut, between every two stretches."""
    size = 2 + spans[-1][2]
    change = [0] * (size + 1)
    for var, stop in last.items():  # alive at cuts after its step up to its last use
        change[defined[var] + 1] += _nbytes(var)
        change[stop + 1] -= _nbytes(var)
    alive = [sum(change[: i + 1]) for i in range(size)]
    return [
        min(range(before + 1, start + 1), key=lambda i: alive[i])
        for (_, _, before), (_, start, _) in itertools.pairwise(spans)
    ]


def _recipe(needed: Mapping[Any, None], made_by: Mapping[Any, Any]) -> list:
    """Return equations of the pure variables among these, and of what they need, in
    order.
    """
    ordered: dict[int, Any] = {}

    def visit(var: Any) -> None:
        eqn = made_by.get(var)
        if eqn is None or id(eqn) in ordered:
            return
        for v in eqn.invars:
            if not _literal(v):
                visit(v)
        ordered[id(eqn)] = eqn

    for var in needed:
        visit(var)
    return list(ordered.values())


def _nbytes(var: Any) -> int:
    return math.prod(var.aval.shape) * getattr(var.aval.dtype, "itemsize", 8)


def _literal(v: Any) -> bool:
    return isinstance(v, core.Literal)


def _read(held: Mapping[Any, Any], v: Any) -> Any:
    return v.val if _literal(v) else held[v]

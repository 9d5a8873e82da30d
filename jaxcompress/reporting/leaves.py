"""Tables of leaves: what a recipe takes, and what it did."""

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcompress.reporting.tables import leaf_table, render, table
from jaxcompress.storage.checkpoint import open_checkpoint, save
from jaxcompress.tree.compress import chain, compress
from jaxcompress.tree.generic_leaves import Reshaped
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import Leaf
from jaxcompress.tree.methods import describe, traits
from jaxcompress.tree.paths import check_names, roots, shape_of
from jaxcompress.tree.record import LeafReport, leaf_reports
from jaxcompress.tree.selection import bind
from jaxcompress.types import Params, Recipe


@dataclasses.dataclass(frozen=True)
class LeafTable:
    """One `LeafReport` a leaf; prints as a table, iterates over the reports.

    Args:
      rows: the reports, in the order of the tree.
      file_bytes: of each leaf in a file, by name, without header.
    """

    rows: tuple[LeafReport, ...]
    file_bytes: Mapping[str, int]

    def __iter__(self) -> Iterator[LeafReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> LeafReport:
        """Return the report at an index, or of a leaf's name."""
        if isinstance(index, str):
            return next(row for row in self.rows if row.name == index)
        return self.rows[index]

    def __str__(self) -> str:
        return render(leaf_table(self.rows, self.file_bytes))

    __repr__ = __str__


def report(
    params: Params, small: Params, record: list[LeafReport] | None = None
) -> LeafTable:
    """Compare a tree before and after compression, leaf by leaf.

        record = []
        small = jc.compress(params, "symmetric(bits=4, block=64)", record=record)
        print(jc.report(params, small, record))

    Args:
      params: the tree before.
      small: the tree after, of the same names.
      record: what `compress` recorded: adds methods, reasons, and errors of outputs
        where moments were given.

    Returns:
      Bytes in memory and in a file (`small` is written once, to a temporary folder),
      bits per weight in memory, errors of weights and outputs.

    Raises:
      ValueError: `small` lacks a name of `params`.

    Example:
      >>> small = jc.compress(params, "symmetric(bits=4)")
      >>> table = jc.report(params, small)
    """
    check_names([name for name, _ in roots(params)])
    later = dict(roots(small))
    for name, _ in roots(params):
        if name not in later:
            raise ValueError(
                f"{name}: the second tree has no such leaf; pass the tree that "
                "compress made from the first"
            )
    rows = {row.name: row for row in record or ()}
    fresh = leaf_reports(params, small)
    merged = tuple(
        dataclasses.replace(
            row,
            method=rows[row.name].method,
            reason=rows[row.name].reason,
            output_error=rows[row.name].output_error,
        )
        if row.name in rows
        else dataclasses.replace(row, method=_kind(later[row.name]))
        for row in fresh
    )
    return LeafTable(merged, _file_bytes(small))


def _kind(value: Any) -> str:
    value = value.inner if isinstance(value, Reshaped) else value
    return type(value).__name__ if isinstance(value, Leaf) else ""


def _file_bytes(small: Params) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.safetensors"
        save(path, small)
        with open_checkpoint(path) as stored:
            return {name: stored.nbytes(name) for name in stored.names}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Row of `explain`: a method, or a reason why a leaf stays."""

    name: str
    shape: tuple[int, ...]
    method: str
    reason: str
    share: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One `Choice` a leaf; prints as a table. `note` names stages that need values."""

    rows: tuple[Choice, ...]
    note: str = ""

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        rows = [
            {
                "leaf": row.name,
                "shape": "x".join(map(str, row.shape)),
                "method": row.method or f"none: {row.reason}",
                "of weights": f"{row.share:.1%}",
            }
            for row in self.rows
        ]
        return render(table(rows), *([self.note] if self.note else []))

    __repr__ = __str__


def explain(
    params: Params,
    recipe: Recipe,
    *,
    layouts: Mapping[str, Layout] | None = None,
) -> Explanation:
    """Tell which method takes which leaf, and why the others stay.

    Computes nothing: shapes are enough, `params` may hold `jax.ShapeDtypeStruct`.

        print(jc.explain(params, [(".*embedding", None), (".*kernel", "nf4()")]))

    Args:
      params: pytree of arrays, leaves or shapes.
      recipe: as for `compress`.
      layouts: as for `compress`.

    Returns:
      A row per outermost leaf. A stage after a host method, whose shapes depend on
      values, cannot be foretold and is named in the note.

    Raises:
      ValueError: what `compress` raises of a recipe.

    Example:
      >>> table = jc.explain(params, "symmetric(bits=4)")
    """
    shapes = jax.tree.map(shape_of, params)
    total = sum(math.prod(value.shape) for _, value in roots(shapes)) or 1
    methods: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    stages, small, note = chain(recipe).stages, shapes, ""
    for number, stage in enumerate(stages):
        bound = bind(small, stage, layouts=layouts)
        owner = {entry.name: entry.root for entry in bound.entries}
        for name, reason in bound.reasons.items():
            reasons.setdefault(owner[name], reason)
        for name, method in bound.methods.items():
            methods.setdefault(owner[name], []).append(describe(method))
        if number + 1 == len(stages):
            break
        host = [describe(f) for f in bound.methods.values() if not traits(f).traceable]
        if host:
            later = ", ".join(map(str, stages[number + 1 :]))
            note = f"not foretold, because {host[0]} looks at values: {later}"
            break
        small = jax.eval_shape(
            lambda tree, stage=stage: compress(tree, stage, layouts=layouts), small
        )
    rows = tuple(
        Choice(
            name=name,
            shape=tuple(value.shape),
            method=" > ".join(dict.fromkeys(methods.get(name, ()))),
            reason="" if name in methods else reasons.get(name, ""),
            share=math.prod(value.shape) / total,
        )
        for name, value in roots(shapes)
    )
    return Explanation(rows, note)

"""Leaves that a plan is of: those of a tree, or of a file, read one at a time."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from jaxcompress.calibration.lazy_params import source_of
from jaxcompress.calibration.moment_files import in_memory
from jaxcompress.calibration.moments import Moments
from jaxcompress.tree.paths import Entry
from jaxcompress.types import LazyParams, Params

Source = Params | LazyParams | str | os.PathLike


class Planned(NamedTuple):
    """Leaves to plan.

    Args:
      entries: of the leaves; of a file they have shapes in place of values.
      read: from an entry to the one with its value, and moments, in memory.
      tree: of values or shapes, all leaves in it.
    """

    entries: list[Entry]
    read: Callable[[Entry], Entry]
    tree: Params


@contextlib.contextmanager
def planned_leaves(
    params: Source, select: Callable[[Params], list[Entry]]
) -> Iterator[Planned]:
    """Select leaves of a tree, of the path of a file, or of an open checkpoint.

    `select` is from a tree to its leaves; of a file the tree has shapes.
    """
    with source_of(params) as source:

        def read(entry: Entry) -> Entry:
            moments, value = entry.moments, entry.value
            if isinstance(moments, Moments):
                moments = in_memory(moments)
            if isinstance(value, jax.ShapeDtypeStruct):
                value = source.fetch(entry.name)
            return dataclasses.replace(entry, value=value, moments=moments)

        yield Planned(select(source.tree), read, source.tree)

"""The scope in which entropy-coded leaves are decoded: one leaf, or a whole tree."""

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from typing import Any

import jax

from jaxcompress.types import Params

# Work that `decoding` announces, by the compiled program that could do it; per thread.
_announced: ContextVar[Counter | None] = ContextVar("announced", default=None)


@contextlib.contextmanager
def decoding(params: Params) -> Iterator[None]:
    """Announce that all entropy-coded arrays of a tree are decoded inside.

    NumPy decodes one small array sooner than XLA compiles a program for it, but one
    program serves many arrays of a shape. A leaf type that chooses between the two has
    a method `decoding_work() -> (program, work)`: any hashable key of the program that
    would decode it, and the work in a unit of its own.
    """
    total: Counter = Counter()
    for x in jax.tree.leaves(params, is_leaf=_chooses):
        if _chooses(x):
            program, work = x.decoding_work()
            total[program] += work
    token = _announced.set(total)
    try:
        yield
    finally:
        _announced.reset(token)


def announced(program: Hashable, work: int) -> int:
    """Return the work of all leaves of the surrounding `decoding` with this program.

    Outside, and for a leaf that was not announced, the leaf's own `work`.
    """
    total = _announced.get()
    return work if total is None else max(work, total[program])


def _chooses(x: Any) -> bool:
    return hasattr(x, "decoding_work")

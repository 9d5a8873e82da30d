"""Work on chunks in threads: NumPy and the compressors release the interpreter."""

import collections
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = 8  # each has some 30 MB to work in; more would wait for memory
TINY = 1 << 18  # bytes of an array whose coding is Python's work, for the most part
SMALL = 1 << 22  # bytes of an array that one thread codes, with others at the same time
TOGETHER = 1 << 26  # bytes of such arrays in memory at a time, at most


def in_order(
    function: Callable[[Any], Any], items: Iterable[Any], *, threads: int | None = None
) -> Iterator[Any]:
    """Apply `function` to each item in threads and yield in order, some items ahead.

    Args:
      threads: at most; as many as there are processors, 8 at most, if None.
    """
    threads = min(os.cpu_count() or 1, THREADS) if threads is None else threads
    items = iter(items)
    if threads < 2:
        yield from map(function, items)
        return
    first = [item for _, item in zip(range(2), items, strict=False)]
    if len(first) < 2:  # a thread would cost more
        yield from map(function, first)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead = collections.deque(pool.submit(function, item) for item in first)
        try:
            for item in items:
                if len(ahead) > threads:
                    yield ahead.popleft().result()
                ahead.append(pool.submit(function, item))
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def in_groups(
    names: Iterable[str], sizes: Mapping[str, int]
) -> Iterator[tuple[bool, Iterator[str]]]:
    """Return arrays in their order: small ones, to be worked on together, or one large
    one.

    Args:
      names: of the arrays, in the order of groups.
      sizes: in bytes, by name, in the same order.

    Returns: for each group whether it is of small arrays, and their names.
    """
    groups, number, held = {}, 0, 0
    for name, size in sizes.items():
        small = size <= SMALL
        if held + size > TOGETHER:
            number, held = number + 1, 0
        groups[name] = number, small
        held += size if small else TOGETHER + 1
    for (_, small), group in itertools.groupby(names, groups.get):
        yield small, group


def of_arrays(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    size: Callable[[Any], int],
) -> Iterator[Any]:
    """Apply `in_order` to groups of small arrays; this thread handles tiny ones itself.

    Threads would only take turns at those. `size` tells the bytes of an item.
    """

    def batches() -> Iterator[tuple[list[Any], list[Any]]]:
        done = []
        for item in items:
            if size(item) >= TINY:
                yield done, [item]
                done = []
            else:
                done.append(function(item))
        yield done, []

    def finish(batch: tuple[list[Any], list[Any]]) -> list[Any]:
        done, rest = batch
        return [*done, *map(function, rest)]

    return itertools.chain.from_iterable(in_order(finish, batches()))

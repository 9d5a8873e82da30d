"""Work on chunks in threads: NumPy and the compressors release the interpreter."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_order(
    function: Callable[[Any], Any], items: Iterable[Any], *, threads: int | None = None
) -> Iterator[Any]:
    """`function` of each item, in their order, some items ahead of what is asked for.

    Args:
      threads: at most; as many as there are processors if None.
    """
    threads = os.cpu_count() or 1 if threads is None else threads
    items = iter(items)
    if threads < 2:
        yield from map(function, items)
        return
    first = [item for _, item in zip(range(2), items, strict=False)]
    if len(first) < 2:  # not worth a thread
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

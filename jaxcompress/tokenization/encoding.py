"""Much text to ids: in order, in batches, on several processes."""

import collections
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np

from jaxcompress.tokenization.tokenizer import Tokenizer, from_bytes

_BATCH = 1 << 20  # characters of text that a process gets at once
_AHEAD = 2  # batches for each process that are read ahead

_worker: Tokenizer | None = None  # in a process of the pool only


def encode_many(
    tokenizer: Tokenizer, texts: Iterable[str], *, processes: int = 1
) -> Iterator[np.ndarray]:
    """Return ids of each text, int32, in the order of the texts.

    Ids are those of `tokenizer.encode`, whatever the number of processes. Texts are
    read a few batches ahead and no further, so that a stream longer than memory can
    pass through. Each process is a fresh interpreter (spawned, because forking a
    process in which JAX runs can deadlock) that imports this package and rebuilds the
    tokenizer: some seconds, which pay from some tens of megabytes on. A script must
    therefore begin its work under `if __name__ == "__main__":`.

    Args:
      tokenizer: what encodes.
      texts: any number of them; a text is not cut, so split huge ones where it may be.
      processes: 1 encodes in this one.

    Raises:
      ValueError: on less than one process; in a process, what `encode` raises.

    Example:
      >>> ids = list(jc.tokenization.encode_many(tokenizer, ["a small", "text"]))
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; at least 1 is needed")
    if isinstance(texts, str):
        raise ValueError("texts is one string; pass a list of texts")
    if processes == 1:
        return (np.array(tokenizer.encode(text), np.int32) for text in texts)
    return _encode_apart(tokenizer.to_bytes(), texts, processes)


def _encode_apart(
    stored: bytes, texts: Iterable[str], processes: int
) -> Iterator[np.ndarray]:
    context = multiprocessing.get_context("spawn")
    pending: collections.deque[Future] = collections.deque()
    with ProcessPoolExecutor(processes, context, _begin, (stored,)) as pool:
        for batch in _batches(texts):
            pending.append(pool.submit(_encode_batch, batch))
            if len(pending) > _AHEAD * processes:
                yield from _apart(*pending.popleft().result())
        while pending:
            yield from _apart(*pending.popleft().result())


def _begin(stored: bytes) -> None:
    global _worker
    _worker = from_bytes(stored)


def _encode_batch(texts: list[str]) -> tuple[np.ndarray, list[int]]:
    """Return all ids in one array, and how many each text has."""
    encoded = [_worker.encode(text) for text in texts]
    return np.array([i for ids in encoded for i in ids], np.int32), list(
        map(len, encoded)
    )


def _apart(ids: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(counts[:-1])) if counts else []


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

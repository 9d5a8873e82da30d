"""Clocks, and calls that take turns, so that other work slows all alike."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


class Clock:
    """Seconds that passed, and that the processor worked, since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        """Seconds that passed."""
        return time.perf_counter() - self._wall

    @property
    def processor_seconds(self) -> float:
        """Seconds of all processors together."""
        return time.process_time() - self._processor


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Call a function: its result, seconds passed, and seconds of the processor."""
    clock = Clock()
    result = jax.block_until_ready(function())
    return result, clock.seconds, clock.processor_seconds


def interleaved(
    functions: Sequence[Callable[[], Any]], rounds: int, *, warm: bool = True
) -> np.ndarray:
    """Time functions in turn, `[rounds, functions, 2]`: passed, of the processor.

    Args:
        functions: what they return is waited for.
        rounds: how often each is called.
        warm: call each once before, to compile it.
    """
    if warm:
        for function in functions:
            jax.block_until_ready(function())
    return np.array(
        [[timed(function)[1:] for function in functions] for _ in range(rounds)]
    )

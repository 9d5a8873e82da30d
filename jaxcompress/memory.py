"""Memory of this process: the most it held, and what it can return."""

import ctypes
import gc
import sys

import jax


def peak_memory() -> int | None:
    """Return most bytes this process has held so far; None where the system does not
    say.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def give_back_memory(programs: bool = True) -> None:
    """Return freed memory to the system, which compilers and allocators keep.

    Args:
      programs: drop compiled programs too; one that runs again is compiled again.
    """
    if programs:
        jax.clear_caches()
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(0)

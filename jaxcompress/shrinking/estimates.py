"""Time and memory that a shrink takes, estimated before it starts."""

import time

import jax
import jax.numpy as jnp

from jaxcompress.progress import clock
from jaxcompress.shrinking.efforts import Effort
from jaxcompress.shrinking.subject import Subject
from jaxcompress.tree.leaf import nbytes
from jaxcompress.tree.paths import Entry

# Processor work per weight, in multiples of one multiplication at the speed of a matrix
# product: the search for a step, whole leaves several times, and coding.
ROUNDING, TRELLIS = 3e4, 2.5e5
SIDE = 1024  # of the matrices that speed is measured with


def estimate(
    subject: Subject, planned: list[Entry], effort: Effort, *, writes: bool
) -> tuple[float, int]:
    """Return seconds and bytes, to a factor of about two.

    The machine's speed is that of one product of matrices, measured now.

    Args:
      subject: the model.
      planned: what is compressed.
      effort: to be spent.
      writes: whether the model writes its calibration text.
    """
    weights = sum(entry.value.size for entry in planned)
    tokens = effort.texts * effort.length if subject.language else effort.texts
    rows = effort.curvature_rows
    length = effort.curvature_length if subject.language else 1
    passes = 2.0 * tokens * (2 if writes else 1)  # reading; writing as well
    passes += 6.0 * rows * length + 8.0 * effort.tuning_steps * effort.length
    compressions = 2 if effort.texts else 1  # the plan and the uniform recipe
    coding = compressions * (TRELLIS if effort.states else ROUNDING)
    seconds = weights * (passes + coding) / _speed()
    squares = [4 * entry.value.shape[-2] ** 2 for entry in planned if effort.texts]
    held = nbytes(subject.params)
    copies = 4 if effort.texts else 2  # gradient, squares of it, what is measured
    vocabulary = getattr(subject.model, "vocab_size", 1)
    logits = 4 * 4 * effort.length * vocabulary if effort.texts else 0
    return seconds, int(copies * held + 3 * sum(squares) + logits)


def describe_estimate(seconds: float, memory: int) -> str:
    """Return one line for the reader who waits."""
    return (
        f"about {clock(max(seconds, 1.0))} and {memory / 2**30:.1f} GiB of memory, "
        "estimated to a factor of two"
    )


def _speed() -> float:
    """Return multiplications a second of float32 matrix products, on the default
    device.
    """
    x = jnp.ones((SIDE, SIDE), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    start = time.perf_counter()
    jax.block_until_ready(product(x, x))
    return SIDE**3 / max(time.perf_counter() - start, 1e-6)

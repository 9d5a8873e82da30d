"""Time and memory that a shrink takes, estimated before it starts."""

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcompress.progress import clock
from jaxcompress.shrinking.efforts import Effort
from jaxcompress.shrinking.subject import Subject
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import nbytes
from jaxcompress.tree.paths import Entry

# Work per weight of a search for a rate, in multiplications at the speed of a matrix
# product: steps are sought on whole leaves several times, and levels are coded.
ROUNDING, TRELLIS = 3e4, 9e4
WRITING = 1.5  # a token that is written costs so many that are read
COMPILING = 8  # seconds for the programs of a compression, whatever the model's size
STAGES = 4  # calibrating compiles so many times as much
OWN = 500 * 2**20  # bytes of the libraries and of their compiled programs
SIDE, REPEATS = 1024, 5  # of the products that speed is measured with


def estimate(
    subject: Subject,
    planned: list[Entry],
    layouts: Mapping[str, Layout],
    effort: Effort,
    *,
    writes: bool,
    tries: int = 1,
) -> tuple[float, int]:
    """Return seconds and bytes, to a factor of about two.

    The machine's speed is that of one product of matrices, measured now.

    Args:
      subject: the model.
      planned: what is compressed.
      layouts: of these leaves, as far as they are known.
      effort: to be spent.
      writes: whether the model writes its calibration text.
      tries: plans that are compressed until the goal is met.
    """
    shapes = [_matrix_shape(entry, layouts.get(entry.name)) for entry in planned]
    weights = sum(math.prod(shape) for shape in shapes)
    inputs = [shape[-2] for shape in shapes]  # features of an embedding
    squares = sum(
        math.prod(shape[:-2]) * size**2
        for shape, size in zip(shapes, inputs, strict=True)
    )
    calibrates = effort.texts > 0
    tokens = effort.texts * effort.length if subject.language else effort.texts
    rows = effort.curvature_rows if calibrates else 0
    length = effort.curvature_length if subject.language else 1
    work = tokens * weights * WRITING if writes else 0.0
    work += tokens * (weights + squares) if calibrates else 0
    # Forward and backward, and the gradient's product with a factor of the moments.
    metric = sum(
        math.prod(shape) * size for shape, size in zip(shapes, inputs, strict=True)
    )
    work += rows * (3.0 * length * weights + metric)
    work += 8.0 * effort.tuning_steps * effort.length * weights
    compressions = tries + effort.compares  # plans, and the uniform recipe
    work += compressions * (TRELLIS if effort.states else ROUNDING) * weights
    held = nbytes(subject.params)
    vocabulary = getattr(subject.model, "vocab_size", 1)
    logits = 4 * length * vocabulary
    measuring = 3 * held + 4 * squares * 4 + 3 * logits if calibrates else 0
    compressing = 2 * held + 4 * squares * (1 if calibrates else 0)
    compiling = COMPILING * (1 + STAGES * calibrates + (effort.tuning_steps > 0))
    return compiling + work / _speed(), int(max(measuring, compressing) + OWN)


def _matrix_shape(entry: Entry, layout: Layout | None) -> tuple[int, ...]:
    """Return shape `[..., inputs, outputs]`; an embedding's features are its inputs."""
    shape = entry.value.shape
    if layout is not None:
        laid_out = dataclasses.replace(entry, caller_layout=layout)
        return jax.eval_shape(laid_out.matrix, entry.value).shape
    return (*shape[:-2], shape[-1], shape[-2]) if entry.embedding else shape


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
    taken = []
    for _ in range(REPEATS):  # other programs only ever make it slower
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        taken.append(time.perf_counter() - start)
    return SIDE**3 / max(min(taken), 1e-6)

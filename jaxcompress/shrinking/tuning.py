"""Steps of codes and norms trained toward the model's predictions, codes held fixed."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.distillation.losses import forward_kl
from jaxcompress.running.decode_once import code_again, decode_once
from jaxcompress.shrinking.quality import first_output
from jaxcompress.shrinking.subject import Subject
from jaxcompress.training import optimizers
from jaxcompress.training.runs import train
from jaxcompress.training.steps import (
    cast_like,
    init_state,
    make_train_step,
)
from jaxcompress.tree.leaf import Leaf
from jaxcompress.tree.paths import is_float, roots
from jaxcompress.types import Params

RATE = 3e-3  # relative to the size of what trains


def tune(
    subject: Subject,
    small: Params,
    batches: Sequence[Any],
    *,
    steps: int,
    progress: Any,
    folder: Any = None,
    key: jax.Array,
) -> Params:
    """Train what the file stores in floating point; integer levels stay.

    Trained norms and biases are rounded to bfloat16 values, in their own dtype, so
    that the file does not grow by mantissas that carry nothing.

    Args:
      subject: the model; its parameters are the teacher.
      small: `RateCoded` leaves among dense ones.
      batches: of calibration, cycled; their first example each where they hold more.
      steps: of training.
      progress: wraps the list of steps.
      folder: for checkpoints, from which a killed run resumes.
      key: of the run.

    Returns:
      The tree in its dtypes, coded again.
    """
    start = decode_once(small)
    changing = []
    for name, leaf in roots(start):
        if isinstance(leaf, Leaf):
            if hasattr(leaf, "steps"):
                changing.append(re.escape(name) + "/steps")
        elif is_float(leaf) and leaf.size:
            changing.append(re.escape(name))
    inner = optimizers.relative_adam(RATE, steps)
    optimizer = optimizers.by_name([("|".join(changing), inner), (".*", None)])
    loss_fn = jax.tree_util.Partial(
        functools.partial(_loss, subject.function, subject.function_to_train()),
        subject.params,
    )
    turns = iter(progress(list(range(steps))))
    state = train(
        make_train_step(loss_fn, optimizer),
        init_state(start, optimizer, dtype=jnp.float32, key=key),
        lambda number: batches[number % len(batches)],
        steps=steps,
        folder=folder,
        every=32,
        report=lambda number, metrics: next(turns, None),
    )
    for _ in turns:
        pass
    tuned = cast_like(_shorten(state.params), start)
    return code_again(tuned, small)


def _loss(
    dense: Any, small: Any, teacher: Params, params: Params, batch: Any, key: jax.Array
) -> Any:
    """Return the mean divergence of the function `small` from the teacher's."""
    target = first_output(dense(teacher, batch))
    logits = first_output(small(params, batch))
    nats = forward_kl(logits, jax.lax.stop_gradient(target))
    return jnp.mean(nats), {}


def _shorten(params: Params) -> Params:
    """Return dense floating-point arrays with the mantissas of bfloat16."""

    def one(x: Any) -> Any:
        if isinstance(x, Leaf) or not is_float(x):
            return x
        return x.astype(jnp.bfloat16).astype(x.dtype)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Leaf))

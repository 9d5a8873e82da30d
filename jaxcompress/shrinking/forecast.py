"""Forecast of a shrink, from shapes alone: size, time and memory."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.models.loading import REFERENCE, open_weights, shapes
from jaxcompress.models.saved import reference_file
from jaxcompress.models.stacking import unstack_layers
from jaxcompress.shrinking.efforts import choose_effort
from jaxcompress.shrinking.estimates import estimate
from jaxcompress.shrinking.fitting import AIM, Coder, room_of
from jaxcompress.shrinking.goals import Goal
from jaxcompress.shrinking.preparation import find_kernel_layouts
from jaxcompress.shrinking.search import KL_TRIES
from jaxcompress.shrinking.stages import Stages
from jaxcompress.shrinking.store import Store
from jaxcompress.shrinking.subject import Subject, read_subject, stacked
from jaxcompress.storage.checkpoint import StoredParams
from jaxcompress.tree.paths import roots
from jaxcompress.tree.selection import planned_entries
from jaxcompress.types import Params


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Amounts that are known before any weight is read.

    `file_bytes` is the largest size of the file, `planned_bytes` what of it is left for
    the leaves that a plan shares it out over; both are None for a goal in KL.
    `seconds` and `memory_bytes` are estimates, to a factor of two.
    """

    weights: int
    planned_weights: int
    file_bytes: int | None
    planned_bytes: int | None
    seconds: float
    memory_bytes: int


def read_shapes(name: str | Path, *, stack: bool = True) -> Subject:
    """Return subject whose parameters are `ShapeDtypeStruct`s; reads no weight.

    Args:
      name: what `models.load` takes.
      stack: the layers, where they are alike; False: one by one.

    Raises:
      ValueError: a file of compressed parameters. As `models.load` besides.
    """
    path = contextlib.nullcontext(name)
    if str(name) == REFERENCE:
        path = reference_file()
    with path as source:
        model, lazy, tokenizer = open_weights(source)
        names, kinds = lazy.tree, {"array"}
        if isinstance(lazy, StoredParams):
            names = names["params"]
            kinds = {lazy.describe(leaf)[0] for leaf in jax.tree.leaves(names)}
            lazy.close()
    if kinds != {"array"} and str(name) != REFERENCE:
        raise ValueError(
            f"{name} is compressed already; start from the model it was made from"
        )
    by_name = shapes(name)
    params = jax.tree.map(lambda leaf: by_name[leaf.removeprefix("params/")], names)
    if not stack and model.scan:
        model, params = model.clone(scan=False), jax.eval_shape(unstack_layers, params)
    if stack:
        model, params = _stacked(model, params)
    return read_subject(model, params, tokenizer)


def forecast(subject: Subject, goal: Goal, effort: str, *, writes: bool) -> Forecast:
    """Estimate what a shrink takes, and how much of the file weights can have.

    Args:
      subject: of arrays, or of their shapes.
      goal: of the shrink.
      effort: its name.
      writes: whether a language model writes its calibration text.

    Raises:
      ValueError: what is not planned fills the file already.
    """
    chosen = choose_effort(effort)
    planned = planned_entries(subject.params, None, None)
    layouts = find_kernel_layouts(subject, None)
    needs = chosen.texts > 0 or goal.kl is not None
    seconds, memory = estimate(
        subject,
        planned,
        layouts,
        chosen,
        writes=writes and needs and subject.language,
        tries=1 if goal.kl is None else KL_TRIES,
    )
    room = None
    if goal.file_bytes is not None:
        names = {entry.name for entry in planned}
        rest = dataclasses.replace(subject, params=_filled(subject.params, names))
        about = {"source": "forecast"}
        coder = Coder(rest, planned, None, {}, about, Store(None), [], Stages(False))
        room = room_of(coder, goal.file_bytes, AIM)
    weights = sum(entry.value.size for entry in planned)
    return Forecast(subject.weights, weights, goal.file_bytes, room, seconds, memory)


def _stacked(model: object, params: Params) -> tuple[object, Params]:
    """Return model and shapes of its stacked layers, as `stacked` stacks arrays."""
    models = []

    def run(tree: Params) -> Params:
        scanned, tree = stacked(model, tree)
        models.append(scanned)
        return tree

    later = jax.eval_shape(run, params)
    return models[0], later


def _filled(params: Params, planned: set[str]) -> Params:
    """Return numbers for the shapes that are not planned: how they code is not known,
    so that they are random.
    """
    random = np.random.default_rng(0)
    filled = {
        name: jnp.asarray(random.normal(1, 0.3, x.shape), x.dtype)
        for name, x in roots(params)
        if name not in planned
    }
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, [filled.get(n, x) for n, x in roots(params)])

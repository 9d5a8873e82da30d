"""Training runs that may be killed at any time and resume from a checkpoint."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxcompress.storage import static_json
from jaxcompress.storage.orbax import restore_orbax, save_orbax
from jaxcompress.training.steps import Metrics, TrainState, check_batch
from jaxcompress.tree.leaf import data_fields, is_leaf, static_fields
from jaxcompress.tree.paths import key_name
from jaxcompress.types import Batch, Params

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

_NAME = re.compile(r"step_(\d{8})")
_LEAVES = "leaves"  # next to the arrays of a state


def train(
    step: Step,
    state: TrainState,
    batch_at: Callable[[int], Batch],
    *,
    steps: int,
    folder: str | os.PathLike | None = None,
    every: int = 100,
    max_to_keep: int = 2,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainState:
    """Run until `steps` updates are done; with a folder, resume from its checkpoint.

    A run killed and started again with the same arguments ends with the same bits: the
    batch, like the key, is a function of the step number.

    Args:
      step: from `make_train_step`.
      state: to start from, donated; where the folder has a checkpoint, that one,
        sharded as this state is.
      batch_at: the batch of a step, counted from 0.
      steps: updates in all, those before a resumption included.
      folder: for checkpoints `step_00000100` and so on; the last one too.
      every: steps between two checkpoints.
      max_to_keep: checkpoints that stay.
      report: called after each step with its number, from 1, and its metrics.

    Raises:
      FloatingPointError: a loss, gradient or update that is not finite; names the
        step, and the checkpoint that stays.
      ValueError: an empty batch, naming the step; an option out of range; a checkpoint
        of another run.

    Example:
      >>> step = jc.make_train_step(loss_fn, optax.adam(1e-3))
      >>> state = jc.distillation.init_state(params, optax.adam(1e-3), key=key)
      >>> state = jc.distillation.train(step, state, lambda i: batches[0], steps=1)
    """
    if steps < 0 or every < 1 or max_to_keep < 1:
        raise ValueError(
            f"steps is {steps}, every {every}, keep {max_to_keep}; steps must not be "
            "negative, the others at least 1"
        )
    latest = None if folder is None else latest_checkpoint(folder)
    if latest is not None:
        state = restore_state(latest, state)
    done = int(state.step)
    while done < steps:
        batch = batch_at(done)
        try:
            check_batch(batch)
        except ValueError as error:
            raise ValueError(f"step {done + 1}: {error}") from error
        state, metrics = step(state, batch)
        numbers = {name: x.item() for name, x in jax.device_get(metrics).items()}
        if numbers.get("weight") == 0:
            raise ValueError(f"step {done + 1}: an empty batch: no position counts")
        if not numbers["finite"]:
            kept = "no checkpoint was written" if latest is None else f"{latest} stays"
            raise FloatingPointError(
                f"step {done + 1}: the loss is {numbers['loss']}, the norm of its "
                f"gradient {numbers['gradient_norm']}, that of the update "
                f"{numbers['update_norm']}; {kept}. Lower the learning rate, clip "
                "gradients, or look at this batch"
            )
        done += 1
        if report is not None:
            report(done, numbers)
        if folder is not None and (done % every == 0 or done == steps):
            latest = Path(folder) / f"step_{done:08d}"
            save_state(latest, state)
            _remove_old(folder, max_to_keep)
    return state


def save_state(path: str | os.PathLike, state: TrainState) -> None:
    """Write a state as an Orbax checkpoint next to `path`, and rename it.

    Raises ValueError where `path` exists.

    Args:
      path: of the checkpoint, which must not exist.
      state: a `TrainState`, or any pytree of arrays and leaves.

    Example:
      >>> state = jc.distillation.init_state(params, optax.sgd(0.1), key=key)
      >>> jc.distillation.save_state("step_00000001", state)
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_orbax(path, _named(state) | {_LEAVES: _leaf_kinds(state.params)})


def restore_state(path: str | os.PathLike, like: TrainState) -> TrainState:
    """Restore the state that `save_state` wrote, bit for bit, placed as the arrays of
    `like` are.

    Raises ValueError where names, shapes, dtypes, or types of compressed leaves are not
    those of `like`: another model, recipe or optimizer.

    Args:
      path: of the checkpoint.
      like: a state of the same run, for its structure and its devices.

    Example:
      >>> state = jc.distillation.init_state(params, optax.sgd(0.1), key=key)
      >>> jc.distillation.save_state("step_00000001", state)
      >>> state = jc.distillation.restore_state("step_00000001", state)
    """
    wanted = _named(like)
    shardings = {name: x.sharding for name, x in wanted.items()}
    anywhere = SingleDeviceSharding(jax.local_devices()[0])
    restored = restore_orbax(
        path, sharding=lambda name, shape: shardings.get(name, anywhere)
    )
    kinds = restored.pop(_LEAVES, np.zeros(0, np.uint8))
    for name in sorted(wanted.keys() | restored.keys()):
        mine, expected = (
            f"{tree[name].dtype} {tree[name].shape}" if name in tree else "nothing"
            for tree in (wanted, restored)
        )
        if mine != expected:
            raise ValueError(
                f"{path} holds {expected} as {name}, this run {mine}; resume with the "
                "same model, recipe and optimizer, or choose another folder"
            )
    if np.asarray(kinds).tobytes() != _leaf_kinds(like.params).tobytes():
        raise ValueError(
            f"{path} holds compressed leaves of other types or settings than this run; "
            "resume with the same recipe, or choose another folder"
        )
    arrays = [
        jax.random.wrap_key_data(restored[name]) if _is_key(x) else restored[name]
        for name, x in zip(wanted, jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Find the last complete checkpoint of a folder, or None.

    Args:
      folder: of `train`.

    Example:
      >>> jc.distillation.latest_checkpoint("no_such_folder")
    """
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _remove_old(folder: str | os.PathLike, keep: int) -> None:
    if jax.process_index() == 0:
        for path in _checkpoints(folder)[:-keep]:
            shutil.rmtree(path)


def _named(state: TrainState) -> dict[str, jax.Array]:
    """Return arrays of a state by their paths, in order; keys as the numbers they
    are.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        ".".join(key_name(key) for key in path): jax.random.key_data(x)
        if _is_key(x)
        else x
        for path, x in flat
    }


def _leaf_kinds(tree: Params) -> np.ndarray:
    """Return types and static fields of compressed leaves, inner ones too, as JSON."""

    def kinds(tree: Params) -> list[Any]:
        leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
        return [kind(x) for x in leaves if is_leaf(x)]

    def kind(x: Any) -> list[Any]:
        fixed = {n: static_json.to_json(getattr(x, n)) for n in static_fields(x)}
        inner = [kinds(getattr(x, name)) for name in data_fields(x)]
        return [type(x).__name__, fixed, inner]

    return np.frombuffer(json.dumps(kinds(tree)).encode(), np.uint8)


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

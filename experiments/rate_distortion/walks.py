"""Trellis walks that change for the model's sake, and divergences window by window.

A part of `levels.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress.coding.levels import leaf as coded_levels
from jaxcompress.coding.levels import trellis
from jaxcompress.coding.levels.rate_coded import SCALES
from jaxcompress.coding.levels.shrinkage import shrink_to_mean
from jaxcompress.distillation.losses import forward_kl
from jaxcompress.shrinking.fitting import replace_roots
from jaxcompress.tree.leaf import dense
from jaxcompress.tree.paths import roots

ROUNDS = 4  # of choosing walks
FARTHEST = 1.5  # levels that a target moves, at most


def mean_nats(apply: Any, teacher: Any, params: Any, tokens: Any, axis: Any) -> Any:
    """Return the mean divergence from the teacher, over these axes of `[B, T]`."""
    target = jax.lax.stop_gradient(apply(teacher, tokens))
    return forward_kl(apply(params, tokens), target).mean(axis)


def divergences(task: Any, ready: Any, tokens: np.ndarray) -> np.ndarray:
    """Measure the mean divergence of each window, some of them at a time."""
    parts = np.array_split(tokens, -(-len(tokens) // 8))
    each = [task.divergence(task.dense, ready, x) for x in parts]
    return np.concatenate(each).astype(np.float64)


def change_walks(task: Any, small: Any, steps: int) -> Any:
    """Change the walks of levels that gain most by gradient and curvature.

    A walk, a row's levels of up to 576 outputs, is searched anew towards what Newton's
    step of its row alone would make of it; a trellis allows nothing smaller.
    """
    held_out, size = len(task.windows) // 6, task.config.batch
    used, held = task.windows[:-held_out], task.windows[-held_out:]
    gradient = jax.jit(
        jax.grad(lambda p, t, tokens: mean_nats(task.apply, t, p, tokens, None))
    )
    each = steps // ROUNDS
    share, best = 0.02, divergences(task, jc.materialize(small), held).mean()
    for turn in range(ROUNDS):
        ready, total = jc.materialize(small), None
        for i in range(each):
            start = (turn * each + i) * size % (len(used) - size)
            found = gradient(ready, task.dense, used[start : start + size])
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        pulls, leaves = {n: x / each for n, x in roots(total)}, dict(roots(small))
        proposed = {
            name: propose(leaf, pulls[name], task.moments[name])
            for name, leaf in leaves.items()
            if hasattr(leaf, "levels")
        }
        gains = np.concatenate([gain.ravel() for *_, gain in proposed.values()])
        while share > 1e-4:
            limit = np.quantile(gains, 1 - share)
            changed = {}
            for name, (old, new, gain) in proposed.items():
                leaf = leaves[name]
                levels = np.where((gain > limit)[..., None], new, old)
                levels = levels.reshape(*leaf.shape[:-1], -1)[..., : leaf.shape[-1]]
                levels = coded_levels.code_levels(levels, leaf.levels.trellis)
                changed[name] = dataclasses.replace(leaf, levels=levels)
            trial = replace_roots(small, changed)
            nats = divergences(task, jc.materialize(trial), held).mean()
            print(turn, share, best, nats, gains[gains > limit].sum(), flush=True)
            if nats < best:
                small, best = trial, nats
                break
            share /= 2
    return small


def propose(leaf: Any, pull: Any, moments: Any) -> tuple[Any, Any, Any]:
    """Return walks as they are, what they would be, and what that is predicted to gain.

    Levels are int32 `[..., inputs, walks, places]`, gains `[..., inputs, walks]`.
    """
    levels = dense(leaf.levels).astype(jnp.int32)
    size = leaf.steps.astype(jnp.float32)[..., None]
    if leaf.scales is not None:
        size = size * jnp.take(SCALES, dense(leaf.scales), mode="clip")
    bent = 2 * shrink_to_mean(moments.curvatures)[..., None, :]
    bent = bent * jnp.diagonal(moments.second, axis1=-2, axis2=-1)[..., None]
    move = pull / jnp.maximum(bent * size, 1e-20)
    target = levels - jnp.clip(move, -FARTHEST, FARTHEST)
    count, places = trellis.walks(leaf.shape[-1])
    gap = count * places - leaf.shape[-1]
    room = [(0, 0)] * (levels.ndim - 1) + [(0, gap)]

    def cut(x: Any) -> Any:
        return jnp.pad(x, room).reshape(*leaf.shape[:-1], count, places)

    old, target = cut(levels), cut(target)
    pull, bent = cut(pull * size), cut(bent * size**2)
    weights = cut(jnp.zeros(leaf.shape)).at[..., places - gap :].set(1e9) if gap else 0
    target = target.reshape(-1, places)
    weights = jnp.broadcast_to(1 + weights, old.shape).reshape(-1, places)
    new, _ = trellis.search(target.T, leaf.levels.trellis, weights.T)
    new = new.T.reshape(old.shape)
    move = (new - old).astype(jnp.float32)
    gain = -(pull * move + 0.5 * bent * move**2).sum(-1)
    return np.asarray(old), np.asarray(new), np.asarray(gain)

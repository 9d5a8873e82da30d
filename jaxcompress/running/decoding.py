"""Losslessly stored arrays decoded once, for running many times."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.entropy.integers import Coded
from jaxcompress.tree.leaves import Leaf
from jaxcompress.types import Params

COLUMNS = 256  # of a table of bytes, at most
LARGE = 1 << 21  # codes; fewer are decoded by NumPy sooner than XLA compiles


def decoded(params: Params) -> Params:
    """The same tree with every lossless leaf replaced by the array it stands for.

    Codes are then one integer each, and weights still materialize where a layer asks
    for them: more memory than the stored form, less than the dense one, and no
    decoding at each step. Bit for bit the same outputs.
    """

    def lossless(x: Any) -> bool:
        return isinstance(x, Leaf) and x.lossless

    def one(x: Any) -> Any:
        x = jax.tree.map(_opened, x, is_leaf=lambda y: isinstance(y, Coded))
        return _materialize(x) if lossless(x) else x

    return jax.tree.map(one, params, is_leaf=lossless)


def _opened(x: Any) -> Any:
    if not isinstance(x, Coded):
        return x
    if x.size < LARGE:
        return jnp.asarray(x.on_host())
    return _materialize(_roomy(x))


@jax.jit
def _materialize(leaf: Leaf) -> jax.Array:
    return leaf.materialize()


def _roomy(x: Coded) -> Coded:
    """The same with words and tables filled up to sizes that many others share.

    Streams differ in length from leaf to leaf, and each length would compile anew.
    What is filled up is never read.
    """
    words = x.words.shape[-1]
    filled = {"words": _filled(x.words, 1 << max(words - 1, 1).bit_length())}
    if x.symbols is None:
        filled["frequencies"] = _filled(x.frequencies, COLUMNS)
    return dataclasses.replace(x, **filled)


def _filled(x: jax.Array, size: int) -> jax.Array:
    room = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return jnp.pad(jnp.asarray(x), room)

"""Sizes filled up, so that one compiled decoder serves many leaves of integers."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORDS, COLUMNS = 64, 32  # the least sizes; larger ones are powers of two


def fill_up(coded: Any) -> Any:
    """Fill words and tables of a `Coded` up to sizes that many leaves share.

    What is filled up is never used: columns of frequency zero, words after the last.
    """
    words, columns = _sizes(coded)
    filled = {"words": _padded(coded.words, words)}
    if coded.symbols is None:
        filled["frequencies"] = _padded(coded.frequencies, columns)
    else:  # the last column stays the last: its symbols may escape
        for field in ("frequencies", "symbols"):
            filled[field] = _padded(getattr(coded, field), columns, last=1)
    return dataclasses.replace(coded, **filled)


def program(coded: Any) -> Hashable:
    """Return a key: what shapes and static fields of `fill_up(coded)` depend on."""
    whole = (coded.offsets, coded.low, coded.contexts)
    shapes = [x.shape for x in whole if x is not None]
    tables = coded.frequencies.shape[:-1]
    return jax.tree.structure(coded), _sizes(coded), tables, *shapes


def _sizes(coded: Any) -> tuple[int, int]:
    """Return words and columns of the leaf that is filled up."""
    words = max(WORDS, coded.words.shape[-1] - 1)
    columns = coded.frequencies.shape[-1]
    if coded.symbols is None:
        return 1 << words.bit_length(), 256
    return 1 << words.bit_length(), max(COLUMNS, 1 << (columns - 1).bit_length())


def _padded(x: jax.Array, size: int, last: int = 0) -> Any:
    """Return zeros before the last so many columns; NumPy compiles nothing."""
    spread = isinstance(x, jax.Array) and len(x.devices()) > 1
    xp, array = (jnp, x) if spread else (np, np.asarray(x))
    cut = x.shape[-1] - last
    room = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return xp.concatenate([xp.pad(array[..., :cut], room), array[..., cut:]], axis=-1)

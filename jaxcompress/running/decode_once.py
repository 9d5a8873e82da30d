"""Losslessly stored arrays decoded once, for running many times."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxcompress.coding.levels.narrow import NarrowLevels, narrow_levels
from jaxcompress.coding.levels.rate_coded import RateCoded
from jaxcompress.coding.packing import pack_bits
from jaxcompress.quantization.grids import GRIDS, Quantized
from jaxcompress.tree.decoding import decoding
from jaxcompress.tree.leaf import Leaf, dense, is_leaf
from jaxcompress.tree.paths import is_float
from jaxcompress.types import Params


def decode_once(params: Params, *, packed: bool = False) -> Params:
    """Return the tree with every lossless leaf replaced by the array it represents.

    Codes are then one integer each, and weights still materialize where a layer asks
    for them: more memory than the stored form, less than the dense one, and no
    decoding at each step. Bit for bit the same outputs.

    Args:
      params: pytree of arrays and leaves.
      packed: keep codes in as few bits as their range needs, instead of one integer
        each: what was entropy-coded is packed, and what is packed stays. Layers unpack
        where they multiply. Leaf by leaf, on the host.

    Example:
      >>> small = jc.compress(params, "rate_distortion(rate=3.0)")
      >>> ready = decode_once(small, packed=True)
    """
    with decoding(params):
        if not packed:
            return jax.tree.map(dense, params, is_leaf=_lossless)
        return jax.tree.map(_packed, params, is_leaf=_packs)


def _packs(x: Any) -> bool:
    return isinstance(x, RateCoded | Quantized) or _lossless(x)


def _packed(x: Any) -> Any:
    """Return a leaf without entropy coding, its integers packed."""
    if isinstance(x, RateCoded):
        levels = x.levels
        if not isinstance(levels, NarrowLevels):
            levels = narrow_levels(np.asarray(dense(levels)))
        return dataclasses.replace(
            x, levels=levels, steps=_decoded(x.steps), scales=_decoded(x.scales)
        )
    if isinstance(x, Quantized):
        codes, parts = x.codes, {}
        for name in ("scale", "zero_point", "negative_scale"):
            parts[name] = _decoded(getattr(x, name))
        if is_leaf(codes) and codes.entropy_coded:
            codes = np.asarray(dense(codes))
            codes = pack_bits(codes, GRIDS[x.grid].width(x.bits))
        return dataclasses.replace(x, codes=codes, **parts)
    return _decoded(x)


def _decoded(x: Any) -> Any:
    """Return the array of an entropy-coded leaf; anything else as it is."""
    coded = lambda x: is_leaf(x) and x.entropy_coded  # noqa: E731
    return jax.tree.map(lambda x: dense(x) if coded(x) else x, x, is_leaf=coded)


def code_again(params: Params, like: Params) -> Params:
    """Undo `decode_once` after training: codes, which do not train, are coded again.

    Floating-point arrays that were coded stay as they are in `params`, since they may
    have changed: `code_floats()` codes them, and so does `save`.

    Args:
      params: a tree of `decode_once(like)`, in its dtypes, whose codes have not
        changed.
      like: the tree that was decoded.
    """

    def one(old: Any, new: Any) -> Any:
        return old if _lossless(old) and not is_float(old) else new

    return jax.tree.map(one, like, params, is_leaf=_lossless)


def _lossless(x: Any) -> bool:
    return isinstance(x, Leaf) and x.lossless

"""Losslessly stored arrays decoded once, for running many times."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxcompress.coding.levels.narrow import narrow_levels
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
      packed: keep codes in about as few bits as their range needs, instead of one
        integer each: what was entropy-coded is packed, and what is packed stays. For
        one text at a time inside `compressed_matmul`, where layers unpack as they
        multiply, and sums are rounded in another order; a plain `apply` on batches
        unpacks every time, and took twice as long. Leaf by leaf, on the host.

    Example:
      >>> small = jc.compress(params, "rate_distortion(rate=3.0)")
      >>> ready = decode_once(small, packed=True)
    """
    if packed:
        return pack_levels(decode_codes(params))
    with decoding(params):
        return jax.tree.map(dense, params, is_leaf=_lossless)


def decode_codes(params: Params) -> Params:
    """Undo entropy coding alone: codes are packed, levels an integer each.

    Layers that are alike then have arrays that are alike, which can be stacked.

    Args:
      params: pytree of arrays and leaves.

    Returns:
      The tree, with the weights it had, bit for bit.

    Example:
      >>> ready = pack_levels(jc.models.stack_layers(decode_codes(small)))
    """
    with decoding(params):
        return jax.tree.map(_without_coding, params, is_leaf=_packs)


def pack_levels(params: Params) -> Params:
    """Pack the integers of `rate_distortion` that are one array in few bits.

    Args:
      params: a tree of `decode_once` or `decode_codes`; other leaves stay.

    Returns:
      The tree, with the weights it had, bit for bit.

    Example:
      >>> ready = pack_levels(decode_once(small))
    """

    def one(x: Any) -> Any:
        if not isinstance(x, RateCoded) or is_leaf(x.levels):
            return x
        return dataclasses.replace(x, levels=narrow_levels(x.levels))

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, RateCoded))


def _packs(x: Any) -> bool:
    return isinstance(x, RateCoded | Quantized) or _lossless(x)


def _without_coding(x: Any) -> Any:
    """Return a leaf without entropy coding, its codes packed."""
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

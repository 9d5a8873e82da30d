"""Losslessly stored arrays decoded once, for running many times."""

from typing import Any

import jax

from jaxcompress.tree.decoding import decoding
from jaxcompress.tree.leaf import Leaf, dense
from jaxcompress.tree.paths import is_float
from jaxcompress.types import Params


def decode_once(params: Params) -> Params:
    """Return same tree with every lossless leaf replaced by the array it represents.

    Codes are then one integer each, and weights still materialize where a layer asks
    for them: more memory than the stored form, less than the dense one, and no
    decoding at each step. Bit for bit the same outputs.
    """

    with decoding(params):
        return jax.tree.map(dense, params, is_leaf=_lossless)


def code_again(params: Params, like: Params) -> Params:
    """Compute `decoded` undone after training: codes, which do not train, are coded
    again.

    Floating-point arrays that were coded stay as they are in `params`, since they may
    have changed: `code_floats()` codes them, and so does `save`.

    Args:
      params: a tree of `decoded(like)`, in its dtypes, whose codes have not changed.
      like: the tree that was decoded.
    """

    def one(old: Any, new: Any) -> Any:
        return old if _lossless(old) and not is_float(old) else new

    return jax.tree.map(one, like, params, is_leaf=_lossless)


def _lossless(x: Any) -> bool:
    return isinstance(x, Leaf) and x.lossless

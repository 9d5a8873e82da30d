"""Losslessly stored arrays decoded once, for running many times."""

from typing import Any

import jax

from jaxcompress.tree.leaves import Leaf, dense
from jaxcompress.types import Params


def decoded(params: Params) -> Params:
    """The same tree with every lossless leaf replaced by the array it stands for.

    Codes are then one integer each, and weights still materialize where a layer asks
    for them: more memory than the stored form, less than the dense one, and no
    decoding at each step. Bit for bit the same outputs.
    """

    def lossless(x: Any) -> bool:
        return isinstance(x, Leaf) and x.lossless

    return jax.tree.map(dense, params, is_leaf=lossless)


def recoded(params: Params, like: Params) -> Params:
    """`decoded` undone after training: lossless leaves are those of `like` again.

    Args:
      params: a tree of `decoded(like)`, whose codes have not changed.
      like: the tree that was decoded.
    """

    def lossless(x: Any) -> bool:
        return isinstance(x, Leaf) and x.lossless

    # What stands in place of a lossless leaf is one array.
    return jax.tree.map(
        lambda old, new: old if lossless(old) else new, like, params, is_leaf=lossless
    )

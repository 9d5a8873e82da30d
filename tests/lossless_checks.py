"""What the tests of lossless leaves share: bits compared, entropies by definition."""

import jax
import numpy as np

from jaxcompress.coding import Coded, CodedWords
from jaxcompress.tree.leaf import Leaf, dense, static_fields

decode = jax.jit(dense)


def entropy_bytes(values: np.ndarray) -> float:
    """Order-0 entropy of an array in bytes, from the definition."""
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) * values.size / 8


def reload(leaf: Leaf) -> Leaf:
    """The leaf as it comes back from a file."""
    fields = {name: getattr(leaf, name) for name in static_fields(leaf)}
    return type(leaf).restored(leaf.stored(), fields)


def check(leaf, array: np.ndarray) -> None:
    """Same bits, shape and dtype, also on the host and after a file."""
    word = np.dtype(f"u{array.dtype.itemsize}")
    found = [dense(leaf)]
    if isinstance(leaf, Coded | CodedWords):
        found += [leaf.on_host(), dense(reload(leaf))]
    if isinstance(leaf, Leaf):
        assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype)
    for one in found:
        assert (one.shape, one.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(np.asarray(one).view(word), array.view(word))

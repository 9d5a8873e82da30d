"""Pure functions that make Flax language models small, and exact again."""

from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaves import (
    Leaf,
    Mixed,
    Reshaped,
    Sum,
    leaf,
    materialize,
    nbytes,
    static,
)
from jaxcompress.tree.methods import method
from jaxcompress.tree.paths import combine, leaf_names, partition
from jaxcompress.tree.rules import chain, compress

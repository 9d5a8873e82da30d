"""Weights set to zero or removed: scores, masks, reconstruction, structure."""

from jaxcompress.pruning import masks, structured
from jaxcompress.pruning.reconstruction import alps, sparsegpt
from jaxcompress.pruning.scores import magnitude, wanda
from jaxcompress.pruning.sparse import Sparse, sparse

__all__ = [
    "Sparse",
    "alps",
    "magnitude",
    "masks",
    "sparse",
    "sparsegpt",
    "structured",
    "wanda",
]

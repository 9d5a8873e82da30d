"""Weights set to zero: which, what makes up for them, and how they are stored."""

from jaxcompress.pruning.masks import apply_masks, keep_largest, make_masks, masks_of
from jaxcompress.pruning.reconstruction import alps, sparsegpt
from jaxcompress.pruning.scores import (
    magnitude,
    magnitude_scores,
    taylor_scores,
    wanda,
    wanda_scores,
)
from jaxcompress.pruning.sparse import Sparse, sparse

__all__ = [
    "Sparse",
    "alps",
    "apply_masks",
    "keep_largest",
    "magnitude",
    "magnitude_scores",
    "make_masks",
    "masks_of",
    "sparse",
    "sparsegpt",
    "taylor_scores",
    "wanda",
    "wanda_scores",
]

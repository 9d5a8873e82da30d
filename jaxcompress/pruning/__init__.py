"""Weights set to zero: which, what makes up for them, and how they are stored."""

from jaxcompress.pruning.groups import Group, choose_units
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
from jaxcompress.pruning.structured import remove_units
from jaxcompress.pruning.unit_scores import score_units

__all__ = [
    "Group",
    "Sparse",
    "alps",
    "apply_masks",
    "choose_units",
    "keep_largest",
    "magnitude",
    "magnitude_scores",
    "make_masks",
    "masks_of",
    "remove_units",
    "score_units",
    "sparse",
    "sparsegpt",
    "taylor_scores",
    "wanda",
    "wanda_scores",
]

"""Structured pruning: neurons, heads, filters and layers leave, arrays shrink."""

from jaxcompress.pruning.structured.groups import Group, choose_units
from jaxcompress.pruning.structured.removal import remove_units
from jaxcompress.pruning.structured.unit_scores import score_units

__all__ = ["Group", "choose_units", "remove_units", "score_units"]

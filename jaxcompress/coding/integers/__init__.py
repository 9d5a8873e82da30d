"""Integer arrays near their entropy."""

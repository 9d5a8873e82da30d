"""Weights as nodes of a tree: the leaf protocol, names, layouts, methods, recipes."""

from jaxcompress.tree.arithmetic import average, norm, unbox
from jaxcompress.tree.renaming import rename

__all__ = ["average", "norm", "rename", "unbox"]

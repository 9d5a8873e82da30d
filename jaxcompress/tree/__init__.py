"""Where things are: the leaf protocol, names, layouts, methods, rules."""

from jaxcompress.tree.arithmetic import average, norm, unbox
from jaxcompress.tree.renaming import rename

__all__ = ["average", "norm", "rename", "unbox"]

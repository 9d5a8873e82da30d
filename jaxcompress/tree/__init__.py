"""Where things are: the leaf protocol, names, layouts, methods, rules."""

from jaxcompress.tree.arithmetic import average, norm, unbox

__all__ = ["average", "norm", "unbox"]

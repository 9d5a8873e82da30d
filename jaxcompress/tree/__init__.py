"""Where things are: the leaf protocol, names, layouts, methods, rules."""

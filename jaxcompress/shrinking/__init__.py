"""One call from a model to a file of a given size: plan, compress, measure, repeat."""

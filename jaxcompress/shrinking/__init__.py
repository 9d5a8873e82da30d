"""One call from a model to a file of a given size: calibrate, plan, compress, measure."""

"""Where a model uses each weight, read from the program that JAX traces."""

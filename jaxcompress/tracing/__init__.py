"""Uses of each weight, read from the program that JAX traces."""

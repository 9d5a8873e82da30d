"""Training steps, runs, optimizers and quantization-aware training."""

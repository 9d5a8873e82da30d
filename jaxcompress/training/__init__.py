"""Training steps, runs, optimizers and quantization-aware training."""

__all__ = []

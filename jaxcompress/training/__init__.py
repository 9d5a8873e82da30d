"""Training steps, runs, optimizers, quantization-aware training and adapters."""

from jaxcompress.training.adapters import ADAPTERS, attach, detach, lora, merge

__all__ = ["ADAPTERS", "attach", "detach", "lora", "merge"]

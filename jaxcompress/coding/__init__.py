"""No loss: packed bits, entropy-coded integers and floating-point arrays."""

from jaxcompress.entropy.floats import CodedFloats, code_floats
from jaxcompress.entropy.integers import Coded, entropy_code
from jaxcompress.entropy.packing import Packed, pack
from jaxcompress.entropy.words import CodedWords

__all__ = [
    "Coded",
    "CodedFloats",
    "CodedWords",
    "Packed",
    "code_floats",
    "entropy_code",
    "pack",
]

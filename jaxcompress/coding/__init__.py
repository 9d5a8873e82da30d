"""No loss: packed bits, entropy-coded integers and floating-point arrays."""

from jaxcompress.coding.floats.code_floats import CodedFloats, code_floats
from jaxcompress.coding.floats.leaf import CodedWords
from jaxcompress.coding.integers.leaf import Coded, entropy_code
from jaxcompress.coding.packing import Packed, pack_bits

__all__ = [
    "Coded",
    "CodedFloats",
    "CodedWords",
    "Packed",
    "code_floats",
    "entropy_code",
    "pack_bits",
]

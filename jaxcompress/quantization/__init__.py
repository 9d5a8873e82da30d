"""Fewer bits per weight: grids, and the methods that choose a point on them."""

from jaxcompress.quantization.grids import (
    GRIDS,
    Grid,
    Quantized,
    Steps,
    decode,
    encode,
    quantized,
    spread,
)
from jaxcompress.quantization.nearest import asymmetric, sign_split, symmetric

__all__ = [
    "GRIDS",
    "Grid",
    "Quantized",
    "Steps",
    "asymmetric",
    "decode",
    "encode",
    "quantized",
    "sign_split",
    "spread",
    "symmetric",
]

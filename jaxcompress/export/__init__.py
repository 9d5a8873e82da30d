"""Write models in the formats of other ecosystems, from the same codes and scales."""

from jaxcompress.export.compressed_tensors_directory import compressed_tensors
from jaxcompress.export.gguf_file import gguf
from jaxcompress.export.huggingface_directory import huggingface
from jaxcompress.export.named_leaves import ExportedLeaf
from jaxcompress.export.stablehlo_program import Program, stablehlo

__all__ = [
    "ExportedLeaf",
    "Program",
    "compressed_tensors",
    "gguf",
    "huggingface",
    "stablehlo",
]

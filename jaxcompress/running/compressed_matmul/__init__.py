"""Multiplying by what is stored: thin factors, integer codes."""

from jaxcompress.running.compressed_matmul.context import compressed_matmul

__all__ = ["compressed_matmul"]

"""Multiplying by what is stored: thin factors, integer codes."""

from jaxcompress.running.compressed_matmul.context import fast

__all__ = ["fast"]

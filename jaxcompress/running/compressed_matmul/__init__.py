"""Multiplying by what is stored: thin factors, integer codes."""

from jaxcompress.running.fast.context import fast

__all__ = ["fast"]

"""Text compressed losslessly with a language model that runs in exact integers."""

from jaxcompress.textcoding.codec import decode, encode, verify
from jaxcompress.textcoding.export import exact, self_test
from jaxcompress.textcoding.integer_transformer import ExactTransformer

__all__ = ["ExactTransformer", "decode", "encode", "exact", "self_test", "verify"]

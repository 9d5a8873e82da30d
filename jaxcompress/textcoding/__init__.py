"""Text compressed losslessly with a language model that runs in exact integers."""

from jaxcompress.textcoding.export import exact, self_test
from jaxcompress.textcoding.integer_transformer import ExactTransformer

__all__ = ["ExactTransformer", "exact", "self_test"]

"""Train tokenizers, encode text without loss, measure it."""

from jaxcompress.tokenization.huggingface import from_huggingface_json
from jaxcompress.tokenization.sentencepieces import train
from jaxcompress.tokenization.tokenizer import Tokenizer, from_bytes

__all__ = ["Tokenizer", "from_bytes", "from_huggingface_json", "train"]

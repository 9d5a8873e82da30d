"""Train tokenizers, encode text without loss, measure it."""

from jaxcompress.tokenization import byte_pairs, unigrams
from jaxcompress.tokenization.dictionaries import DictionaryTokenizer
from jaxcompress.tokenization.encoding import encode_many
from jaxcompress.tokenization.huggingface import from_huggingface_json
from jaxcompress.tokenization.measures import (
    Measures,
    count_pieces,
    embedding_bytes,
    measure,
    renyi_entropy,
)
from jaxcompress.tokenization.sampling import sample
from jaxcompress.tokenization.text_files import read_text
from jaxcompress.tokenization.token_files import open_tokens, write_tokens
from jaxcompress.tokenization.tokenizer import (
    Tokenizer,
    decode_bytes,
    encode_bytes,
    from_bytes,
)
from jaxcompress.tokenization.training import train
from jaxcompress.tokenization.trimming import trim

__all__ = [
    "DictionaryTokenizer",
    "Measures",
    "Tokenizer",
    "byte_pairs",
    "count_pieces",
    "decode_bytes",
    "embedding_bytes",
    "encode_bytes",
    "encode_many",
    "from_bytes",
    "from_huggingface_json",
    "measure",
    "open_tokens",
    "read_text",
    "renyi_entropy",
    "sample",
    "train",
    "trim",
    "unigrams",
    "write_tokens",
]

"""A tokenizer as GGUF files carry them."""

import pytest
from checkpoints_for_tests import BYTE_METADATA

from jaxcompress.models.gguf_tokenizers import tokenizer_from


@pytest.fixture
def tokenizer():
    return tokenizer_from(BYTE_METADATA)

"""What every tokenizer can do, and how a stored one comes back."""

import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxcompress.tokenization.huggingface import HuggingFaceTokenizer
from jaxcompress.tokenization.sentencepieces import SentencePieceTokenizer


class Tokenizer(Protocol):
    """Text to ids and back.

    `digest` is the SHA-256 of `to_bytes()` in hexadecimal. The model expects `bos_id`
    before a text and `eos_id` behind it, None where there is no such mark; `encode`
    adds neither.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    digest: str

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, ids: Sequence[int]) -> np.ndarray: ...

    def to_bytes(self) -> bytes: ...


def from_bytes(stored: bytes) -> Tokenizer:
    """The tokenizer of which `stored` is the `to_bytes()`, or of a tokenizer.json.

    Raises ValueError where it is neither, nor a SentencePiece model.
    """
    if not stored.startswith(b"{"):
        return SentencePieceTokenizer(stored)
    try:
        contents = json.loads(stored)
    except ValueError as error:
        raise ValueError(f"{len(stored)} bytes are no tokenizer: {error}") from error
    if isinstance(contents.get("tokenizer"), str):
        marks = {"bos": contents.get("bos"), "eos": contents.get("eos")}
        return HuggingFaceTokenizer(contents["tokenizer"], **marks)
    return HuggingFaceTokenizer(stored.decode())

"""Interface of every tokenizer, and how a stored one is read."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxcompress.tokenization import dictionaries
from jaxcompress.tokenization.huggingface import HuggingFaceTokenizer
from jaxcompress.tokenization.sentencepieces import SentencePieceTokenizer

_WRONG = re.compile("([\udc80-\udcff]+)")


class Tokenizer(Protocol):
    """Text to ids and back.

    `digest` is the SHA-256 of `to_bytes()` in hexadecimal. The model expects `bos_id`
    before a text, None where its texts have no such mark. Generation stops at any of
    `end_ids`, of which `eos_id` is the first; texts to train on end with `eos_id` where
    `add_eos` says so. `encode` adds neither.
    `pieces` are the UTF-8 bytes of each id, none for marks and control symbols;
    `symbols` the ids of user and control symbols by their spelling; `byte_ids` those of
    the 256 bytes for what has no piece, None where there are none or where
    all pieces are made of bytes.

    Example:
      >>> tokenizer.decode(tokenizer.encode("a small text"))
      'a small text'
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def add_eos(self) -> bool: ...

    @property
    def end_ids(self) -> Sequence[int]: ...

    @property
    def digest(self) -> str: ...

    @property
    def pieces(self) -> Sequence[bytes]: ...

    @property
    def symbols(self) -> Mapping[str, int]: ...

    @property
    def byte_ids(self) -> Sequence[int] | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, ids: Sequence[int]) -> np.ndarray: ...

    def to_bytes(self) -> bytes: ...


def from_bytes(stored: bytes) -> Tokenizer:
    """Return tokenizer of which `stored` is the `to_bytes()`, or of a tokenizer.json.

    Raises ValueError where it is neither, nor a SentencePiece model.

    Args:
      stored: of a tokenizer's `to_bytes`.

    Example:
      >>> same = jc.tokenization.from_bytes(tokenizer.to_bytes())
    """
    if not stored.startswith(b"{"):
        return SentencePieceTokenizer(stored)
    try:
        contents = json.loads(stored)
    except ValueError as error:
        raise ValueError(f"{len(stored)} bytes are no tokenizer: {error}") from error
    if contents.get("kind") == "dictionary":
        return dictionaries.from_contents(contents)
    if isinstance(contents.get("tokenizer"), str):
        text = contents.pop("tokenizer")
        names = ("bos", "eos", "add_bos", "add_eos", "ends")
        marks = {name: contents[name] for name in names if name in contents}
        return HuggingFaceTokenizer(text, **marks)
    return HuggingFaceTokenizer(stored.decode())


def encode_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Return ids of any bytes; `decode_bytes` gives back the same bytes.

    UTF-8 is encoded as text, each byte that is none as its byte piece. Raises
    ValueError where the tokenizer loses something: it normalizes text, has no byte
    pieces, or takes a part of the data for one of its marks.

    Args:
      tokenizer: that encodes text.
      data: any bytes.

    Example:
      >>> ids = jc.tokenization.encode_bytes(tokenizer, b"a small text")
    """
    ids: list[int] = []
    text = data.decode(
        "utf-8", "surrogateescape"
    )  # a wrong byte becomes U+DC80 to DCFF
    single: dict[bytes, int] = {}
    for i, part in enumerate(_WRONG.split(text)):
        if i % 2 == 0:
            ids += tokenizer.encode(part) if part else []
            continue
        if not single:
            single = {p: j for j, p in enumerate(tokenizer.pieces) if len(p) == 1}
        for byte in part.encode("utf-8", "surrogateescape"):
            if bytes([byte]) not in single:
                raise ValueError(
                    f"the data is no UTF-8, and the tokenizer has no piece for byte "
                    f"0x{byte:02X}; train it with byte_fallback"
                )
            ids.append(single[bytes([byte])])
    if decode_bytes(tokenizer, ids) != data:
        raise ValueError(
            "the tokenizer does not give back these bytes: it normalizes text, has "
            "unknown characters, or found one of its marks in it"
        )
    return ids


def decode_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """Return the bytes of ids.

    Args:
      tokenizer: that encoded them.
      ids: of `encode_bytes`.

    Example:
      >>> ids = jc.tokenization.encode_bytes(tokenizer, b"a small text")
      >>> jc.tokenization.decode_bytes(tokenizer, ids)
      b'a small text'
    """
    return b"".join([tokenizer.pieces[i] for i in ids])

"""Tokenizers of other people's models: Hugging Face's tokenizer.json."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from jaxcompress.tokenization.symbols import BYTE_PIECE, SPACE

# In a byte-level vocabulary a printable character of Latin-1 is its own byte,
# characters from U+0100 on for the others, in their order (GPT-2).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}


class HuggingFaceTokenizer:
    """A tokenizer.json with the interface of our own tokenizers.

    `decode(encode(text)) == text` holds where the file normalizes nothing away, as for
    the byte-level ones of SmolLM2, Llama 3 and Qwen. Like the original, text that
    spells a special token is encoded as that token. The package `tokenizers` is needed.
    """

    def __init__(
        self,
        text: str,
        *,
        bos: str | None = None,
        eos: str | None = None,
        add_bos: bool = True,
        add_eos: bool = False,
        ends: Sequence[str | int] = (),
    ):
        if "model" not in _object(text):
            raise ValueError("not a tokenizer.json: it holds no model")
        self._tokenizer = _read(text)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._contents = {"tokenizer": text, "bos": bos, "eos": eos}
        if not add_bos:
            self._contents["add_bos"] = False
        if add_eos:
            self._contents["add_eos"] = True
        self.vocab_size = max(self._tokenizer.get_vocab(True).values(), default=-1) + 1
        begin = self._special("bos", bos)
        self.bos_id = begin if add_bos else None
        self.eos_id = self._special("eos", eos)
        self.add_eos = add_eos and eos is not None
        self.end_ids = self._end_ids(ends)
        self.digest = hashlib.sha256(self.to_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return ids of the text, without begin or end marks."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return text of the ids, special tokens spelled out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, ids: Sequence[int]) -> np.ndarray:
        """Count UTF-8 bytes of the text of each id, int32; special tokens have none."""
        return self._lengths[np.asarray(ids, np.int64)]

    def to_bytes(self) -> bytes:
        """Return file's text with the begin and end marks, which `from_bytes` reads."""
        return json.dumps(self._contents, sort_keys=True).encode()

    @cached_property
    def pieces(self) -> list[bytes]:
        """UTF-8 bytes of each id; special tokens have none."""
        contents = json.loads(self._contents["tokenizer"])
        byte_level = "ByteLevel" in _types(contents.get("decoder"))
        added = self._tokenizer.get_added_tokens_decoder()
        pieces = [b""] * self.vocab_size
        for piece, i in self._tokenizer.get_vocab(True).items():
            if i in added:
                pieces[i] = b"" if added[i].special else added[i].content.encode()
            elif byte_level:  # one character is one byte
                pieces[i] = bytes(BYTE_OF[character] for character in piece)
            elif BYTE_PIECE.fullmatch(piece):
                pieces[i] = bytes([int(piece[3:5], 16)])
            else:
                pieces[i] = piece.removeprefix("##").replace(SPACE, " ").encode()
        return pieces

    @cached_property
    def byte_ids(self) -> list[int] | None:
        """Ids of the pieces <0x00> to <0xFF>, None where they are not all there."""
        ids = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        return None if None in ids else ids

    @cached_property
    def symbols(self) -> dict[str, int]:
        """Ids of the added tokens by their spelling, the two marks left out."""
        added = self._tokenizer.get_added_tokens_decoder()
        marks = (self.bos_id, self.eos_id)
        return {token.content: i for i, token in added.items() if i not in marks}

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self.pieces], np.int32)

    def _end_ids(self, ends: Sequence[str | int]) -> tuple[int, ...]:
        """Return end mark and other ids at which texts end; kept by their spelling."""
        ids = [] if self.eos_id is None else [self.eos_id]
        for end in ends:
            i = end if isinstance(end, int) else self._special("end", end)
            if i not in ids and self._tokenizer.id_to_token(i) is not None:
                ids.append(i)
        others = [i for i in ids if i != self.eos_id]
        if others:
            self._contents["ends"] = [self._tokenizer.id_to_token(i) for i in others]
        return tuple(ids)

    def _special(self, kind: str, token: str | None) -> int | None:
        if token is None:
            return None
        i = self._tokenizer.token_to_id(token)
        if i is None:
            raise ValueError(f"the {kind} token {token!r} is not in the vocabulary")
        return i


def from_huggingface_json(
    text: str,
    *,
    bos: str | None = None,
    eos: str | None = None,
    add_bos: bool = True,
    add_eos: bool = False,
    ends: Sequence[str | int] = (),
) -> HuggingFaceTokenizer:
    """Read a tokenizer from the text of a tokenizer.json.

    The file does not name the tokens that begin and end a text: pass them as
    tokenizer_config.json has them.

    Args:
      text: contents of the file.
      bos, eos: spelling of the begin and the end mark; None where there is none.
      add_bos: whether the model's texts begin with `bos`; `bos_id` is None otherwise.
      add_eos: whether the model's texts end with `eos`, for `write_tokens`. Generation
        stops at `eos` in any case.
      ends: further tokens at which generation stops, by spelling or id.

    Raises:
      ValueError: the text is no tokenizer, or a mark is not in the vocabulary.

    Example:
      >>> import tokenizers  # writes such a text
      >>> pieces = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
      >>> built = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [("a", "b")]))
      >>> text = built.to_str()
      >>> jc.tokenization.from_huggingface_json(text, eos="</s>").encode("abba")
      [2, 1, 0]
    """
    return HuggingFaceTokenizer(
        text, bos=bos, eos=eos, add_bos=add_bos, add_eos=add_eos, ends=ends
    )


def added_marks(text: str) -> list[str]:
    """Return spellings of the tokens that a tokenizer.json's post-processor adds to a
    text.
    """
    return _read(text).encode("").tokens


def _read(text: str) -> Any:
    import tokenizers  # only for models from elsewhere

    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing more special
        raise ValueError(
            f"the package tokenizers {tokenizers.__version__} cannot read this "
            f"tokenizer: {error}"
        ) from error


def _object(text: str) -> dict:
    try:
        contents = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a tokenizer.json: {error}") from error
    return contents if isinstance(contents, dict) else {}


def _types(part) -> set[str]:
    """Return names of a decoder and of the decoders in it."""
    if not part:
        return set()
    return {part["type"]}.union(*map(_types, part.get("decoders", ())))

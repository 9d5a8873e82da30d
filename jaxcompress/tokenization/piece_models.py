"""The file of a SentencePiece model: its list of pieces read, and parts of it kept.

A model is a protocol buffer (google/sentencepiece, `sentencepiece_model.proto`): field
1, repeated, is a piece (1 text, 2 score, 3 type), field 2 how it was trained (3 the
algorithm), field 3 what is done to text first (1 name of the rule, 3 a space before it,
4 spaces squeezed).
"""

import dataclasses
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece: its text, spaces as U+2581, its score, and its type."""

    text: str
    score: float
    type: int


@dataclasses.dataclass(frozen=True)
class PieceModel:
    """Settings in a model's file.

    `exact`: text is segmented as it is, not normalized. `dummy_prefix`: a space is put
    before the text. `end` is the end mark's name.
    """

    kind: str
    exact: bool
    pieces: tuple[Piece, ...]
    dummy_prefix: bool = True
    end: str | None = None


def read(model: bytes) -> PieceModel:
    """Return pieces and settings of a serialized model.

    Raises ValueError where the bytes are cut short or of another format.
    """
    pieces, trained, prepared = [], {}, {}
    for number, value, _ in _fields(model):
        if number == 1:
            part = dict(_values(value))
            score = struct.unpack("<f", part.get(2, bytes(4)))[0]
            pieces.append(Piece(part.get(1, b"").decode(), score, part.get(3, NORMAL)))
        elif number == 2:
            trained |= dict(_values(value))
        elif number == 3:
            prepared = dict(_values(value))
    exact = (
        prepared.get(1, b"") == b"identity"
        and not prepared.get(3, 1)
        and not prepared.get(4, 1)
    )
    kind, prefix = _KINDS.get(trained.get(3, 1), "?"), bool(prepared.get(3, 1))
    end = trained[47].decode() if 47 in trained else None
    return PieceModel(kind, exact, tuple(pieces), prefix, end)


def keep_pieces(model: bytes, ids: Collection[int]) -> bytes:
    """Return the model with only these pieces, in their order; everything else
    unchanged.
    """
    ids, i, parts = frozenset(ids), -1, []
    for number, _, raw in _fields(model):
        if number == 1:
            i += 1
            if i not in ids:
                continue
        parts.append(raw)
    return b"".join(parts)


def with_symbols(model: bytes, symbols: Mapping[int, str]) -> bytes:
    """Append user-defined symbols to a model, ids in sequence after its pieces.

    Raises ValueError where an id is another piece's, or leaves a gap.
    """
    pieces = [piece.text for piece in read(model).pieces]
    for i, text in sorted(symbols.items()):
        if i < len(pieces) and pieces[i] == text:
            continue
        if i != len(pieces):
            what = f"{pieces[i]!r}" if i < len(pieces) else "after a gap"
            raise ValueError(
                f"added token {text!r} has id {i}, which is {what} in a vocabulary of "
                f"{len(pieces)} pieces; the files do not belong together"
            )
        data = text.encode()
        piece = b"\x0a" + _length(len(data)) + data
        piece += b"\x15" + struct.pack("<f", 0.0) + bytes([0x18, USER_DEFINED])
        model += b"\x0a" + _length(len(piece)) + piece
        pieces.append(text)
    return model


def with_end_mark(model: bytes, text: str) -> bytes:
    """Name the end mark of a model, a piece of any type; the model's name is void."""
    data = text.encode()
    setting = b"\xfa\x02" + _length(len(data)) + data  # field 47, a string
    return model + b"\x12" + _length(len(setting)) + setting


def _length(size: int) -> bytes:
    """Return a varint."""
    out = bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size])


def without_begin_mark(model: bytes) -> bytes:
    """Return the model with no begin mark named; the piece stays, as a control symbol.

    A later message of field 2 overrides settings of the first. Field 46 in it is the
    begin mark's text, and the default replaces an empty one: the text is a piece that
    no model has.
    """
    name = b"\x00none"
    setting = bytes([0xF2, 0x02, len(name)]) + name  # field 46, a string
    return model + bytes([0x12, len(setting)]) + setting


def _values(data: bytes) -> Iterator[tuple[int, Any]]:
    return ((number, value) for number, value, _ in _fields(data))


def _fields(data: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """Number, value and all bytes of each field of a message."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            if wire == 2:
                size, at = _varint(data, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"no SentencePiece model: wire type {wire} at {start}")
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError(
                    f"the SentencePiece model is cut short: {len(data)} bytes of {at}"
                )
        yield number, value, data[start:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError(f"the SentencePiece model is cut short at byte {at}")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at

"""Any bytes as tokens, exactly: what a tokenizer would lose is spelled or set aside.

Text is never matched as a special token, and never normalized. A part that its
tokens do not restore is split in halves until its parts do; a single character is
spelled in the pieces of its bytes, and a byte without a piece is an escape.
"""

from typing import NamedTuple

from jaxcompress.tokenization import Tokenizer

_LONGEST = 1 << 16  # characters encoded at once, which keeps a failure cheap


class Pieces(NamedTuple):
    """Tokens, and `(index, bytes)` of what precedes the token of that index."""

    ids: list[int]
    escapes: list[tuple[int, bytes]]


def to_pieces(tokenizer: Tokenizer, data: bytes) -> Pieces:
    """Return tokens and escapes that `from_pieces` turns into the same bytes."""
    pieces = tokenizer.pieces
    single: dict[bytes, int] = {}
    for i, piece in enumerate(pieces):
        if len(piece) == 1:
            single.setdefault(piece, i)
    ids: list[int] = []
    escapes: list[tuple[int, bytes]] = []

    def spell(part: bytes) -> None:
        for byte in part:
            one = bytes([byte])
            if one in single:
                ids.append(single[one])
            elif escapes and escapes[-1][0] == len(ids):
                escapes[-1] = (len(ids), escapes[-1][1] + one)
            else:
                escapes.append((len(ids), one))

    def add(text: str) -> None:
        part = text.encode("utf-8", "surrogateescape")
        try:
            encoded = tokenizer.encode(text)
        except UnicodeEncodeError:  # lone surrogates: bytes that are no UTF-8
            encoded = None
        if encoded is not None and b"".join([pieces[i] for i in encoded]) == part:
            ids.extend(encoded)
        elif len(text) == 1:
            spell(part)
        else:
            add(text[: len(text) // 2])
            add(text[len(text) // 2 :])

    text = data.decode("utf-8", "surrogateescape")
    for start in range(0, len(text), _LONGEST):
        add(text[start : start + _LONGEST])
    return Pieces(ids, escapes)


def from_pieces(tokenizer: Tokenizer, pieces: Pieces) -> bytes:
    """Return the bytes of tokens and escapes."""
    spelled = tokenizer.pieces
    parts: list[bytes] = []
    start = 0
    for index, escape in pieces.escapes:
        parts += [spelled[i] for i in pieces.ids[start:index]]
        parts.append(escape)
        start = index
    parts += [spelled[i] for i in pieces.ids[start:]]
    return b"".join(parts)


def cut(pieces: Pieces, counts: list[int]) -> list[Pieces]:
    """Return consecutive parts of so many tokens; escapes at an end belong to the later
    part.

    Those after the last token belong to the last part.
    """
    parts = []
    start = 0
    for number, count in enumerate(counts):
        end = start + count
        last = number == len(counts) - 1
        escapes = [
            (index - start, escape)
            for index, escape in pieces.escapes
            if start <= index < end or (last and index >= end)
        ]
        parts.append(Pieces(pieces.ids[start:end], escapes))
        start = end
    return parts

"""Symbols with ids of their own: what is allowed as one."""

import re
from collections.abc import Sequence

SPACE = "\u2581"  # a space inside a SentencePiece piece
MARKS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 of every tokenizer trained here
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def check_symbols(user: Sequence[str], control: Sequence[str]) -> None:
    """Raise ValueError on a symbol that could not be told from other text."""
    for name, symbols in (("user_symbols", user), ("control_symbols", control)):
        if isinstance(symbols, str):
            raise ValueError(f"{name} is one string, {symbols!r}; pass a list")
    seen = set(MARKS)
    for symbol in (*user, *control):
        if symbol in seen or BYTE_PIECE.fullmatch(symbol):
            raise ValueError(
                f"symbol {symbol!r} is given twice, or is one of the marks "
                f"{', '.join(MARKS)} and byte pieces <0x00> to <0xFF> that every "
                "tokenizer has; choose another spelling"
            )
        if not symbol or re.search(f"[\\s{SPACE}\0\ud800-\udfff]", symbol):
            raise ValueError(
                f"symbol {symbol!r} is empty or holds a space, {SPACE!r}, a NUL or a "
                "surrogate; write it as one visible word"
            )
        seen.add(symbol)


def any_of(texts: Sequence[str]) -> str:
    """Return a regular expression that matches one of the texts, the longest first."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def known_ids(ids: Sequence[int], size: int) -> Sequence[int]:
    """Return the ids; raise ValueError where one is outside a vocabulary of `size`."""
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise ValueError(
            f"id {wrong} is outside the vocabulary, ids 0 to {size - 1}; decode what "
            "this tokenizer encoded"
        )
    return ids

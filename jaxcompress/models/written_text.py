"""A text that grows by a token at a time, told in pieces of whole characters."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from jaxcompress.tokenization import Tokenizer

UNKNOWN = "\ufffd"  # what the first bytes of a character decode to


@dataclasses.dataclass
class Written:
    """The tokens of one text, and where it ends.

    Args:
      tokenizer: decodes them.
      ids: of the prompt; new tokens are appended to a copy.
      ends: tokens that end the text.
      stop: strings that end it; the text ends before the first of them.
      on_text: called with each new piece and `row`; None for nobody.
      row: the number of the prompt.
    """

    tokenizer: Tokenizer
    ids: list[int]
    ends: Collection[int]
    stop: tuple[str, ...]
    on_text: Callable[[str, int], Any] | None
    row: int
    ended: bool = False

    def __post_init__(self) -> None:
        self._prompt = len(self.ids)
        self.ids = list(self.ids)
        self._length = len(self.tokenizer.decode(self.ids))  # characters
        self._told = 0
        self._text: str | None = None  # once a stop string has ended it

    def add(self, token: int) -> None:
        """Append a token, unless the text has ended."""
        if self.ended:
            return
        if token in self.ends:
            self.ended = True
            return
        self.ids.append(token)
        if not self.stop and self.on_text is None:
            return  # decoded once, at the end
        text = self._decoded()
        places = [text.find(string) for string in self.stop]
        places = [place for place in places if place >= 0]
        if places:
            self._text, self.ended = text[: min(places)], True
        elif self.on_text is not None:
            self._tell(text, self._sure(text))

    def finish(self) -> str:
        """Return the whole text, and tell what of it was not told."""
        self.ended = True
        text = self._decoded() if self._text is None else self._text
        self._tell(text, len(text))
        return text

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.ids)[self._length :]

    def _sure(self, text: str) -> int:
        """Return how many characters no later token changes or makes a stop string."""
        whole = text.rstrip(UNKNOWN)
        held = max(
            (
                size
                for string in self.stop
                for size in range(1, len(string))
                if whole.endswith(string[:size])
            ),
            default=0,
        )
        return len(whole) - held

    def _tell(self, text: str, sure: int) -> None:
        if self.on_text is not None and sure > self._told:
            self.on_text(text[self._told : sure], self.row)
            self._told = sure

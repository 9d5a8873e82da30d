"""Baselines: whole words, a dictionary by longest match, and WordPiece.

WordPiece: Schuster and Nakajima, 2012; its greedy longest match as in BERT (Devlin et
al., 2018, arXiv 1810.04805). Its training text was never published; like `tokenizers`,
which trains it here, pairs are merged by frequency.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxcompress.tokenization.symbols import MARKS, any_of, known_ids

KINDS = ("wordpiece", "word", "dictionary")
WORDS = {
    # A word takes the one space before it along, so that a text is its words joined.
    "whitespace": re.compile(r" ?\S+|\s"),
    # Letters, single digits, or other signs; the last of many spaces joins a word.
    "rules": re.compile(r" ?[^\W\d_]+|\d| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s"),
}
CONTINUES = "\uffff"  # before pieces inside a word; no character of any text
_CACHED_WORDS = 1 << 17
_LONGEST_CACHED = 64  # characters


class DictionaryTokenizer:
    """Words in a list, bytes for the rest; `decode(encode(text)) == text` always.

    `words` names the rule that cuts a text into words, "" for none. A word is one
    piece, where it is on the list. Otherwise, with `whole`, it becomes bytes; without,
    the longest piece that begins it is taken, then the longest that begins the rest. In
    WordPiece, which has `inner` pieces, the rest is compared with those only. A
    character that begins no piece becomes bytes. Ids: 0 (unknown, never produced), 1
    and 2 begin and end, control symbols, user symbols, 256 bytes, pieces, inner pieces.

    Raises ValueError where pieces repeat or are no text.

    Example:
      >>> tokenizer.decode(tokenizer.encode("a small text"))
      'a small text'
    """

    lossless = True
    bos_id: int | None = 1
    eos_id: int | None = 2
    add_eos = False
    end_ids = (2,)

    def __init__(
        self,
        pieces: Sequence[str],
        *,
        inner: Sequence[str] = (),
        words: str = "",
        whole: bool = False,
        user_symbols: Sequence[str] = (),
        control_symbols: Sequence[str] = (),
    ):
        if words and words not in WORDS:
            raise ValueError(f"words is {words!r}; known rules: {', '.join(WORDS)}")
        for name, some in (("pieces", pieces), ("inner pieces", inner)):
            repeated = [
                piece for piece, n in Counter(some).items() if n > 1 or not piece
            ]
            if repeated:
                raise ValueError(f"{name} are empty or repeated: {repeated[:5]}")
        marks = [b""] * (len(MARKS) + len(control_symbols))
        symbols = [*control_symbols, *user_symbols]
        self.symbols = {text: len(MARKS) + i for i, text in enumerate(symbols)}
        self.pieces = [
            *marks,
            *(symbol.encode() for symbol in user_symbols),
            *(bytes([byte]) for byte in range(256)),
            *(piece.encode() for piece in (*pieces, *inner)),
        ]
        first = len(MARKS) + len(symbols)
        self.byte_ids = list(range(first, first + 256))
        start = first + 256
        self._first = {piece: start + i for i, piece in enumerate(pieces)}
        start += len(pieces)
        self._inner = {piece: start + i for i, piece in enumerate(inner)} or self._first
        self._reach = _reach(self._first)
        self._inner_reach = _reach(self._inner)
        self._contents = {
            "kind": "dictionary",
            "pieces": list(pieces),
            "inner": list(inner),
            "words": words,
            "whole": whole,
            "user_symbols": list(user_symbols),
            "control_symbols": list(control_symbols),
        }
        self._symbol = re.compile(any_of(user_symbols))
        self._known: dict[str, list[int]] = {}
        self._lengths = np.array([len(piece) for piece in self.pieces], np.int32)
        self.vocab_size = len(self.pieces)
        self.digest = hashlib.sha256(self.to_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return ids of the text, without begin or end marks."""
        ids: list[int] = []
        start = 0
        for match in self._symbol.finditer(text):
            self._encode_words(text[start : match.start()], ids)
            ids.append(self.symbols[match.group()])
            start = match.end()
        self._encode_words(text[start:], ids)
        return ids

    def _encode_words(self, text: str, ids: list[int]) -> None:
        if not self._contents["words"]:
            ids += self._encode_word(text)
            return
        cache = self._known
        for word in WORDS[self._contents["words"]].findall(text):
            word_ids = cache.get(word)
            if word_ids is None:
                word_ids = self._encode_word(word)
                if len(word) <= _LONGEST_CACHED:
                    if len(cache) >= _CACHED_WORDS:
                        cache.clear()
                    cache[word] = word_ids
            ids += word_ids

    def _encode_word(self, word: str) -> list[int]:
        if word in self._first:
            return [self._first[word]]
        if self._contents["whole"]:
            return self._encode_bytes(word)
        ids, at = [], 0
        table, reach = self._first, self._reach
        while at < len(word):
            for end in range(min(len(word), at + reach.get(word[at], 0)), at, -1):
                if (i := table.get(word[at:end])) is not None:
                    ids.append(i)
                    at = end
                    break
            else:
                ids += self._encode_bytes(word[at])
                at += 1
            table, reach = self._inner, self._inner_reach
        return ids

    def _encode_bytes(self, text: str) -> list[int]:
        return [self.byte_ids[b] for b in text.encode("utf-8", "surrogatepass")]

    def decode(self, ids: Sequence[int]) -> str:
        """Return text of the ids; marks vanish, bytes that are no UTF-8 become
        U+FFFD.
        """
        raw = b"".join([self.pieces[i] for i in known_ids(ids, self.vocab_size)])
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")

    def token_bytes(self, ids: Sequence[int]) -> np.ndarray:
        """Count UTF-8 bytes of each id, int32; the sum is the length of the encoded
        text.
        """
        return self._lengths[np.asarray(ids, np.int64)]

    def to_bytes(self) -> bytes:
        """Serialize as JSON, which `from_bytes` reads."""
        return json.dumps(self._contents, sort_keys=True).encode()

    def keep(self, ids: Iterable[int]) -> "DictionaryTokenizer":
        """Return the tokenizer with these pieces only, renumbered in their order.

        Not for general use: `trim` knows which pieces must stay.
        """
        ids, contents = frozenset(ids), dict(self._contents)
        start = self.byte_ids[-1] + 1
        for name in ("pieces", "inner"):
            pieces = contents[name]
            contents[name] = [p for i, p in enumerate(pieces, start) if i in ids]
            start += len(pieces)
        return from_contents(contents)


def from_contents(contents: Mapping) -> DictionaryTokenizer:
    """Return the tokenizer of which `to_bytes` wrote these contents."""
    fields = {"pieces", "inner", "words", "whole", "user_symbols", "control_symbols"}
    if missing := fields - set(contents):
        raise ValueError(f"no dictionary tokenizer: {sorted(missing)} missing")
    return DictionaryTokenizer(**{name: contents[name] for name in fields})


def train_dictionary(
    texts: Sequence[str],
    *,
    kind: str,
    vocab_size: int,
    min_frequency: int,
    words: str,
    character_coverage: float,
    user_symbols: Sequence[str],
    control_symbols: Sequence[str],
) -> DictionaryTokenizer:
    """Train a tokenizer of kind "wordpiece", "word" or "dictionary"; see `train`."""
    if words not in WORDS:
        raise ValueError(f"words is {words!r}; known rules: {', '.join(WORDS)}")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORDS[words].findall(re.sub("[\ud800-\udfff]", " ", text)))
    taken = len(MARKS) + len(user_symbols) + len(control_symbols) + 256
    characters = [] if kind == "word" else _characters(counts, character_coverage)
    least = taken + (2 if kind == "wordpiece" else 1) * len(characters)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size is {vocab_size}, but characters, bytes and marks alone take "
            f"{least}; ask for more, or lower character_coverage"
        )
    options = {
        "words": words,
        "user_symbols": user_symbols,
        "control_symbols": control_symbols,
    }
    room = vocab_size - taken
    if kind == "wordpiece":
        first, inner = _merge_pieces(counts, characters, room, min_frequency)
        return DictionaryTokenizer(first, inner=inner, **options)
    pieces = dict.fromkeys(characters)
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    for word, count in frequent:
        if len(pieces) == room or count < min_frequency:
            break
        if kind == "word" or len(word) > 1:
            pieces[word] = None
    if kind == "dictionary":  # matches may begin and end anywhere
        return DictionaryTokenizer(list(pieces), **options | {"words": ""})
    return DictionaryTokenizer(list(pieces), whole=True, **options)


def _characters(counts: Counter[str], coverage: float) -> list[str]:
    """Return the most frequent characters that make up so much of the text."""
    single: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            single[character] += count
    kept, covered, total = [], 0, sum(single.values())
    for character, count in sorted(single.items(), key=lambda x: (-x[1], x[0])):
        if covered >= coverage * total:
            break
        kept.append(character)
        covered += count
    return kept


def _merge_pieces(
    counts: Counter[str], characters: Sequence[str], room: int, min_frequency: int
) -> tuple[list[str], list[str]]:
    """Return pieces that begin a word, and pieces inside one, at most `room` of
    them.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "WordPiece is trained by the package tokenizers: pip install "
            "'jaxcompress[models]'"
        ) from error
    alphabet = frozenset(characters)
    built = tokenizers.Tokenizer(tokenizers.models.WordPiece())
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=room,
        min_frequency=min_frequency,
        # Given in order: it numbers them by chance, and breaks ties by number.
        special_tokens=[*characters, *(CONTINUES + c for c in characters)],
        limit_alphabet=2 * len(characters),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )

    def corpus() -> Iterator[str]:
        for word, count in sorted(counts.items()):
            if alphabet.issuperset(word) and CONTINUES not in word:
                yield from [word] * count

    built.train_from_iterator(corpus(), trainer)
    vocabulary = built.get_vocab()
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)[:room]
    first = [piece for piece in ordered if not piece.startswith(CONTINUES)]
    inner = [piece[1:] for piece in ordered if piece.startswith(CONTINUES)]
    return first, inner


def _reach(table: Mapping[str, int]) -> dict[str, int]:
    """Return length of the longest piece that begins with a character."""
    reach: dict[str, int] = {}
    for piece in table:
        reach[piece[0]] = max(reach.get(piece[0], 0), len(piece))
    return reach

"""Tokenizers over SentencePiece, by default without loss.

Source: Kudo and Richardson, 2018, arXiv 1808.06226; byte-pair merges: Sennrich et al.,
2016, 1508.07909; unigram: Kudo, 2018, 1804.10959.
"""

import bisect
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from jaxcompress.tokenization import piece_models
from jaxcompress.tokenization.piece_models import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
)
from jaxcompress.tokenization.symbols import MARKS, SPACE, any_of, known_ids

KINDS = ("bpe", "unigram", "char")
NORMALIZATIONS = ("identity", "nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")
_CHUNK = 4000  # bytes of text in one training sentence
_WORD = re.compile(r" *[^ ]+| +")
_REMEMBERED = 1 << 21  # characters of words


class SentencePieceTokenizer:
    """Text to ids and back; `decode(encode(text)) == text` for every Python string.

    Characters without a piece become bytes, one id each. Ids of no text: 0 (unknown),
    `bos_id`, `eos_id` and control symbols; no text is encoded as one of them.

    Where no piece reaches from a word into the next, words are segmented one by one and
    remembered. For byte pairs that changes nothing and is faster. For unigram models it
    is slower than SentencePiece on a whole text, but does not depend on what is
    around a word: SentencePiece adds up scores in float32, and in a long text equal and
    nearly equal segmentations are told apart by rounding only.

    A model that normalizes text or has no byte pieces is not `lossless`: it works as
    SentencePiece itself does, and unknown characters become id 0.
    """

    add_eos = False

    def __init__(self, model: bytes):
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"{len(model)} bytes are not a SentencePiece model: {error}"
            ) from error
        read = piece_models.read(model)
        self._model = model
        self._processor = processor
        self.kind = read.kind
        self.table = read.pieces
        self.pieces = [_piece_bytes(piece) for piece in read.pieces]
        self._lengths = np.array([len(piece) for piece in self.pieces], np.int32)
        bytes_ = {p.text: i for i, p in enumerate(read.pieces) if p.type == BYTE}
        self.byte_ids = [bytes_[f"<0x{b:02X}>"] for b in range(256)] if bytes_ else None
        self.lossless = read.exact and self.byte_ids is not None
        self.vocab_size = len(processor)
        self.bos_id: int | None = _or_none(processor.bos_id())
        self.eos_id: int | None = _or_none(processor.eos_id())
        if self.eos_id is None and read.end is not None:  # not a control symbol
            texts = [piece.text for piece in read.pieces]
            self.eos_id = texts.index(read.end) if read.end in texts else None
        self.end_ids = () if self.eos_id is None else (self.eos_id,)
        self.symbols = {
            piece.text: i
            for i, piece in enumerate(read.pieces)
            if piece.type in (CONTROL, USER_DEFINED)
            and i not in (self.bos_id, self.eos_id)
        }
        reserved = [p.text for p in read.pieces if p.type in (CONTROL, UNKNOWN)]
        self._raw, self._reserved = _patterns(reserved)
        self._by_words = not any(re.search("[^ ] ", p) for p in _texts(read.pieces))
        self._known: dict[str, list[int]] = {}
        self._remembered = 0  # characters
        self.digest = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return ids of the text, without begin or end marks."""
        if not self.lossless:
            return self._processor.EncodeAsIds(text.encode("utf-8", "replace").decode())
        units: list[str] = []
        for part, raw in self.parts(text):
            units += [part] if raw else self.words(part)
        if not self._by_words:
            return [i for ids in self._encode_all(units) for i in ids]
        if self._remembered > _REMEMBERED:
            self._known.clear()
            self._remembered = 0
        cache = self._known
        fresh = [unit for unit in dict.fromkeys(units) if unit not in cache]
        cache.update(zip(fresh, self._encode_all(fresh), strict=True))
        self._remembered += sum(map(len, fresh))
        return [i for unit in units for i in cache[unit]]

    def parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """Return parts of the text, and which of them must be written as bytes.

        A reserved word in the text is cut after its first character.
        """
        for i, part in enumerate(self._raw.split(text)):
            if i % 2:
                yield part, True
                continue
            start = 0
            while match := self._reserved.search(part, start):
                yield part[start : match.start() + 1], False
                start = match.start() + 1
            if start < len(part):
                yield part[start:], False

    def words(self, text: str) -> list[str]:
        """Return the parts of one of the `parts` that are segmented on their own."""
        return _WORD.findall(text) if self._by_words else [text]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return ids of words and of raw parts.

        In ids of words all bytes of the space symbol mean a space. They occur
        where a space is not a piece, or is in an unknown word.
        """
        symbol = [self.byte_ids[byte] for byte in SPACE.encode()]
        raw = {i: text for i, text in enumerate(texts) if self._raw.match(text)}
        plain = [" " if i in raw else text for i, text in enumerate(texts)]
        encoded = self._processor.EncodeAsIds(plain, num_threads=1)
        for i, ids in enumerate(encoded):
            if i in raw:
                data = raw[i].encode("utf-8", "surrogatepass")
                encoded[i] = [self.byte_ids[byte] for byte in data]
                continue
            at = 0
            for _ in range(ids.count(symbol[0])):
                at = ids.index(symbol[0], at)
                if ids[at : at + 3] == symbol:
                    ids[at : at + 3] = [self.byte_ids[0x20]]
                at += 1
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Return text of the ids; marks vanish, bytes that are no UTF-8 become
        U+FFFD.
        """
        if not self.lossless:
            return self._processor.DecodeIds([int(i) for i in ids])
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
        """Return the serialized model, which `from_bytes` reads."""
        return self._model

    def keep(self, ids: Iterable[int]) -> "SentencePieceTokenizer":
        """Return the tokenizer with these pieces only, renumbered in their order.

        Not for general use: `trim` knows which pieces must stay.
        """
        return SentencePieceTokenizer(piece_models.keep_pieces(self._model, ids))


def train_pieces(
    texts: Sequence[str],
    *,
    kind: str,
    vocab_size: int,
    min_frequency: int,
    split_words: bool,
    split_scripts: bool,
    split_digits: bool,
    longest_piece: int,
    character_coverage: float,
    byte_fallback: bool,
    normalization: str,
    user_symbols: Sequence[str],
    control_symbols: Sequence[str],
) -> SentencePieceTokenizer:
    """Train a tokenizer of kind "bpe", "unigram" or "char"; see `train`."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"normalization {normalization!r} is not known; known: {NORMALIZATIONS}"
        )
    exact = normalization == "identity"
    options = {
        "model_type": kind,
        "hard_vocab_limit": kind in ("bpe", "unigram"),
        "normalization_rule_name": normalization,
        "add_dummy_prefix": not exact,
        "remove_extra_whitespaces": not exact,
        "byte_fallback": byte_fallback,
        "character_coverage": character_coverage,
        "split_by_whitespace": split_words,
        "split_by_unicode_script": split_scripts,
        "split_by_number": split_scripts,
        "split_digits": split_digits,
        "allow_whitespace_only_pieces": exact,
        "max_sentencepiece_length": longest_piece,
        "user_defined_symbols": list(user_symbols),
        "control_symbols": list(control_symbols),
    }
    _, reserved = _patterns([*MARKS, *control_symbols])
    sentences = [chunk for text in texts for chunk in _chunks(text, reserved)]
    try:
        model = _run(sentences, vocab_size, options)
    except RuntimeError as error:
        largest = _largest(error)
        if largest is None or min_frequency < 2:
            raise ValueError(_explain(error, kind, vocab_size)) from error
        model = _run(sentences, largest, options)  # the frequency will decide
    tokenizer = SentencePieceTokenizer(model)
    return tokenizer if min_frequency < 2 else _cut(tokenizer, texts, min_frequency)


def _run(sentences: Sequence[str], vocab_size: int, options: dict) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        max_sentence_length=4 * _CHUNK,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def _cut(
    tokenizer: SentencePieceTokenizer, texts: Sequence[str], min_frequency: int
) -> SentencePieceTokenizer:
    """Drop the last merges that happen less often than that in the texts.

    The last merge of a vocabulary is a part of no other one, so it happens as often as
    its piece is used; and no merge is more frequent than an earlier one. So the place
    of the cut is found by bisection.
    """
    words: Counter[str] = Counter()
    for text in texts:
        for part, verbatim in tokenizer.parts(text):
            if not verbatim:
                words.update(tokenizer.words(part))
    merges = [
        i
        for i, piece in enumerate(tokenizer.table)
        if piece.type == NORMAL and len(piece.text) > 1
    ]
    base = frozenset(range(tokenizer.vocab_size)).difference(merges)

    def first(count: int) -> SentencePieceTokenizer:
        return tokenizer.keep(base.union(merges[:count]))

    def often(count: int) -> bool:
        cut = first(count)
        last = cut.table.index(tokenizer.table[merges[count - 1]])
        uses = sum(cut.encode(word).count(last) * n for word, n in words.items())
        return uses >= min_frequency

    counts = range(1, len(merges) + 1)
    return first(bisect.bisect_left(counts, True, key=lambda n: not often(n)))


def _chunks(text: str, reserved: re.Pattern) -> Iterator[str]:
    """Return parts of bounded size that begin, not end, with a newline.

    SentencePiece drops newlines at the end of a sentence, reserved words, and whole
    sentences that hold a NUL or are too long.
    """
    text = re.sub("[\0\ud800-\udfff]", " ", text)
    chunk, size = [], 0
    for line in re.findall(r"\n?[^\n]{0,1000}", text):
        length = len(line.encode())
        if size + length > _CHUNK and chunk:
            yield "".join(chunk)
            chunk, size = [], 0
        while match := reserved.search(line):
            yield "".join([*chunk, line[: match.start() + 1]])
            chunk, size = [], 0
            line = line[match.start() + 1 :]
        chunk.append(line)
        size += length
    if size:
        yield "".join(chunk)


def _patterns(reserved: Sequence[str]) -> tuple[re.Pattern, re.Pattern]:
    """Split the texts: what is stored as bytes, and words that must not be stored
    whole.

    What SentencePiece would take for something else: the space symbol itself, what
    UTF-8 cannot hold, and words that spell a mark, a control symbol or a byte piece.
    """
    single = "".join(re.escape(word) for word in reserved if len(word) == 1)
    longer = any_of([word for word in reserved if len(word) > 1])
    return (
        re.compile(f"([{SPACE}\ud800-\udfff{single}]+)"),
        re.compile(f"<0x[0-9A-F]{{2}}>|{longer}"),
    )


def _largest(error: RuntimeError) -> int | None:
    match = re.search(r"too high.*<= *(\d+)", str(error))
    return int(match.group(1)) if match else None


def _explain(error: RuntimeError, kind: str, vocab_size: int) -> str:
    message = str(error)
    if largest := _largest(error):
        return (
            f"vocab_size is {vocab_size}, but this corpus gives a {kind} tokenizer at "
            f"most {largest}; ask for fewer, or add text"
        )
    if match := re.search(r"required_chars.*?(\d+) vs (\d+)", message):
        return (
            f"vocab_size is {vocab_size}, but characters, bytes and marks alone take "
            f"{match.group(2)}; ask for more, or lower character_coverage"
        )
    if "(vocab_size) >= (0)" in message:
        return (
            f"vocab_size is {vocab_size}, but bytes and marks alone take 259; ask for "
            "more"
        )
    return f"SentencePiece could not train a {kind} tokenizer: {message}"


def _texts(table: Sequence[Piece]) -> Iterator[str]:
    """Return texts of the pieces of more than a byte."""
    for piece in table:
        if piece.type in (NORMAL, USER_DEFINED):
            yield piece.text.replace(SPACE, " ")


def _piece_bytes(piece: Piece) -> bytes:
    if piece.type in (CONTROL, UNKNOWN, UNUSED):
        return b""
    if piece.type == BYTE:
        return bytes([int(piece.text[3:5], 16)])
    return piece.text.replace(SPACE, " ").encode()


def _or_none(i: int) -> int | None:
    return i if i >= 0 else None

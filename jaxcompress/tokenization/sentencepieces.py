"""Tokenizers trained on one's own text, over SentencePiece, without loss.

Source: Kudo and Richardson, 2018, arXiv 1808.06226; byte-pair merges: Sennrich et al.,
2016, 1508.07909; unigram: Kudo, 2018, 1804.10959.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

KINDS = ("bpe", "unigram", "char", "word")
SPACE = "\u2581"  # stands for a space inside a piece
# What SentencePiece would take for something else goes in as bytes: the space symbol
# itself, words that spell a control or byte piece (they are taken for it in 0.2.0), and
# what UTF-8 cannot hold.
_VERBATIM = re.compile(f"(?:[{SPACE}\ud800-\udfff]|<unk>|</?s>|<0x[0-9A-F]{{2}}>)+")
_CHUNK = 4000  # bytes of text in one training sentence


class SentencePieceTokenizer:
    """Text to ids and back; `decode(encode(text)) == text` for every Python string.

    Characters without a piece become bytes, one id each. Ids of no text: 0 (unknown,
    never produced), `bos_id` and `eos_id`.
    """

    def __init__(self, model: bytes):
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"{len(model)} bytes are not a SentencePiece model: {error}"
            ) from error
        self._model = model
        self._processor = processor
        self._pieces = [_piece_bytes(processor, i) for i in range(len(processor))]
        self._lengths = np.array([len(piece) for piece in self._pieces], np.int32)
        self._byte_ids = [processor.PieceToId(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(processor.IsByte(i) for i in self._byte_ids):
            raise ValueError(
                "the SentencePiece model has no byte pieces, so it would lose unknown "
                "characters; train it with byte_fallback"
            )
        self.vocab_size = len(processor)
        self.bos_id: int | None = _or_none(processor.bos_id())
        self.eos_id: int | None = _or_none(processor.eos_id())
        self.digest = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without begin or end marks."""
        ids, start = [], 0
        for match in _VERBATIM.finditer(text):
            ids += self._encode_plain(text[start : match.start()])
            raw = match.group().encode("utf-8", "surrogatepass")
            ids += [self._byte_ids[byte] for byte in raw]
            start = match.end()
        return ids + self._encode_plain(text[start:])

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of text without the space symbol, of which all bytes stand for a space.

        They come up where a space is not a piece, or is in an unknown word.
        """
        ids = self._processor.EncodeAsIds(text)
        symbol = [self._byte_ids[byte] for byte in SPACE.encode()]
        at = 0
        for _ in range(ids.count(symbol[0])):
            at = ids.index(symbol[0], at)
            if ids[at : at + 3] == symbol:
                ids[at : at + 3] = [self._byte_ids[0x20]]
            at += 1
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; marks vanish, bytes that are no UTF-8 become U+FFFD."""
        raw = b"".join(self._pieces[i] for i in ids)
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")

    def token_bytes(self, ids: Sequence[int]) -> np.ndarray:
        """UTF-8 bytes of each id, int32; the sum is the length of the encoded text."""
        return self._lengths[np.asarray(ids, np.int64)]

    def to_bytes(self) -> bytes:
        """The serialized model, which `from_bytes` reads."""
        return self._model


def train(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int,
    split_words: bool = True,
    split_scripts: bool = True,
    split_digits: bool = True,
    longest_piece: int = 16,
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Train a lossless tokenizer on texts; the same texts give the same bytes.

    `kind` is "bpe", "unigram", "char" or "word"; for the last two `vocab_size` is an
    upper bound. With `split_words=False` a piece may reach across spaces, with
    `split_scripts=False` it may join letters and punctuation; both shorten source code.
    Newlines and runs of spaces can be part of pieces, tabs are always bytes, and so are
    the rarest characters, a fraction 1 - `character_coverage` of the text. Raises
    ValueError on an empty corpus and on a vocabulary that is too small or too large.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of tokenizer {kind!r}; known: {KINDS}")
    if isinstance(texts, str):
        raise ValueError("texts is one string; pass a list of texts")
    sentences = [chunk for text in texts for chunk in _chunks(text)]
    if not any(sentence.strip() for sentence in sentences):
        raise ValueError("the corpus holds no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=kind in ("bpe", "unigram"),
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            character_coverage=character_coverage,
            split_by_whitespace=split_words,
            split_by_unicode_script=split_scripts,
            split_by_number=split_scripts,
            split_digits=split_digits,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=longest_piece,
            max_sentence_length=4 * _CHUNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(error, kind, vocab_size)) from error
    return SentencePieceTokenizer(model.getvalue())


def _chunks(text: str) -> Iterator[str]:
    """Parts of bounded size that begin, not end, with a newline.

    SentencePiece drops newlines at the end of a sentence and whole sentences that hold
    a NUL or are too long.
    """
    text = re.sub("[\0\ud800-\udfff]", " ", text)
    chunk, size = [], 0
    for line in re.findall(r"\n?[^\n]{0,1000}", text):
        length = len(line.encode())
        if size + length > _CHUNK and chunk:
            yield "".join(chunk)
            chunk, size = [], 0
        chunk.append(line)
        size += length
    if size:
        yield "".join(chunk)


def _explain(error: RuntimeError, kind: str, vocab_size: int) -> str:
    message = str(error)
    if found := re.search(r"too high.*<= *(\d+)", message):
        return (
            f"vocab_size is {vocab_size}, but this corpus gives a {kind} tokenizer at "
            f"most {found.group(1)}; ask for fewer, or add text"
        )
    if found := re.search(r"required_chars.*?(\d+) vs (\d+)", message):
        return (
            f"vocab_size is {vocab_size}, but characters, bytes and marks alone take "
            f"{found.group(2)}; ask for more, or lower character_coverage"
        )
    if "(vocab_size) >= (0)" in message:
        return (
            f"vocab_size is {vocab_size}, but bytes and marks alone take 259; ask for "
            "more"
        )
    return f"SentencePiece could not train a {kind} tokenizer: {message}"


def _piece_bytes(processor, i: int) -> bytes:
    if processor.IsControl(i) or processor.IsUnknown(i) or processor.IsUnused(i):
        return b""
    piece = processor.IdToPiece(i)
    if processor.IsByte(i):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _or_none(i: int) -> int | None:
    return i if i >= 0 else None

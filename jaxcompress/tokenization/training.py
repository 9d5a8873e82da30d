"""One way to train every kind of tokenizer."""

from collections.abc import Iterable, Sequence

from jaxcompress.tokenization import dictionaries, sentencepieces
from jaxcompress.tokenization.dictionaries import DictionaryTokenizer
from jaxcompress.tokenization.sentencepieces import SentencePieceTokenizer
from jaxcompress.tokenization.symbols import check_symbols

KINDS = (*sentencepieces.KINDS, *dictionaries.KINDS)
_COUNTED = ("bpe", *dictionaries.KINDS)  # kinds for which a least frequency means much


def train(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int,
    min_frequency: int = 1,
    split_words: bool = True,
    split_scripts: bool = True,
    split_digits: bool = True,
    longest_piece: int = 16,
    words: str = "rules",
    character_coverage: float = 0.9995,
    byte_fallback: bool = True,
    normalization: str = "identity",
    user_symbols: Sequence[str] = (),
    control_symbols: Sequence[str] = (),
) -> SentencePieceTokenizer | DictionaryTokenizer:
    """Train a tokenizer on texts, without loss; the same texts give the same bytes.

    Newlines and runs of spaces can be part of pieces; the rarest characters, and in
    SentencePiece tabs, are always bytes.

    Args:
      texts: the corpus.
      kind: "bpe", "unigram" or "char" (SentencePiece), "wordpiece" (needs the package
        `tokenizers`), "word" (words or bytes), "dictionary" (the frequent words and
        characters, by longest match, across words too).
      vocab_size: pieces, 256 bytes and 3 marks included; an upper bound for "char",
        "wordpiece", "word", "dictionary", and with `min_frequency`.
      min_frequency: merge no pair, take no word, that is rarer than this in the texts.
        SentencePiece has no such limit: its last merges are cut off afterwards.
      split_words: False lets a SentencePiece piece reach across spaces.
      split_scripts: False lets it join letters, digits and punctuation.
      split_digits: False lets it join digits. All three False shorten source code.
      longest_piece: characters in a SentencePiece piece.
      words: how text is cut for the last three kinds: "rules" (letters, single digits,
        other signs, spaces) or "whitespace".
      character_coverage: fraction of the text whose characters get a piece.
      byte_fallback: False makes characters without a piece unknown (id 0) and loses
        them; SentencePiece kinds only, as the next one.
      normalization: "identity" keeps every character; "nmt_nfkc", SentencePiece's own
        default, "nfkc", "nmt_nfkc_cf" and "nfkc_cf" rewrite text, squeeze its spaces
        and lose that.
      user_symbols: words that are always one token, and text again when decoded.
      control_symbols: tokens that no text gives, and that give no text; both are found
        in `tokenizer.symbols`.

    Raises:
      ValueError: on an empty corpus, a vocabulary that is too small or too large,
        a symbol that could be mistaken, or an option that the kind does not have.

    Example:
      >>> texts = ["a small text", "another small text"] * 20
      >>> tokenizer = jc.tokenization.train(texts, kind="word", vocab_size=270)
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of tokenizer {kind!r}; known: {KINDS}")
    if isinstance(texts, str):
        raise ValueError("texts is one string; pass a list of texts")
    if min_frequency > 1 and kind not in _COUNTED:
        raise ValueError(
            f"min_frequency is {min_frequency}, but a {kind} tokenizer merges no "
            f"pairs; it is an option of {', '.join(_COUNTED)}"
        )
    check_symbols(user_symbols, control_symbols)
    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise ValueError("the corpus holds no text to train a tokenizer on")
    shared = {
        "kind": kind,
        "vocab_size": vocab_size,
        "min_frequency": min_frequency,
        "character_coverage": character_coverage,
        "user_symbols": user_symbols,
        "control_symbols": control_symbols,
    }
    if kind in dictionaries.KINDS:
        if not byte_fallback or normalization != "identity":
            raise ValueError(
                f"byte_fallback={byte_fallback} and normalization={normalization!r}: a "
                f"{kind} tokenizer is always without loss"
            )
        return dictionaries.train_dictionary(texts, words=words, **shared)
    return sentencepieces.train_pieces(
        texts,
        split_words=split_words,
        split_scripts=split_scripts,
        split_digits=split_digits,
        longest_piece=longest_piece,
        byte_fallback=byte_fallback,
        normalization=normalization,
        **shared,
    )

"""Text to bytes with a language model, and back: `encode`, `decode`, `verify`.

A text is tokenized and cut in lanes of equal length, which know nothing of each other;
`windows` codes their tokens. Here is what surrounds them: the options, the digests, the
lanes that a model does not make smaller, and every check.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import numpy as np

from jaxcompress.coding.zstd import compress_text, decompress_text
from jaxcompress.models.saved import load_reference
from jaxcompress.storage import FileDamaged
from jaxcompress.textcoding import container, pieces
from jaxcompress.textcoding.container import MIXED, RAW, TOKENS, ZSTD, Contents, Lane
from jaxcompress.textcoding.export import exact, self_test
from jaxcompress.textcoding.integer_transformer import ExactTransformer
from jaxcompress.textcoding.mixing import MOST_TOKENS
from jaxcompress.textcoding.windows import decode_windows, encode_windows
from jaxcompress.tokenization import Tokenizer
from jaxcompress.types import Params

_CONTEXT = 2048  # of the exact model, unless a window is longer
# So few layers are compiled one by one, for a text of so many bytes or more.
_UNSTACKED_LAYERS, _UNSTACKED_BYTES = 8, 1 << 15


@dataclasses.dataclass(frozen=True)
class Coder:
    """An exact model on this device, its tokenizer, and the digests of both."""

    model: ExactTransformer
    tokenizer: Tokenizer
    digest: str  # of the model as it was exported
    canary: bytes


def encode(
    data: bytes,
    model: Any = None,
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    lanes: int | None = None,
    window: int = 512,
    overlap: int | None = None,
    mix: bool = True,
    primer: bytes = b"",
    store: bool = True,
    verify: bool = True,
) -> bytes:
    """Compress any bytes, best text, to bytes that `decode` turns back exactly.

    Args:
      data: text in UTF-8, or any other bytes.
      model: a `Transformer`, an `ExactTransformer`, or None for the reference model.
      params: parameters of a `Transformer`, dense or compressed.
      tokenizer: the model's tokenizer.
      lanes: parts that are decoded at the same time. More are faster, and each begins
        without a context, which costs some tens of bytes. None: one for 16 384 tokens.
      window: tokens that the model sees at most.
      overlap: tokens of a window that the window before has coded already; they cost
        time, and save bits. None: half the window.
      mix: let what a lane has shown so far correct the model (`mixing`).
      primer: text that the model reads before each lane, best one of the same kind. It
        is not stored: `decode` needs it too. Its last tokens are taken, half a window
        at most.
      store: keep a lane as it is, or as a Zstandard frame, where that is smaller.
      verify: decode again, and compare.

    Raises:
      ValueError: options out of range, no tokenizer, or a model that has no exact form.
      RuntimeError: the device does not compute exact sums, or the text was not
        restored.

    Example:
      >>> stored = jc.textcoding.encode(b"a small text", model, params, tokenizer)
    """
    overlap = window // 2 if overlap is None else overlap
    if not 2 <= window <= 8192:
        raise ValueError(f"window is {window}; it must be from 2 to 8192")
    if not 0 <= overlap < window:
        raise ValueError(f"overlap is {overlap}; from 0 to {window - 1} is wanted")
    if lanes is not None and lanes < 1:
        raise ValueError(f"lanes is {lanes}; at least 1 is needed")
    coder = _coder(model, params, tokenizer, window)
    primer_ids = _primer_ids(coder.tokenizer, primer, window)
    whole = pieces.to_pieces(coder.tokenizer, data)
    total = len(whole.ids)
    lane_tokens = -(-total // (lanes or -(-total // 16384) or 1)) or 1
    if mix and lane_tokens > MOST_TOKENS:
        raise ValueError(
            f"lanes of {lane_tokens} tokens; mixing allows {MOST_TOKENS}, take more "
            "lanes or mix=False"
        )
    counts = [lane_tokens] * (total // lane_tokens)
    if total % lane_tokens or not counts:
        counts.append(total % lane_tokens)
    parts = pieces.cut(whole, counts)
    stored = [_stored(pieces.from_pieces(coder.tokenizer, part)) for part in parts]
    first = _first_token(coder.tokenizer)
    coded = [
        i
        for i, part in enumerate(parts)
        if not store or _may_gain(stored[i], len(part.ids))
    ]
    payloads = encode_windows(
        _model_for(coder, len(data)),
        [parts[i].ids for i in coded],
        first,
        window,
        overlap,
        primer_ids,
        mix,
    )
    records = list(stored)
    for i, payload in zip(coded, payloads, strict=True):
        lane = Lane(TOKENS, payload)
        if parts[i].escapes or len(parts[i].ids) != lane_tokens:
            head = container.varint(len(parts[i].ids))
            head += container.write_escapes(parts[i].escapes)
            lane = Lane(MIXED, head + payload)
        if not store or len(lane.payload) < len(stored[i].payload):
            records[i] = lane
    contents = Contents(
        model=bytes.fromhex(coder.digest)[:16],
        tokenizer=bytes.fromhex(coder.tokenizer.digest)[:16],
        canary=coder.canary,
        data=hashlib.sha256(data).digest()[:16],
        nbytes=len(data),
        window=window,
        overlap=overlap,
        first_token=first,
        lane_tokens=lane_tokens,
        lanes=records,
        mix=mix,
        primer=_digest_of(primer),
    )
    out = container.write(contents)
    if verify and _decode(out, coder, primer) != data:
        raise RuntimeError("decoding did not restore the text")
    return out


def decode(
    stored: bytes,
    model: Any = None,
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    primer: bytes = b"",
) -> bytes:
    """Decompress what `encode` made, with the same model and tokenizer.

    Nothing is returned before every checksum fits: of the file, of the model, of the
    tokenizer, of the logits that this device computes, of the coder's last states and
    of the text.

    Args:
      stored: of `encode`.
      model, params, tokenizer: those that encoded; none for the reference model.
      primer: that of the encoder.

    Raises:
      FileDamaged: a ValueError; the file is cut, altered or none of ours.
      ValueError: the model, the tokenizer or the primer is not the one that the file
        was made with, or this device computes other logits; digests are named.

    Example:
      >>> stored = jc.textcoding.encode(b"a small text", model, params, tokenizer)
      >>> jc.textcoding.decode(stored, model, params, tokenizer)
      b'a small text'
    """
    window = container.read(stored).window
    return _decode(stored, _coder(model, params, tokenizer, window), primer)


def verify(
    stored: bytes,
    model: Any = None,
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    primer: bytes = b"",
) -> int:
    """Decode a file and check everything; returns the length of the text in bytes.

    Raises as `decode`.

    Args:
      stored: of `encode`.
      model, params, tokenizer, primer: as for `decode`.

    Example:
      >>> stored = jc.textcoding.encode(b"a small text", model, params, tokenizer)
      >>> jc.textcoding.verify(stored, model, params, tokenizer)
      12
    """
    return len(decode(stored, model, params, tokenizer, primer=primer))


def _decode(stored: bytes, coder: Coder, primer: bytes = b"") -> bytes:
    contents = container.read(stored)
    _check_same("model", contents.model, bytes.fromhex(coder.digest))
    digest = bytes.fromhex(coder.tokenizer.digest)
    _check_same("tokenizer", contents.tokenizer, digest)
    _check_same("primer", contents.primer, _digest_of(primer))
    _check_same("logits on fixed tokens", contents.canary, coder.canary)
    if not 0 <= contents.overlap < contents.window <= 8192:
        raise FileDamaged(f"windows of {contents.window} overlap by {contents.overlap}")
    plain: dict[int, bytes] = {}
    coded: dict[int, tuple[int, list[tuple[int, bytes]], bytes]] = {}
    for i, lane in enumerate(contents.lanes):
        if lane.kind == RAW:
            plain[i] = lane.payload
        elif lane.kind == ZSTD:
            plain[i] = decompress_text(lane.payload, contents.nbytes)
        elif lane.kind == TOKENS:
            coded[i] = (contents.lane_tokens, [], lane.payload)
        else:
            reader = container.Reader(lane.payload)
            count = reader.varint()
            escapes = container.read_escapes(reader, count)
            coded[i] = (count, escapes, lane.payload[reader.position :])
    counts = [count for count, _, _ in coded.values()]
    if sum(counts) > max(contents.nbytes, 0):
        raise FileDamaged(f"{sum(counts)} tokens for {contents.nbytes} bytes of text")
    ids = decode_windows(
        _model_for(coder, contents.nbytes),
        [payload for _, _, payload in coded.values()],
        counts,
        contents.first_token,
        contents.window,
        contents.overlap,
        _primer_ids(coder.tokenizer, primer, contents.window),
        contents.mix,
    )
    for (i, (_, escapes, _)), own in zip(coded.items(), ids, strict=True):
        part = pieces.Pieces(own, escapes)
        plain[i] = pieces.from_pieces(coder.tokenizer, part)
    data = b"".join(plain[i] for i in range(len(contents.lanes)))
    same = hashlib.sha256(data).digest()[:16] == contents.data
    if len(data) != contents.nbytes or not same:
        raise FileDamaged(
            f"decoding gave {len(data)} bytes whose checksum is not that of the "
            f"{contents.nbytes} bytes that were encoded"
        )
    return data


def _check_same(what: str, wanted: bytes, actual: bytes) -> None:
    if wanted != actual[: len(wanted)]:
        raise ValueError(
            f"the file was made with another {what}: SHA-256 {wanted.hex()}..., here "
            f"{actual[: len(wanted)].hex()}...; pass the model, tokenizer and "
            "primer that encoded it"
        )


def _coder(
    model: Any, params: Params | None, tokenizer: Tokenizer | None, window: int
) -> Coder:
    """Return the exact model of the arguments, tested on this device."""
    context = max(_CONTEXT, window)
    if model is None:
        if params is not None:
            raise ValueError("params without a model; pass both, or neither")
        return _reference_coder(context)
    if tokenizer is None:
        raise ValueError("no tokenizer; pass the one that the model was trained with")
    if not isinstance(model, ExactTransformer):
        model = exact(model, params, context=context)
    elif params is not None:
        raise ValueError("an ExactTransformer holds its weights; params must be None")
    self_test(model)
    wide = model.widen()
    tokens = (np.arange(32, dtype=np.int32) * 37)[None] % model.model.vocab_size
    logits = np.asarray(_apply(wide, tokens)).astype("<i4")
    canary = hashlib.sha256(logits.tobytes()).digest()[:8]
    return Coder(wide, tokenizer, model.digest, canary)


@functools.lru_cache(maxsize=2)
def _reference_coder(context: int) -> Coder:
    model, params, tokenizer = load_reference(scan=False)
    return _coder(exact(model, params, context=context), None, tokenizer, context)


@jax.jit
def _apply(model: ExactTransformer, tokens: jax.Array) -> jax.Array:
    return model.apply(tokens)


def _model_for(coder: Coder, nbytes: int) -> ExactTransformer:
    """Return the model in the form that is quickest for so many bytes of text."""
    few = coder.model.model.layers <= _UNSTACKED_LAYERS
    stacked = isinstance(coder.model.arrays["layers"], dict)
    if few and stacked and nbytes >= _UNSTACKED_BYTES:
        return coder.model.unstack()
    return coder.model


def _primer_ids(tokenizer: Tokenizer, primer: bytes, window: int) -> list[int]:
    """Return the last tokens of a primer, half a window at most."""
    return pieces.to_pieces(tokenizer, primer).ids[-(window // 2) :] if primer else []


def _digest_of(primer: bytes) -> bytes:
    """Return what the header holds of a primer; zeros where there is none."""
    size = len(container.NO_PRIMER)
    return hashlib.sha256(primer).digest()[:size] if primer else container.NO_PRIMER


def _first_token(tokenizer: Tokenizer) -> int:
    """Return token that precedes a text: the begin mark, else the end mark, else 0."""
    marks = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    return marks[0] if marks else 0


def _stored(part: bytes) -> Lane:
    frame = compress_text(part)
    return Lane(ZSTD, frame) if len(frame) < len(part) else Lane(RAW, part)


def _may_gain(stored: Lane, tokens: int) -> bool:
    """Return False where a model can't win: no byte to a token, or a hundredth of a
    bit.
    """
    if stored.kind == RAW and tokens > 1024:
        return tokens < 0.8 * len(stored.payload)
    return tokens > 0 and len(stored.payload) > max(6, tokens // 800)

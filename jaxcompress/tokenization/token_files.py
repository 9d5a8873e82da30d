"""Token ids in a file that is mapped into memory, not read.

The file: 8 bytes `JCTOKENS`, the length of the header (uint64, little endian), the
header (JSON, padded with spaces to a multiple of 64 bytes), then the ids, uint16 where
the vocabulary fits and uint32 elsewhere, little endian, to the end.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxcompress.storage.tree_json import FileDamaged
from jaxcompress.tokenization.tokenizer import Tokenizer

MAGIC = b"JCTOKENS"
_HEADER = 512  # bytes, with magic and length; the numbers in it have fixed room
_KEYS = {"version", "dtype", "tokens", "tokenizer", "vocab_size", "blake2b"}


def write_tokens(
    path: str | Path, tokenizer: Tokenizer, ids: Iterable[np.ndarray], *, mark=True
) -> int:
    """Write the ids of texts, one after the other, and return how many they are.

    They pass through as they arrive (from `encode_many`, say). With `mark`, each text
    begins with the tokenizer's `bos_id`, and ends with its `eos_id` where the tokenizer
    says `add_eos`, or has no `bos_id`: texts are told apart. The
    file is written next to its place and moved there when it is whole, so that no half
    of it is ever seen. Raises ValueError on an id outside the vocabulary.

    Args:
      path: of the file.
      tokenizer: that encoded the texts.
      ids: of each text.
      mark: write the tokenizer's mark between texts.

    Example:
      >>> ids = [np.array(tokenizer.encode("a small text"))]
      >>> _ = jc.tokenization.write_tokens("text.tokens", tokenizer, ids)
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    begin = tokenizer.bos_id if mark else None
    ends = tokenizer.add_eos or begin is None
    end = tokenizer.eos_id if mark and ends else None
    digest, count = hashlib.blake2b(digest_size=16), 0
    try:
        with open(partial, "wb") as file:
            file.write(bytes(_HEADER))
            for text in ids:
                numbers = np.asarray(text, np.int64)
                if numbers.size and not (
                    numbers.min() >= 0 and numbers.max() < tokenizer.vocab_size
                ):
                    raise ValueError(
                        f"ids from {numbers.min()} to {numbers.max()} do not fit the "
                        f"tokenizer's {tokenizer.vocab_size}; encode with this one"
                    )
                marks = [[] if i is None else [i] for i in (begin, end)]
                raw = np.concatenate([marks[0], numbers, marks[1]]).astype(dtype)
                file.write(raw.tobytes())
                digest.update(raw.tobytes())
                count += raw.size
            header = {
                "version": 1,
                "dtype": dtype.str,
                "tokens": count,
                "tokenizer": tokenizer.digest,
                "vocab_size": tokenizer.vocab_size,
                "blake2b": digest.hexdigest(),
            }
            room = _HEADER - len(MAGIC) - 8
            file.seek(0)
            file.write(MAGIC + room.to_bytes(8, "little"))
            file.write(json.dumps(header).encode().ljust(room))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def open_tokens(
    path: str | Path, tokenizer: Tokenizer | None = None, *, verify: bool = False
) -> np.ndarray:
    """Return the ids of a file, mapped: uint16 or uint32 [tokens], read-only.

    Header and length are always checked; with `verify` the file is read once and its
    checksum compared. Raises FileDamaged (a ValueError) where they are wrong, and
    ValueError where the ids are another tokenizer's.

    Args:
      path: of a file of `write_tokens`.
      tokenizer: checked to be the one that wrote it, if given.
      verify: check every byte.

    Example:
      >>> ids = [np.array(tokenizer.encode("a small text"))]
      >>> _ = jc.tokenization.write_tokens("text.tokens", tokenizer, ids)
      >>> stored = jc.tokenization.open_tokens("text.tokens")
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(MAGIC) + 8)
        if start[: len(MAGIC)] != MAGIC:
            raise FileDamaged(f"{path} is no file of token ids: it begins {start!r}")
        room = int.from_bytes(start[len(MAGIC) :], "little")
        text = file.read(min(room, size))
    header = _header(path, text)
    dtype, first = np.dtype(header["dtype"]), len(start) + room
    wanted = first + header["tokens"] * dtype.itemsize
    if size != wanted:
        raise FileDamaged(
            f"{path} has {size} bytes and its header says {wanted}; write it again"
        )
    if tokenizer is not None and header["tokenizer"] != tokenizer.digest:
        raise ValueError(
            f"{path} holds ids of the tokenizer {header['tokenizer'][:12]}, not of "
            f"{tokenizer.digest[:12]}; encode the text again"
        )
    if not header["tokens"]:  # nothing to map
        return np.zeros(0, dtype)
    ids = np.memmap(path, dtype, "r", first, (header["tokens"],))
    if verify:
        digest = hashlib.blake2b(digest_size=16)
        for at in range(0, ids.size, 1 << 20):
            digest.update(ids[at : at + (1 << 20)].tobytes())
        if digest.hexdigest() != header["blake2b"]:
            raise FileDamaged(f"{path}: the ids are not those that were written")
    return ids


def _header(path: Path, text: bytes) -> dict:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise FileDamaged(f"{path}: the header is damaged: {error}") from error
    if not isinstance(header, dict) or _KEYS - set(header):
        raise FileDamaged(f"{path}: the header lacks {sorted(_KEYS - set(header))}")
    if header["version"] != 1 or header["dtype"] not in ("<u2", "<u4"):
        raise FileDamaged(
            f"{path} is of version {header['version']} with ids of type "
            f"{header['dtype']!r}, which this version does not know; update jaxcompress"
        )
    if not isinstance(header["tokens"], int) or header["tokens"] < 0:
        raise FileDamaged(f"{path}: the header says {header['tokens']!r} tokens")
    return header

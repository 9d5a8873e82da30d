"""The file of compressed text: a header, a record for each lane, and their checksums.

All integers are little endian; a varint has seven bits a byte, the lowest first, and
the high bit set on all bytes but the last.

    magic            4 bytes  "jxtc"
    version          1 byte   1, or 2 where `mix` or `primer` follows
    model            16 bytes of the exact model's SHA-256
    tokenizer        16 bytes of the tokenizer's SHA-256
    canary           8 bytes  of the SHA-256 of logits on fixed tokens
    data             16 bytes of the SHA-256 of the text
    varints          text bytes, window, overlap, first token, tokens a lane, lanes
    mix              1 byte   version 2 only: 1 where lanes are mixed (`mixing`), else 0
    primer           8 bytes  version 2 only: of the primer's SHA-256; zeros: no primer
    for each lane    varint: 4 * payload bytes + kind; CRC-32 of the payload, 4 bytes
    CRC-32           4 bytes  of everything before
    payloads         one after another, to the end of the file

Kinds of a payload: 0 the bytes of the text; 1 the same as a Zstandard frame; 2 the
state and words of a coder (`lanes`); 3 varint tokens, varint length and a Zstandard
frame of escapes, then as 2. An escape is a varint index (less the index before it), a
varint length and its bytes. Lanes of kind 2 have `tokens a lane` tokens; a last lane of
fewer is of kind 0, 1 or 3.
"""

import dataclasses
import zlib
from collections.abc import Sequence

from jaxcompress.coding.zstd import compress_text, decompress_text
from jaxcompress.storage import FileDamaged

MAGIC, VERSIONS = b"jxtc", (1, 2)
NO_PRIMER = bytes(8)
RAW, ZSTD, TOKENS, MIXED = range(4)
LARGEST = 1 << 40  # bytes of a text; a header that claims more is damaged
_DIGESTS = {"model": 16, "tokenizer": 16, "canary": 8, "data": 16}


@dataclasses.dataclass(frozen=True)
class Lane:
    """A part of the text that is coded by itself: its kind and its payload."""

    kind: int
    payload: bytes


@dataclasses.dataclass(frozen=True)
class Contents:
    """Contents of a file; digests are bytes, cut to the lengths above."""

    model: bytes
    tokenizer: bytes
    canary: bytes
    data: bytes
    nbytes: int
    window: int
    overlap: int
    first_token: int
    lane_tokens: int
    lanes: Sequence[Lane]
    mix: bool = False
    primer: bytes = NO_PRIMER


def write(contents: Contents) -> bytes:
    """Return the bytes of a file."""
    extended = contents.mix or contents.primer != NO_PRIMER
    header = MAGIC + bytes([2 if extended else 1])
    for name, length in _DIGESTS.items():
        header += getattr(contents, name)[:length]
    for number in (
        contents.nbytes,
        contents.window,
        contents.overlap,
        contents.first_token,
        contents.lane_tokens,
        len(contents.lanes),
    ):
        header += varint(number)
    if extended:
        header += bytes([contents.mix]) + contents.primer
    for lane in contents.lanes:
        header += varint(4 * len(lane.payload) + lane.kind)
        header += zlib.crc32(lane.payload).to_bytes(4, "little")
    header += zlib.crc32(header).to_bytes(4, "little")
    return header + b"".join(lane.payload for lane in contents.lanes)


def read(stored: bytes) -> Contents:
    """Return the contents of a file, every checksum of stored bytes checked.

    Raises FileDamaged, a ValueError, where it is cut, altered, longer than it says, or
    no such file.
    """
    if stored[:4] != MAGIC:
        raise FileDamaged(
            f"not compressed text: it begins with {stored[:4]!r}, not {MAGIC!r}"
        )
    if len(stored) > 4 and stored[4] not in VERSIONS:
        raise FileDamaged(
            f"compressed text of version {stored[4]}; this library reads {VERSIONS}"
        )
    reader = Reader(stored, 5)
    digests = {name: reader.take(length) for name, length in _DIGESTS.items()}
    numbers = [reader.varint() for _ in range(6)]
    if numbers[0] > LARGEST or numbers[5] > len(stored):
        raise FileDamaged(
            f"the header claims {numbers[0]} bytes of text in {numbers[5]} lanes, in a "
            f"file of {len(stored)} bytes"
        )
    options = {}
    if stored[4] == 2:
        mix = reader.take(1)[0]
        if mix > 1:
            raise FileDamaged(f"mixing rule {mix}; this library knows 0 and 1")
        options = {"mix": bool(mix), "primer": reader.take(len(NO_PRIMER))}
    records = [(reader.varint(), reader.take(4)) for _ in range(numbers[5])]
    checked = reader.position
    if reader.take(4) != zlib.crc32(stored[:checked]).to_bytes(4, "little"):
        raise FileDamaged("the header does not match its checksum")
    lanes = []
    for i, (record, checksum) in enumerate(records):
        payload = reader.take(record // 4)
        if zlib.crc32(payload).to_bytes(4, "little") != checksum:
            raise FileDamaged(f"lane {i} does not match its checksum")
        lanes.append(Lane(record % 4, payload))
    if reader.position != len(stored):
        raise FileDamaged(
            f"{len(stored) - reader.position} bytes follow the end of the last lane"
        )
    return Contents(
        **digests,
        **dict(zip(_NUMBERS, numbers, strict=False)),
        **options,
        lanes=lanes,
    )


_NUMBERS = ("nbytes", "window", "overlap", "first_token", "lane_tokens")


class Reader:
    """Bytes from the front; FileDamaged where they end early."""

    def __init__(self, stored: bytes, position: int = 0):
        self.stored, self.position = stored, position

    def take(self, count: int) -> bytes:
        taken = self.stored[self.position : self.position + count]
        if len(taken) < count:
            raise FileDamaged(
                f"compressed text is cut short: {count} bytes wanted at byte "
                f"{self.position} of {len(self.stored)}"
            )
        self.position += count
        return taken

    def varint(self) -> int:
        number = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise FileDamaged(f"a number of more than 63 bits at byte {self.position}")


def varint(number: int) -> bytes:
    """Encode a number in seven bits a byte, the lowest first."""
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def write_escapes(escapes: Sequence[tuple[int, bytes]]) -> bytes:
    """Escape as a varint length and a Zstandard frame."""
    out, before = b"", 0
    for index, escape in escapes:
        out += varint(index - before) + varint(len(escape)) + escape
        before = index
    frame = compress_text(out) if out else b""
    return varint(len(frame)) + frame


def read_escapes(reader: Reader, tokens: int) -> list[tuple[int, bytes]]:
    """Escape of a lane of so many tokens."""
    frame = reader.take(reader.varint())
    inner = Reader(decompress_text(frame, LARGEST) if frame else b"")
    escapes, index = [], 0
    while inner.position < len(inner.stored):
        index += inner.varint()
        escape = inner.take(inner.varint())
        if index > tokens:
            raise FileDamaged(f"an escape at token {index} of {tokens}")
        escapes.append((index, escape))
    return escapes

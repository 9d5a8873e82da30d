"""One file of named, checksummed arrays, which any reader of .safetensors can read.

    8 bytes   length of the header, little-endian
    header    JSON: {"__metadata__": {key: text}, name: {dtype, shape, data_offsets}},
              padded with spaces to a multiple of 8
    data      the arrays one after another, wide dtypes first, so that all are aligned
    about     the last array but one, `__about__`, uint8: a JSON object, deflated (zlib)
    seal      the last array, `__checksums__`, uint8 `[arrays + 2, 16]`: BLAKE2b
              digests of each array's bytes in order of the data, of everything before
              the data, and of the rows above

So every byte of the file is under a digest, and a header is trusted before it is
parsed. The digests detect damage, not forgery. Dtypes the format lacks are stored as
bytes (`U8`, `[bytes]`); who reads them must know better. So are arrays that lossless
coding shrinks: the metadata's `codings` tell which, and how (`coding.array_codecs`).
"""

import builtins
import dataclasses
import hashlib
import json
import math
import os
import threading
import zlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.coding import array_codecs, chunked_stream
from jaxcompress.storage.other_files import check_ours
from jaxcompress.storage.tree_json import FileDamaged, Slot

ABOUT, SEAL = "__about__", "__checksums__"
FORMAT = "jaxcompress"
VERSION = 3
DIGEST = 16  # bytes
CHUNK = 1 << 22  # bytes read at a time where an array need not be held
ADVICE = "; get the file again, or save it again"
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors package too

CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_NAMES = {code: name for name, code in CODES.items()}


@dataclasses.dataclass(frozen=True)
class Span:
    """The span of an array: dtype code of the format, shape, and bytes of the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int
    digest: bytes


def stored_as(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return dtype code and shape under which the format holds an array."""
    if dtype in CODES:
        return CODES[dtype], shape
    return "U8", (math.prod(shape) * jnp.dtype(dtype).itemsize,)


def count_bytes(slot: Slot) -> int:
    """Return bytes of an array in a file."""
    return math.prod(slot.shape) * jnp.dtype(slot.dtype).itemsize


class TensorFile:
    """A file of arrays open for reading; every byte read is checked.

    Attributes: `path`, `size` (bytes), `about` (the JSON object), `spans` (`Span` by
    name, in order of the data), `codings` (by name, of arrays that are coded), `seal`
    (the digest that seals the file), `own_bytes` (of description and checksums).

    Raises:
      FileDamaged: any byte of the header or the checksums is not what was written.
      ValueError: another program's file, or one of a newer format.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._lock = threading.Lock()
        self._file = builtins.open(self.path, "rb", buffering=0)  # noqa: SIM115
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            metadata, self.spans, self.seal = self._read_header()
            self.codings = self._read_codings(metadata)
            self.about = self._read_about()
        except BaseException:
            self._file.close()
            raise

    def holds(self, name: str, dtype: str, shape: tuple[int, ...]) -> bool:
        """Return whether an array is, or is coded as, what its header says."""
        span = self.spans[name]
        if name in self.codings:
            return span.code == "U8" and len(span.shape) == 1
        return stored_as(dtype, shape) == (span.code, span.shape)

    def read(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        *,
        threads: int | None = None,
    ) -> np.ndarray:
        """Read an array, checked, into its own memory; in at most `threads` threads."""
        self._check_kind(name, dtype, shape)
        span = self.spans[name]
        data = np.empty(span.stop - span.start, np.uint8)
        self._fill(span.start, data.data)
        if digest(data) != span.digest:
            raise self._damaged(f"the bytes of {name} are not those written")
        if name not in self.codings:
            return data.view(jnp.dtype(dtype)).reshape(shape)
        view = data.data
        stream = self._stream(name, lambda i, j: bytes(view[i:j]), dtype, shape)
        return self._decoded(name, stream, dtype, threads=threads).reshape(shape)

    def read_rows(
        self, name: str, dtype: str, shape: tuple[int, ...], first: int, last: int
    ) -> np.ndarray:
        """Read rows `first` to before `last` of an array's first axis, checked.

        Of a coded array, only the chunks that hold them are read.
        """
        if name not in self.codings:
            return self.read(name, dtype, shape)[first:last]
        self._check_kind(name, dtype, shape)
        start = self.spans[name].start

        def read(i: int, j: int) -> bytes:
            return self._bytes(start + i, start + j)

        row = math.prod(shape[1:])
        stream = self._stream(name, read, dtype, shape)
        part = self._decoded(name, stream, dtype, first * row, last * row, check=True)
        return part.reshape(last - first, *shape[1:])

    def _check_kind(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        if not self.holds(name, dtype, shape):
            span = self.spans[name]
            raise self._damaged(
                f"{name} is {span.code} {span.shape}, not {dtype} {shape}"
            )

    def _stream(
        self, name: str, read: Any, dtype: str, shape: tuple[int, ...]
    ) -> chunked_stream.Stream:
        span = self.spans[name]
        try:
            return array_codecs.open_stream(
                read, span.stop - span.start, self.codings[name], dtype, shape
            )
        except ValueError as error:
            raise self._damaged(f"{name}: {error}") from error

    def _decoded(
        self,
        name: str,
        stream: chunked_stream.Stream,
        dtype: str,
        *part: int,
        **options: Any,
    ) -> np.ndarray:
        try:
            return array_codecs.decode(stream, dtype, *part, **options)
        except FileDamaged:
            raise
        except ValueError as error:
            raise self._damaged(f"{name}: {error}") from error

    def check(self, name: str) -> None:
        """Check an array without holding it."""
        span, state = self.spans[name], hashlib.blake2b(digest_size=DIGEST)
        buffer = memoryview(bytearray(min(CHUNK, span.stop - span.start)))
        for start in range(span.start, span.stop, CHUNK):
            part = buffer[: min(CHUNK, span.stop - start)]
            self._fill(start, part)
            state.update(part)
        if state.digest() != span.digest:
            raise self._damaged(f"the bytes of {name} are not those written")

    def close(self) -> None:
        self._file.close()

    def _fill(self, start: int, buffer: memoryview) -> None:
        with self._lock:  # arrays and chunks are decoded in threads
            self._file.seek(start)
            while len(buffer):
                count = self._file.readinto(buffer)
                if not count:
                    raise self._damaged(f"it ends at byte {self._file.tell()}")
                buffer = buffer[count:]

    def _bytes(self, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self._fill(start, memoryview(buffer))
        return bytes(buffer)

    def _read_header(self) -> tuple[dict[str, str], dict[str, Span], bytes]:
        if self.size < 8:
            raise self._damaged(f"it has {self.size} bytes")
        first = self._bytes(0, min(9, self.size))
        check_ours(self.path, first)
        length = int.from_bytes(first[:8], "little")
        if length > min(self.size - 8, LONGEST_HEADER):
            raise self._damaged(
                f"its header claims {length} bytes of {self.size}; either it is no "
                ".safetensors file, or damaged"
            )
        head = self._bytes(0, 8 + length)
        tail = self._bytes(max(8 + length, self.size - 2 * DIGEST), self.size)
        if tail[:DIGEST] != digest(head):
            raise self._explain(head[8:])
        entries = _json_object(head[8:])
        if entries is None:
            raise self._damaged("its header is not JSON")
        metadata = entries.pop("__metadata__", None)
        if type(metadata) is not dict or metadata.get("format") != FORMAT:
            raise self._foreign()
        self._check_version(metadata)
        if not all(type(text) is str for text in metadata.values()):
            raise self._damaged("its metadata are not text")
        spans = self._spans(entries, 8 + length)
        return metadata, spans, tail[DIGEST:]

    def _read_about(self) -> dict[str, Any]:
        if ABOUT not in self.spans:
            raise self._damaged(f"it lacks {ABOUT}")
        span = self.spans[ABOUT]
        data = self.read(ABOUT, "uint8", (span.stop - span.start,))
        self.own_bytes = span.stop - span.start, DIGEST * (len(self.spans) + 2)
        del self.spans[ABOUT]
        try:
            inflater = zlib.decompressobj()
            text = inflater.decompress(data.tobytes(), LONGEST_HEADER)
            if not inflater.eof:
                raise ValueError("it ends early, or is too long")
            about = json.loads(text)
            if type(about) is not dict:
                raise ValueError("it is no object")
        except (zlib.error, ValueError, RecursionError) as error:
            raise self._damaged(f"its {ABOUT} is unreadable ({error})") from error
        return about

    def _read_codings(self, metadata: dict[str, str]) -> dict[str, str]:
        """Group codings by name, from lists of positions in the data by coding."""
        names = list(self.spans)
        try:
            by_coding = json.loads(metadata.get("codings", "{}"))
            pairs = [(row, how) for how, rows in by_coding.items() for row in rows]
            if any(type(row) is not int or row < 0 for row, _ in pairs):
                raise ValueError("a position that is none")
            return {names[row]: how for row, how in pairs}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged(
                f"invalid `codings` entry in the header ({error})"
            ) from error
        except RecursionError as error:
            raise self._damaged("its codings are nested") from error

    def _spans(self, entries: dict[str, Any], start: int) -> dict[str, Span]:
        """Yield the arrays in order, without the seal; each begins where the last
        ended.
        """
        for name, entry in entries.items():
            if not _is_entry(entry):
                raise self._damaged(f"the header says of {name}: {str(entry)[:80]}")
        order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        order.sort(key=lambda name: name == SEAL)
        rows = len(order) + 1
        seal = entries.get(SEAL, {"shape": None, "dtype": None})
        if seal["shape"] != [rows, DIGEST] or seal["dtype"] != "U8":
            raise self._damaged(f"its checksums are {seal}, for {rows - 2} arrays")
        digests = self._bytes(max(0, self.size - rows * DIGEST), self.size)
        if digest(digests[:-DIGEST]) != digests[-DIGEST:]:
            raise self._damaged("its checksums are not those written")
        spans, end = {}, 0
        for row, name in enumerate(order):
            entry = entries[name]
            first, last = entry["data_offsets"]
            width = jnp.dtype(_NAMES[entry["dtype"]]).itemsize
            if first != end or last - first != width * math.prod(entry["shape"]):
                raise self._damaged(
                    f"{name}, {entry['dtype']} {entry['shape']}, can't be at bytes "
                    f"{first} to {last} after {end}"
                )
            spans[name] = Span(
                entry["dtype"],
                tuple(entry["shape"]),
                start + first,
                start + last,
                digests[row * DIGEST : (row + 1) * DIGEST],
            )
            end = last
        if start + end != self.size:
            raise self._damaged(
                f"it has {self.size} bytes, its header says {start + end}"
            )
        del spans[SEAL]
        return spans

    def _explain(self, header: bytes) -> ValueError:
        """Explain why a header that is not under the seal is wrong."""
        entries = _json_object(header) or {}
        metadata = entries.get("__metadata__")
        ours = type(metadata) is dict and metadata.get("format") == FORMAT
        if not ours and FORMAT.encode() not in header:
            return self._foreign()
        if ours:
            self._check_version(metadata)
        seal = entries.get(SEAL)
        if _is_entry(seal):
            wanted = 8 + len(header) + seal["data_offsets"][1]
            if wanted != self.size:
                return self._damaged(f"it has {self.size} bytes of {wanted}")
        return self._damaged("its header or checksums are not those written")

    def _check_version(self, metadata: dict[str, Any]) -> None:
        version = metadata.get("format_version")
        if type(version) is str and version.isdecimal() and len(version) < 9:
            if int(version) != VERSION:
                newer = int(version) > VERSION
                raise ValueError(
                    f"{self.path}: written in format {version}, this jaxcompress reads "
                    f"{VERSION}; {'update it' if newer else 'save it again'} (or get "
                    "the file again, if damaged)"
                )
            return
        raise self._damaged(f"its format version is {version!r}")

    def _foreign(self) -> ValueError:
        advice = "jaxcompress.models.load reads checkpoints of other programs"
        if os.path.exists(os.path.join(os.path.dirname(self.path), "config.json")):
            advice += f": pass the directory {os.path.dirname(self.path)!r}"
        return ValueError(
            f"{self.path}: not written by jaxcompress.save (or damaged); {advice}"
        )

    def _damaged(self, why: str) -> FileDamaged:
        return damaged(self.path, why)


def damaged(path: str, why: str) -> FileDamaged:
    return FileDamaged(f"{path}: damaged: {why}{ADVICE}")


def digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def to_json(value: Any) -> str:
    """Return the one way JSON is written here; ValueError for NaN and infinities."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def packed_about(about: Mapping[str, Any]) -> np.ndarray:
    """Return the bytes of the `__about__` array."""
    return np.frombuffer(zlib.compress(to_json(about).encode(), 9), np.uint8)


def _json_object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if type(value) is dict else None


def _is_entry(entry: Any) -> bool:
    match entry:
        case {
            "dtype": str(code),
            "shape": list(shape),
            "data_offsets": [int(first), int(last)],
        } if len(entry) == 3:
            sizes = all(type(size) is int and size >= 0 for size in shape)
            return sizes and code in _NAMES and 0 <= first <= last
    return False

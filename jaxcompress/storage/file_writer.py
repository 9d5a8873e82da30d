"""Writes files of arrays: coded where that pays, whole or not at all."""

import builtins
import functools
import hashlib
import io
import itertools
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.coding import array_codecs
from jaxcompress.coding.threads import in_groups, of_arrays
from jaxcompress.progress import each_item
from jaxcompress.storage.checksummed_file import (
    ABOUT,
    CODES,
    DIGEST,
    FORMAT,
    LONGEST_HEADER,
    SEAL,
    VERSION,
    count_bytes,
    digest,
    packed_about,
    stored_as,
    to_json,
)
from jaxcompress.storage.tree_json import Slot
from jaxcompress.types import Progress


def write(
    file: BinaryIO,
    slots: Mapping[str, Slot],
    about: Mapping[str, Any],
    *,
    coding: str = "size",
    progress: Progress = False,
) -> bytes:
    """Write arrays; return the digest that seals the file.

    One array is in memory at a time, coded chunk by chunk in threads; or, of arrays
    that a chunk or two hold, some more than there are threads, each coded by one, and
    64 MiB together at most. All are fetched in this thread, in the order of the file.

    Same arrays and metadata, same bytes. The header is written last, into room left
    for it, as what coding leaves of an array is not known before.

    Args:
      file: empty, and open for seeking.
      about: what describes the arrays, JSON.
      coding: as `save` says.
      progress: as in `compress`, of the list of arrays.
    """
    metadata = {"format": FORMAT, "format_version": str(VERSION)}
    order = sorted(slots, key=lambda name: (-_width(slots[name]), name))
    for name in order:
        if name in (ABOUT, SEAL, "__metadata__"):
            raise ValueError(
                f"an array can't be called {name}: the file needs the name"
            )
    text = packed_about(about)
    slots = {**slots, ABOUT: Slot("uint8", text.shape, lambda: text)}
    order.append(ABOUT)
    raw = {name: count_bytes(slots[name]) for name in order}
    codable = [
        name for name in order if coding != "none" and raw[name] >= array_codecs.LEAST
    ]
    # Room for a list of arrays under each coding there is.
    longest = {name: "-" * 20 * array_codecs.CODINGS for name in codable}
    widest = max(CODES.values(), key=len)
    most = {name: (widest, (*slots[name].shape, raw[name])) for name in order}
    room = len(_header(order, slots, raw, most, longest, metadata))
    file.write(bytes(room))
    rows, sizes, codings = [], {}, {}

    def note(name: str, how: str | None, size: int, row: bytes) -> None:
        sizes[name] = size
        if how is not None:
            codings[name] = how
        rows.append(row)

    work = functools.partial(_write_aside, coding=coding)
    shown = each_item(order[:-1], progress, label="writing", unit="arrays")
    names = itertools.chain(shown, order[-1:])
    for small, group in in_groups(names, raw):
        fetched = ((name, _array_of(name, slots[name])) for name in group)
        if small:
            for name, data, *about in of_arrays(work, fetched, lambda x: x[1].nbytes):
                file.write(data)
                note(name, *about)
                del data
            continue
        name, array = next(fetched)
        note(name, *_write_array(file, array, coding))
        del array  # before the next is fetched
    short = {name: ("U8", (sizes[name],)) for name in codings}
    head = _header(order, slots, sizes, short, codings, metadata)
    head = (room - 8).to_bytes(8, "little") + head[8:].ljust(room - 8)
    rows.append(digest(head))
    rows.append(digest(b"".join(rows)))
    file.write(b"".join(rows))
    file.seek(0)
    file.write(head)
    file.seek(0, os.SEEK_END)
    return rows[-1]


def _write_aside(
    item: tuple[str, np.ndarray], *, coding: str
) -> tuple[str, bytes, str | None, int, bytes]:
    """Name and bytes of an array, and what `_write_array` says of it."""
    name, array = item
    buffer = io.BytesIO()
    about = _write_array(buffer, array, coding, threads=1)
    return name, buffer.getvalue(), *about


def _write_array(
    file: BinaryIO, array: np.ndarray, coding: str, *, threads: int | None = None
) -> tuple[str | None, int, bytes]:
    """Write one array, coded if that makes it smaller; return how, bytes and digest."""
    how = None
    if coding != "none":
        how = array_codecs.choose(array, fast=coding == "decode")
    if how is not None:
        start, size, state = file.tell(), 0, hashlib.blake2b(digest_size=DIGEST)
        try:
            for part in array_codecs.encode(array, how, threads=threads):
                file.write(part)
                state.update(part)
                size += len(part)
        except ValueError:  # the sample misled
            size = array.nbytes
        if size < array.nbytes:
            return how, size, state.digest()
        file.seek(start)
        file.truncate()
    data = memoryview(array.reshape(-1).view(np.uint8))
    file.write(data)
    return None, array.nbytes, digest(data)


def _header(
    order: list[str],
    slots: Mapping[str, Slot],
    sizes: Mapping[str, int],
    instead: Mapping[str, tuple[str, tuple[int, ...]]],
    codings: Mapping[str, str],
    metadata: Mapping[str, str],
) -> bytes:
    """Return header for arrays of these sizes, some under another dtype and shape."""
    if codings:
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(order):
            if name in codings:
                rows.setdefault(codings[name], []).append(row)
        metadata = {**metadata, "codings": to_json(rows)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in order:
        slot = slots[name]
        code, shape = instead.get(name) or stored_as(slot.dtype, slot.shape)
        stop = start + sizes[name]
        entries[name] = _entry(code, shape, start, stop)
        start = stop
    rows = len(order) + 2
    entries[SEAL] = _entry("U8", (rows, DIGEST), start, start + rows * DIGEST)
    text = to_json(entries).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise ValueError(
            f"the header takes {len(text)} bytes, readers accept {LONGEST_HEADER}; "
            "save fewer leaves per file or less metadata"
        )
    return len(text).to_bytes(8, "little") + text


def _entry(code: str, shape: tuple[int, ...], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}


def _width(slot: Slot) -> int:
    return jnp.dtype(slot.dtype).itemsize if slot.dtype in CODES else 1


def _array_of(name: str, slot: Slot) -> np.ndarray:
    """Return the array, little-endian and in order."""
    x = slot.fetch()
    if isinstance(x, jax.Array):
        if not x.is_fully_addressable:
            raise ValueError(
                f"{name} is spread over several hosts; save it with save_orbax"
            )
        x = x.copy()  # NumPy's view of a jax.Array lives as long as the array
    x = np.asarray(x, order="C")
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    if x.dtype.name != slot.dtype or x.shape != slot.shape:
        raise ValueError(
            f"{name} was {slot.dtype} {slot.shape} and is {x.dtype} {x.shape} now; "
            "stored() must give the same arrays at every call"
        )
    return x


@contextmanager
def beside(path: str) -> Iterator[BinaryIO]:
    """Return a file that takes the place of `path` once it is whole and on the disk.

    Written under another name in the same directory; an error removes it and leaves
    what was at `path` as it was.
    """
    temporary = temporary_beside(path)
    try:
        with builtins.open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    sync_directory(path)


def temporary_beside(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")


def sync_directory(path: str) -> None:
    """Put a rename on the disk, where a directory can be synchronized."""
    if os.name != "posix":
        return
    handle = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

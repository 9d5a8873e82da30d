"""Tensors in `.safetensors` files, and a base directory that has them too."""

import builtins
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress.coding import array_codecs, delta_codec
from jaxcompress.storage.checksummed_file import CODES, LONGEST_HEADER

_NAMES = {code: name for name, code in CODES.items()}
GLANCE = 1 << 20  # numbers of a part that are looked at


class Tensor(NamedTuple):
    """A tensor in a file: dtype, first byte, and the byte after the last."""

    name: str
    dtype: str
    start: int
    stop: int


def tensors(path: Path, size: int) -> list[Tensor]:
    """Return the tensors in a .safetensors file, in order.

    None in other files, and in what does not look as the format says it does.
    """
    if path.suffix != ".safetensors" or size < 8:
        return []
    with builtins.open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            return []
        text = file.read(length)
    try:
        entries = json.loads(text)
        listed = []
        for name, entry in entries.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                dtype = _NAMES.get(entry["dtype"], "uint8")
                start = 8 + length
                listed.append(Tensor(name, dtype, start + first, start + last))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    at = 8 + length
    listed.sort(key=lambda one: (one.start, one.stop))
    for one in listed:
        if (
            not at <= one.start <= one.stop <= size
            or (one.stop - one.start) % jnp.dtype(one.dtype).itemsize
        ):
            return []
        at = one.stop
    return listed


def read_numbers(path: Path, dtype: str, count: int, start: int) -> np.ndarray:
    """Return numbers of a file from a byte on."""
    kind = jnp.dtype(dtype)
    raw = np.fromfile(path, np.uint8, count * kind.itemsize, offset=start)
    return raw.view(kind)


def describe(root: Path, name: str) -> dict[str, Any]:
    """Return path, bytes and BLAKE2b digest of a file of a directory."""
    state, size = hashlib.blake2b(digest_size=16), 0
    with builtins.open(root / name, "rb") as file:
        while data := file.read(1 << 20):
            state.update(data)
            size += len(data)
    return {"path": name, "bytes": size, "digest": state.hexdigest()}


class Base:
    """A directory whose tensors others of the same names differ little from.

    Raises:
      FileNotFoundError: no such directory, or no tensors in its .safetensors files.
    """

    def __init__(self, folder: str | os.PathLike):
        self.root = Path(folder)
        self._found: dict[str, tuple[str, Tensor]] = {}
        for path in sorted(self.root.rglob("*.safetensors")):
            name = path.relative_to(self.root).as_posix()
            for one in tensors(path, path.stat().st_size):
                self._found.setdefault(one.name, (name, one))
        if not self._found:
            raise FileNotFoundError(
                f"{self.root} has no .safetensors file with tensors in it; the base of "
                "an archive is a directory that has"
            )

    def place(self, one: Tensor) -> tuple[str, int] | None:
        """Return file and first byte of the tensor of this name, dtype and size, if
        any.
        """
        name, other = self._found.get(one.name, ("", one))
        same = other.dtype == one.dtype and (
            other.stop - other.start == one.stop - one.start
        )
        return (name, other.start) if name and same else None

    def gains(self, path: Path, one: Tensor, name: str, start: int) -> bool:
        """Return whether the difference from the base takes fewer bytes, on a
        sample.
        """
        width = jnp.dtype(one.dtype).itemsize
        count = min(GLANCE, (one.stop - one.start) // width)
        sample = read_numbers(path, one.dtype, count, one.start)
        base_sample = read_numbers(self.root / name, one.dtype, count, start)
        parts = delta_codec.difference(sample, base_sample)
        return sum(map(array_codecs.estimate, parts)) < array_codecs.estimate(sample)


def check(root: Path, wanted: Iterable[Mapping[str, Any]]) -> None:
    """Check that files of a directory are those of this path, size and digest.

    Raises:
      ValueError: one is missing or another; names it.
    """
    for about in wanted:
        path = root / about["path"]
        if not path.is_file():
            raise ValueError(
                f"{root} has no {about['path']}, which the archive was packed against; "
                "give the directory that was the base then"
            )
        description = describe(root, about["path"])
        if description != about:
            raise ValueError(
                f"{path} ({description['bytes']} bytes, digest "
                f"{description['digest']}) is not the file that the archive was "
                f"packed against ({about['bytes']} bytes, digest {about['digest']}); "
                "give that one"
            )

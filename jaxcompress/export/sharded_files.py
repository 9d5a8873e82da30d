"""Directories of `.safetensors` shards, written one shard at a time.

Source: the safetensors format (8 bytes of header length, a JSON header, the data) and
the index file of Hugging Face's transformers.
"""

import contextlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Return a temporary sibling that becomes `directory` when the block ends without
    error.

    Raises:
      FileExistsError: `directory` exists and is not an empty directory.
      FileNotFoundError: its parent does not exist.
    """
    directory = Path(directory).absolute()
    refuse_existing(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if directory.is_dir():
            directory.rmdir()
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Return a temporary sibling that becomes the file `path` when the block ends.

    Raises as `new_directory`.
    """
    path = Path(path).absolute()
    refuse_existing(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory; pass the name of a file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Raise FileExistsError where something would be overwritten."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists; remove it, or export to a path that does not exist"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no directory {path.parent} to write to; make it")


class Shards:
    """Writes tensors to `model-0000i-of-0000n.safetensors` and their index.

    At most `shard_bytes` of tensors (one tensor, if that is larger) are held in memory.
    Call `finish` after the last tensor.
    """

    def __init__(self, directory: Path, shard_bytes: int):
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, not {shard_bytes}")
        self._directory = directory
        self._limit = shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.nbytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        if self._pending and self._pending_bytes + array.nbytes > self._limit:
            self._flush()
        self._pending[name] = array
        self._pending_bytes += array.nbytes
        self.nbytes += array.nbytes

    def finish(self) -> None:
        """Write the rest, give the shards their names, and write the index."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            file = "model.safetensors" if count == 1 else file
            self._path(i).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            write_json(
                self._directory / "model.safetensors.index.json",
                {
                    "metadata": {"total_size": self.nbytes},
                    "weight_map": dict(sorted(weight_map.items())),
                },
            )

    def _path(self, i: int) -> Path:
        return self._directory / f"shard-{i}.partial"

    def _flush(self) -> None:
        write_tensors(self._path(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one `.safetensors` file, tensors of wide dtypes first to align them."""
    ordered = sorted(
        tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in ordered:
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            file.write(np.ascontiguousarray(array).tobytes())


def write_json(path: Path, contents: Any) -> None:
    text = json.dumps(contents, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")

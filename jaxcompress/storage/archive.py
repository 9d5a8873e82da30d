"""A directory in one file of ours, weights coded without loss, and back byte for byte.

The archive is what `save` writes, of the tree `{"files": [[part, ...], ...]}`: every
file in parts, a header, then pieces of its tensors, of at most 64 MiB each. The
metadata's `archive` lists path, bytes and BLAKE2b digest of each file. Tensors are
found in `.safetensors` files; others (tokenizers, settings, pickles) are bytes. What
unpacking gives is compared with the digests, which detect damage, not forgery.
"""

import builtins
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.storage import container
from jaxcompress.storage.manifest import FileDamaged, Slot
from jaxcompress.storage.tensors import CODES, LONGEST_HEADER, damaged
from jaxcompress.storage.writing import beside, write

PART = 1 << 26  # bytes of a file in memory at a time
_NAMES = {code: name for name, code in CODES.items()}

Progress = Callable[[list[Any]], Iterable[Any]]


def pack(
    folder: str | os.PathLike,
    path: str | os.PathLike,
    *,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Packs a directory, such as a Hugging Face checkpoint, into one file.

    `unpack` gives the same bytes under the same names; permissions and times are not
    kept, links are followed, empty directories are left out. One part of a file is in
    memory at a time. The archive is written beside `path` and renamed.

    Args:
      folder: the directory.
      path: of the archive, outside of it.
      progress: wraps the list of parts that is worked through, as a progress bar does.

    Returns: numbers of `files` and `parts`, `bytes` before and `packed`.

    Raises:
      FileNotFoundError: no such directory, or no files in it.
      ValueError: the archive would lie in the directory, or something in it is
        neither file nor directory.
    """
    root, path = Path(folder), os.path.realpath(path)
    if not root.is_dir():
        raise FileNotFoundError(f"no directory {root}; pack takes a directory")
    if Path(path).is_relative_to(root.resolve()):
        raise ValueError(
            f"{path} would lie in {root}, which is packed; write elsewhere"
        )
    files = [_described(root, name) for name in _names(root)]
    if not files:
        raise FileNotFoundError(f"{root} holds no files")
    slots, lists = {}, []
    for number, about in enumerate(files):
        nodes = []
        for dtype, count, start in _parts(root / about["path"], about["bytes"]):
            name = f"files/{number}/{len(nodes)}"
            source = root / about["path"]
            slots[name] = Slot(dtype, (count,), _reader(source, dtype, count, start))
            nodes.append({"array": dtype, "shape": [count]})
        lists.append({"list": nodes})
    about = container.describe(
        {"dict": [["files", {"list": lists}]]}, {"archive": files}
    )
    with beside(path) as file:
        write(file, slots, about, progress=progress)
    return {
        "files": len(files),
        "parts": len(slots),
        "bytes": sum(about["bytes"] for about in files),
        "packed": os.path.getsize(path),
    }


def unpack(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes the files of an archive into a new directory; every byte is checked.

    The directory appears when it is complete; an error leaves nothing.

    Returns: numbers of `files` and `bytes`.

    Raises:
      FileExistsError: the directory exists.
      FileDamaged: the archive is not what was written.
      ValueError: the file is no archive.
    """
    target = Path(folder).absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists; name a directory that does not")
    with container.open(path) as stored:
        files = _listed(stored)
        scratch = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
        work = list(enumerate(files))
        try:
            for number, about in work if progress is None else progress(work):
                _write_file(stored, number, about, scratch / about["path"])
            os.rename(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return {"files": len(files), "bytes": sum(about["bytes"] for about in files)}


def _names(root: Path) -> list[str]:
    """Paths of all files, sorted."""
    found = []
    for directory, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for name in names:
            path = Path(directory, name)
            if not path.is_file():
                raise ValueError(
                    f"{path} is neither a file nor a directory; remove it, or pack "
                    "without it"
                )
            found.append(path.relative_to(root).as_posix())
    return sorted(found)


def _described(root: Path, name: str) -> dict[str, Any]:
    state, size = hashlib.blake2b(digest_size=16), 0
    with builtins.open(root / name, "rb") as file:
        while data := file.read(1 << 20):
            state.update(data)
            size += len(data)
    return {"path": name, "bytes": size, "digest": state.hexdigest()}


def _parts(path: Path, size: int) -> Iterator[tuple[str, int, int]]:
    """Dtype, numbers and first byte of the parts of a file, one behind another."""
    at = 0
    for dtype, start, stop in [*_tensors(path, size), ("uint8", size, size)]:
        width = jnp.dtype(dtype).itemsize
        for kind, first, last in (("uint8", at, start), (dtype, start, stop)):
            step = PART // (width if kind == dtype else 1)
            wide = jnp.dtype(kind).itemsize
            for begin in range(first, last, step * wide):
                yield kind, min(step, (last - begin) // wide), begin
        at = stop


def _tensors(path: Path, size: int) -> list[tuple[str, int, int]]:
    """Dtype, first and last byte of the tensors in a .safetensors file, in order.

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
        found = []
        for name, entry in entries.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                dtype = _NAMES.get(entry["dtype"], "uint8")
                found.append((8 + length + first, 8 + length + last, dtype))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    at = 8 + length
    for start, stop, dtype in sorted(found):
        if (
            not at <= start <= stop <= size
            or (stop - start) % jnp.dtype(dtype).itemsize
        ):
            return []
        at = stop
    return [(dtype, start, stop) for start, stop, dtype in sorted(found)]


def _reader(path: Path, dtype: str, count: int, start: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        raw = np.fromfile(
            path, np.uint8, count * jnp.dtype(dtype).itemsize, offset=start
        )
        return raw.view(jnp.dtype(dtype))

    return read


def _listed(stored: container.StoredParams) -> list[dict[str, Any]]:
    """The files of an archive, checked against its tree."""
    files = stored.metadata.get("archive")
    if files is None:
        raise ValueError(f"{stored.path} is no archive; load reads parameters")
    lists = stored.tree.get("files") if isinstance(stored.tree, dict) else None
    try:
        seen = set()
        for about in files:
            path = PurePosixPath(about["path"])
            odd = path.is_absolute() or ".." in path.parts or "\\" in about["path"]
            if odd or not path.parts or ":" in about["path"] or path in seen:
                raise ValueError(f"it names a file {about['path']!r}")
            seen.add(path)
        if len(lists) != len(files):
            raise ValueError(f"{len(files)} files, parts of {len(lists)}")
        for about, names in zip(files, lists, strict=True):
            sizes = (stored.describe(name)[1:] for name in names)
            total = sum(math.prod(s) * jnp.dtype(d).itemsize for s, d in sizes)
            if total != about["bytes"] or type(about["digest"]) is not str:
                raise ValueError(f"{about['path']}: parts of {total} bytes")
    except FileDamaged:
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise damaged(stored.path, f"its list of files is odd ({error})") from error
    return files


def _write_file(
    stored: container.StoredParams, number: int, about: dict[str, Any], path: Path
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = hashlib.blake2b(digest_size=16)
    with builtins.open(path, "xb") as file:
        for name in stored.tree["files"][number]:
            data = stored.read(name, numpy=True).reshape(-1).view(np.uint8)
            file.write(data)
            state.update(data)
    if state.hexdigest() != about["digest"]:
        raise damaged(stored.path, f"{about['path']} is not what was packed")

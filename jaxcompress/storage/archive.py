"""A directory in one file of ours, weights coded without loss, and back byte for byte.

The archive is what `save` writes, of the tree `{"files": [[part, ...], ...]}`: every
file in parts, a header, then pieces of its tensors, of at most 64 MiB each. The
metadata's `archive` lists path, bytes and BLAKE2b digest of each file. Tensors are
found in `.safetensors` files; others (tokenizers, settings, pickles) are bytes. What
unpacking gives is compared with the digests, which detect damage, not forgery.

Packed against a base, a part of a tensor that the base has too may be a list instead,
of the bytes of its difference (`entropy.deltas`): the file's `from` lists such parts
with the base's file and first byte, the metadata's `base` the files needed.
"""

import builtins
import functools
import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.coding import delta_codec
from jaxcompress.progress import each_item
from jaxcompress.storage import checkpoint, delta_base
from jaxcompress.storage.checksummed_file import CODES, damaged
from jaxcompress.storage.file_writer import beside, write
from jaxcompress.storage.tree_json import FileDamaged, Slot
from jaxcompress.types import Progress

PART = 1 << 26  # bytes of a file in memory at a time


def pack(
    folder: str | os.PathLike,
    path: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    coding: str = "size",
    progress: Progress = False,
) -> dict[str, int]:
    """Pack a directory, such as a Hugging Face checkpoint, into one file.

    `unpack` gives the same bytes under the same names; permissions and times are not
    kept, links are followed, empty directories are left out. One part of a file is in
    memory at a time, or small ones of 64 MiB together. The archive is written to
    `.name.*.tmp` in the folder of `path` (a killed process leaves it), then renamed.

    Args:
      folder: the directory.
      path: of the archive, outside of it.
      base: a directory with an earlier checkpoint of this model, or a later one:
        tensors of the same name, dtype and size are kept as differences where these
        are smaller. `unpack` needs it again.
      coding: as for `save`; "decode" for a coding that is unpacked sooner.
      progress: wraps the list of parts that is worked through, as a progress bar does.

    Returns: numbers of `files` and `parts`, parts among them that are `differences`,
      `bytes` before and `packed`.

    Raises:
      FileNotFoundError: no such directory, or no files in it; a base without tensors.
      ValueError: the archive would be in the directory, something in it is neither
        file nor directory, or nothing in it is closer to the base than to nothing.
      OSError: of the system, such as a full disk; an old archive stays as it was.

    Example:
      >>> os.mkdir("model")
      >>> jc.save("model/a.safetensors", {"kernel": x})
      >>> numbers = jc.storage.pack("model", "model.archive")
    """
    root, path = Path(folder), os.path.realpath(path)
    if not root.is_dir():
        raise FileNotFoundError(f"no directory {root}; pack takes a directory")
    if Path(path).is_relative_to(root.resolve()):
        raise ValueError(f"{path} would be in {root}, which is packed; write elsewhere")
    files = [delta_base.describe(root, name) for name in _names(root)]
    if not files:
        raise FileNotFoundError(f"{root} holds no files")
    other = None if base is None else delta_base.Base(base)
    slots, lists, used, latest = {}, [], set(), {}
    for number, about in enumerate(files):
        nodes = []
        for dtype, count, start, place in _parts(root, about, other):
            name = f"files/{number}/{len(nodes)}"
            read = _reader(root / about["path"], dtype, count, start)
            if place is None:
                slots[name] = Slot(dtype, (count,), read)
                nodes.append({"array": dtype, "shape": [count]})
                continue
            used.add(place[0])
            about.setdefault("from", []).append([len(nodes), dtype, *place])
            read_base = _reader(other.root / place[0], dtype, count, place[1])
            rows = _differences(
                name, read, read_base, jnp.dtype(dtype).itemsize, latest
            )
            for i, row in enumerate(rows):
                slots[f"{name}/{i}"] = Slot("uint8", (count,), row)
            nodes.append({"list": [{"array": "uint8", "shape": [count]}] * len(rows)})
        lists.append({"list": nodes})
    metadata: dict[str, Any] = {"archive": files}
    if other is not None:
        if not used:
            raise ValueError(
                f"no tensor of {root} is closer to one of the same name, dtype and "
                f"size in {base} than to none; pack without a base"
            )
        metadata["base"] = [
            delta_base.describe(other.root, name) for name in sorted(used)
        ]
    about = checkpoint.describe({"dict": [["files", {"list": lists}]]}, metadata)
    with _naming(path), beside(path) as file:
        write(file, slots, about, coding=coding, progress=progress)
    return {
        "files": len(files),
        "parts": len(slots),
        "differences": sum(len(about.get("from", ())) for about in files),
        "bytes": sum(about["bytes"] for about in files),
        "packed": os.path.getsize(path),
    }


def unpack(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    progress: Progress = False,
) -> dict[str, int]:
    """Write the files of an archive into a new directory; every byte is checked.

    The directory appears when it is complete. An error leaves nothing; a killed process
    leaves `.name.*.tmp` next to it.

    Args:
      path: of the archive.
      folder: to make.
      base: the directory that the archive was packed against, if any.
      progress: as for `pack`, of the list of files.

    Returns: numbers of `files` and `bytes`.

    Raises:
      FileExistsError: the directory exists.
      FileDamaged: the archive is not what was written.
      ValueError: the file is no archive; a base is missing, or is not the one that
        the archive was packed against, which its digests tell; or none was.
      OSError: of the system, such as a full disk.

    Example:
      >>> os.mkdir("model")
      >>> jc.save("model/a.safetensors", {"kernel": x})
      >>> numbers = jc.storage.pack("model", "model.archive")
      >>> numbers = jc.storage.unpack("model.archive", "copy")
    """
    target = Path(folder).absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists; name a directory that does not")
    with checkpoint.open_checkpoint(path) as stored:
        files = _listed(stored)
        other = _base_of(stored, base)
        scratch = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
        work = list(enumerate(files))
        new = [parent for parent in target.parents if not parent.exists()]
        try:
            for number, about in each_item(
                work, progress, label="unpacking", unit="files"
            ):
                with _naming(target / about["path"]):
                    _write_file(stored, other, number, about, scratch / about["path"])
            os.rename(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            for parent in new:
                with suppress(OSError):  # not there, or someone else's files in it
                    parent.rmdir()
            raise
    return {"files": len(files), "bytes": sum(about["bytes"] for about in files)}


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Return errors of writing and reading say of which file; the system's own do
    not.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def _names(root: Path) -> list[str]:
    """Return paths of all files, sorted."""
    paths = []
    for directory, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for name in names:
            path = Path(directory, name)
            if not path.is_file():
                raise ValueError(
                    f"{path} is neither a file nor a directory; remove it, or pack "
                    "without it"
                )
            paths.append(path.relative_to(root).as_posix())
            if not _portable(paths[-1]):
                raise ValueError(
                    f"{os.fsencode(path)!r} has a name that other systems lack; "
                    "rename it, in UTF-8 without : and \\"
                )
    return sorted(paths)


def _portable(name: str) -> bool:
    """Return whether a path is below the directory it is unpacked to, on any system.

    Surrogates represent bytes of a name that are not UTF-8.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return False
    return not any(x in ":\\\0" or "\ud800" <= x <= "\udfff" for x in name)


def _parts(
    root: Path, about: dict[str, Any], base: delta_base.Base | None
) -> Iterator[tuple[str, int, int, tuple[str, int] | None]]:
    """Return dtype, numbers and first byte of the parts of a file, in order.

    And, of parts to be kept as differences, file and first byte in the base.
    """
    path, size, at = root / about["path"], about["bytes"], 0
    end = delta_base.Tensor("", "uint8", size, size)
    for one in [*delta_base.tensors(path, size), end]:
        place = None if base is None else base.place(one)
        if place is not None and not base.gains(path, one, *place):
            place = None
        yield from _pieces("uint8", at, one.start, None)
        yield from _pieces(one.dtype, one.start, one.stop, place)
        at = one.stop


def _pieces(
    dtype: str, first: int, last: int, place: tuple[str, int] | None
) -> Iterator[tuple[str, int, int, tuple[str, int] | None]]:
    width = jnp.dtype(dtype).itemsize
    step = PART // width
    for begin in range(first, last, step * width):
        source = None if place is None else (place[0], place[1] + begin - first)
        yield dtype, min(step, (last - begin) // width), begin, source


def _reader(path: Path, dtype: str, count: int, start: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with _naming(path):
            return delta_base.read_numbers(path, dtype, count, start)

    return read


def _differences(
    name: str,
    read: Callable[[], np.ndarray],
    read_base: Callable[[], np.ndarray],
    rows: int,
    latest: dict[str, np.ndarray],
) -> list[Callable[[], np.ndarray]]:
    """Return readers of the bytes of a difference, made once and kept till the next
    is.
    """

    def row(i: int) -> np.ndarray:
        if name not in latest:
            latest.clear()
            latest[name] = delta_codec.difference(read(), read_base())
        return latest[name][i]

    return [functools.partial(row, i) for i in range(rows)]


def _listed(stored: checkpoint.StoredParams) -> list[dict[str, Any]]:
    """Return the files of an archive, checked against its tree."""
    files = stored.metadata.get("archive")
    if files is None:
        raise ValueError(f"{stored.path} is no archive; load reads parameters")
    lists = stored.tree.get("files") if isinstance(stored.tree, dict) else None
    try:
        seen = set()
        for about in files:
            path = PurePosixPath(_checked(about)["path"])
            if path in seen:
                raise ValueError(f"it names {about['path']!r} twice")
            seen.add(path)
        if not files or len(lists) != len(files):
            raise ValueError(f"{len(files)} files, parts of {len(lists)}")
        wanted = stored.metadata.get("base")
        if wanted is not None and not wanted:
            raise ValueError("a base of no files")
        base = {_checked(one)["path"]: one["bytes"] for one in wanted or ()}
        for about, names in zip(files, lists, strict=True):
            kinds = [_kind(stored, part) for part in names]
            total = sum(math.prod(s) * jnp.dtype(d).itemsize for s, d in kinds)
            if total != about["bytes"]:
                raise ValueError(f"{about['path']}: parts of {total} bytes")
            lists_there = [i for i, part in enumerate(names) if type(part) is list]
            if [one[0] for one in about.get("from", ())] != lists_there:
                raise ValueError(f"{about['path']}: differences {lists_there}")
            for i, dtype, file, start in about.get("from", ()):
                (width, count), _ = kinds[i]
                fits = dtype in CODES and jnp.dtype(dtype).itemsize == width
                fits = fits and type(start) is int
                if not fits or not 0 <= start <= base[file] - width * count:
                    raise ValueError(f"{about['path']}: {dtype} of {file}, {start}")
    except FileDamaged:
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise damaged(stored.path, f"its list of files is odd ({error})") from error
    return files


def _checked(about: Any) -> Any:
    """Return what is said of a file; ValueError where it has another type."""
    match about:
        case {"path": str(path), "bytes": int(), "digest": str()} if _portable(path):
            return about
    raise ValueError(f"of a file it says {str(about)[:80]}")


def _kind(
    stored: checkpoint.StoredParams, part: str | list[str]
) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a part: of a difference, those of all its bytes."""
    if type(part) is str:
        kind, *shape_and_dtype = stored.describe(part)
        if kind != "array":
            raise ValueError(f"a part that is {kind}")
        return tuple(shape_and_dtype)
    kinds = {stored.describe(name) for name in part}
    ((kind, shape, dtype),) = kinds
    if len(shape) != 1 or (kind, dtype) != ("array", "uint8"):
        raise ValueError(f"a difference of {dtype} {shape}")
    return (len(part), *shape), dtype


def _base_of(
    stored: checkpoint.StoredParams, folder: str | os.PathLike | None
) -> Path | None:
    """Return the base's directory, its files checked."""
    wanted = stored.metadata.get("base")
    if wanted is None and folder is not None:
        raise ValueError(f"{stored.path} was packed without a base; unpack it without")
    if wanted is None:
        return None
    if folder is None:
        raise ValueError(
            f"{stored.path} was packed against a base, {wanted[0]['path']} of digest "
            f"{wanted[0]['digest']}; name its directory (--base)"
        )
    delta_base.check(Path(folder), wanted)
    return Path(folder)


def _write_file(
    stored: checkpoint.StoredParams,
    base: Path | None,
    number: int,
    about: dict[str, Any],
    path: Path,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    places = {i: place for i, *place in about.get("from", ())}
    state = hashlib.blake2b(digest_size=16)
    with builtins.open(path, "xb") as file:
        for i, part in enumerate(stored.tree["files"][number]):
            if type(part) is str:
                data = stored.read(part, numpy=True)
            else:
                rows = np.stack([stored.read(name, numpy=True) for name in part])
                dtype, name, start = places[i]
                base_rows = _reader(base / name, dtype, rows.shape[1], start)()
                data = delta_codec.restore(rows, base_rows)
            data = data.reshape(-1).view(np.uint8)
            file.write(data)
            state.update(data)
        file.flush()
        os.fsync(file.fileno())
    if state.hexdigest() != about["digest"]:
        raise damaged(stored.path, f"{about['path']} is not what was packed")

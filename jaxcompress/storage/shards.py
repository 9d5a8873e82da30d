"""Several files under one index, as Hugging Face names them.

`name.safetensors.index.json` is `{"metadata": {...}, "weight_map": {array: file}}`. Its
metadata hold what a single file has in `__about__`, the digest that seals each file, so
that no file of another save is taken for one of this, and one of the index.
"""

import builtins
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcompress.storage.checksummed_file import (
    FORMAT,
    LONGEST_HEADER,
    VERSION,
    TensorFile,
    count_bytes,
    damaged,
    digest,
    to_json,
)
from jaxcompress.storage.file_writer import (
    beside,
    sync_directory,
    temporary_beside,
    write,
)
from jaxcompress.storage.tree_json import Slot

SUFFIX = ".index.json"
_ENDING = ".safetensors"


def split(slots: Mapping[str, Slot], limit: int) -> list[dict[str, Slot]]:
    """Return the arrays, in the tree's order, in parts of at most `limit` bytes."""
    if limit < 1:
        raise ValueError(f"max_shard_bytes={limit}; at least 1 byte is needed")
    parts: list[dict[str, Slot]] = [{}]
    held = 0
    for name, slot in slots.items():
        size = count_bytes(slot)
        if parts[-1] and held + size > limit:
            parts.append({})
            held = 0
        parts[-1][name] = slot
        held += size
    return parts


def save(
    path: str,
    parts: Sequence[Mapping[str, Slot]],
    about: Mapping[str, Any],
    *,
    coding: str = "size",
) -> None:
    """Write every part to a file of its own, then the index.

    No file of an earlier save is touched before the index is in its place.
    """
    folder, stem = os.path.split(path.removesuffix(_ENDING))
    written: list[str] = []
    seals: list[bytes] = []
    placed: list[str] = []
    try:
        for number, part in enumerate(parts, 1):
            written.append(temporary_beside(path))
            with builtins.open(written[-1], "xb") as file:
                own = {"shard": f"{number} of {len(parts)}"}
                seals.append(write(file, part, own, coding=coding))
                file.flush()
                os.fsync(file.fileno())
        names = _names(stem, len(parts))
        if any(os.path.exists(os.path.join(folder, name)) for name in names):
            names = _names(f"{stem}-{digest(b''.join(seals))[:4].hex()}", len(parts))
        old = _old_files(path)
        for source, name in zip(written, names, strict=True):
            os.replace(source, os.path.join(folder, name))
            if name not in old:
                placed.append(os.path.join(folder, name))
        sync_directory(path)
        with beside(path + SUFFIX) as file:
            file.write(_index(parts, names, seals, about))
    except BaseException:
        for name in (*written, *placed):
            if os.path.exists(name):
                os.unlink(name)
        raise
    for name in {*old, os.path.basename(path)} - set(names):
        if os.path.exists(os.path.join(folder, name)):
            os.unlink(os.path.join(folder, name))


def remove(path: str) -> None:
    """Remove the index and the shards of an earlier save to the same path."""
    folder = os.path.dirname(path)
    names = _old_files(path)
    if names:
        os.unlink(path + SUFFIX)
    for name in names:
        if os.path.exists(os.path.join(folder, name)):
            os.unlink(os.path.join(folder, name))


def index_path(path: str) -> str | None:
    """Return the index that a path means; None where it is a file of its own."""
    if path.endswith(SUFFIX):
        return path
    indexed = not os.path.exists(path) and os.path.exists(path + SUFFIX)
    return path + SUFFIX if indexed else None


class Index:
    """An index of shards, checked.

    Attributes: `about` (a JSON object), `files` (file by array), `size` (bytes).

    Raises:
      FileDamaged: it is not what was written.
      ValueError: another program's index.
    """

    def __init__(self, path: str):
        self.path = path
        self.size = os.path.getsize(path)
        if self.size > LONGEST_HEADER:
            raise damaged(path, f"it has {self.size} bytes")
        with builtins.open(path, "rb") as file:
            raw = file.read()
        try:
            index = json.loads(raw)
            head = index["metadata"]
            if head["format"] != FORMAT:
                raise KeyError("format")
            again = to_json(index).encode()
            checksum, head["checksum"] = head["checksum"], ""
            whole = to_json(index).encode()
            self.files: dict[str, str] = dict(index["weight_map"])
            self._seals: dict[str, str] = dict(head["seals"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            if FORMAT.encode() in raw:
                raise damaged(path, f"it is no index of ours ({error})") from error
            raise ValueError(
                f"{path}: not written by jaxcompress.save (or damaged); "
                "jaxcompress.models.load reads checkpoints of other programs"
            ) from error
        if head.get("format_version") != str(VERSION):
            raise ValueError(
                f"{path}: written in format {head.get('format_version')}, this "
                f"jaxcompress reads {VERSION}; update it (or get the file again, if "
                "damaged)"
            )
        if digest(whole).hex() != checksum or again != raw:
            raise damaged(path, "its checksum is not the one written")
        self.about = head.get("about")
        if type(self.about) is not dict:
            raise damaged(path, "it does not describe a tree")
        for name in self.files.values():
            sealed = type(name) is str and type(self._seals.get(name)) is str
            if not sealed or os.path.basename(name) != name:
                raise damaged(path, f"it names the file {name!r}")

    def open(self, name: str) -> TensorFile:
        """Return a shard, checked to be the one the index was written for."""
        path = os.path.join(os.path.dirname(self.path), name)
        file = TensorFile(path)
        arrays = {array for array, where in self.files.items() if where == name}
        if file.seal.hex() != self._seals[name] or file.spans.keys() != arrays:
            file.close()
            raise damaged(path, f"it is not the shard that {self.path} was written for")
        return file


def _names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{i:05d}-of-{count:05d}{_ENDING}" for i in range(1, count + 1)]


def _index(
    parts: Sequence[Mapping[str, Slot]],
    names: Sequence[str],
    seals: Sequence[bytes],
    about: Mapping[str, Any],
) -> bytes:
    sizes = (count_bytes(slot) for part in parts for slot in part.values())
    named = list(zip(names, parts, strict=True))
    index: dict[str, Any] = {
        "metadata": {
            "format": FORMAT,
            "format_version": str(VERSION),
            "about": about,
            "checksum": "",
            "seals": {
                name: seal.hex() for name, seal in zip(names, seals, strict=True)
            },
            "total_size": sum(sizes),
        },
        "weight_map": {array: name for name, part in named for array in part},
    }
    index["metadata"]["checksum"] = digest(to_json(index).encode()).hex()
    return to_json(index).encode()


def _old_files(path: str) -> set[str]:
    """Return shards of an earlier save to this path, by their names; none of anyone
    else's.
    """
    stem = re.escape(os.path.basename(path.removesuffix(_ENDING)))
    ours = re.compile(rf"{stem}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}{_ENDING}")
    if not os.path.exists(path + SUFFIX):
        return set()
    try:
        names = set(Index(path + SUFFIX).files.values())
    except ValueError:
        return set()
    return {name for name in names if ours.fullmatch(name)}

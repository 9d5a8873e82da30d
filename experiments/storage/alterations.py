"""Ways to alter a file, and to write its digests anew over what was altered."""

import contextlib
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxcompress.storage.checksummed_file import ABOUT, digest, to_json

INDEX = "x.safetensors.index.json"
WAYS = ("bit", "byte", "cut", "swap", "zeros", "grow", "header", "length", "value")
WAYS += ("head", "tail")  # of a stream
ODD = (None, True, -1, 0, 7, 2**31, 2**63, 1e30, "", "x", [], {}, [[]])


def altered(data: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    """Alter a file in one way: its name, and the file, which is another."""
    while True:
        way = str(random.choice(WAYS))
        out = _altered(data, way, random)
        if out != data:
            return way, out


def _altered(data: bytes, way: str, random: np.random.Generator) -> bytes:
    out = bytearray(data)
    whole = data[:1] == b"{"  # an index, which is JSON
    start, head = (0, len(data)) if whole else (8, _head(data))
    at = int(random.integers(0, len(out)))
    if way == "bit":
        out[at] ^= 1 << int(random.integers(0, 8))
    elif way == "byte":
        out[at] = int(random.integers(0, 256))
    elif way == "cut":
        out = out[:at]
    elif way == "swap":
        other, size = int(random.integers(0, len(out))), int(random.integers(1, 64))
        one, two = out[at : at + size], out[other : other + size]
        out[at : at + len(two)], out[other : other + len(one)] = two, one
    elif way == "zeros":
        out[at : at + 40] = bytes(len(out[at : at + 40]))
    elif way == "grow":
        out += bytes(int(random.integers(1, 100)))
    elif way == "header":  # a digit of a size, an offset, a shape
        digits = [i for i in range(start, head) if 48 <= out[i] < 58]
        out[int(random.choice(digits))] = int(random.integers(48, 58))
    elif way == "value":
        text = with_odd_value(data[start:head], random)
        if whole:
            return text
        if b"__about__" in data[8:head] and random.integers(0, 2):
            return with_odd_about(data, random)
        text = text.ljust(head - 8)
        out = struct.pack("<Q", len(text)) + text + data[head:]
    elif way == "length" and not whole:
        out[:8] = struct.pack("<Q", int(random.choice([0, 7, head * 2, 10**8, 2**63])))
    elif way in ("head", "tail") and not whole:
        # Numbers, tables and bases stand first, an index of chunks last.
        first, last = _spans(data)[int(random.integers(0, len(_spans(data)) - 1))]
        size = min(64, last - first)
        at = int(random.integers(0, size))
        at = first + at if way == "head" else last - 1 - at
        new = (0, 1, 127, 128, 255, out[at] + 1, out[at] - 1, out[at] ^ 16)
        out[at] = int(random.choice(new)) % 256
    return bytes(out)


def with_odd_value(text: bytes, random: np.random.Generator) -> bytes:
    """Replace or drop one value of JSON, also in texts that are JSON again."""
    whole = json.loads(text)
    about = whole.get("__metadata__") or whole.get("metadata") or {}
    inner = []
    for key, value in about.items():
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            about[key] = json.loads(value)
            inner.append(key)
    places = list(_places(whole))
    holder, key = places[int(random.integers(0, len(places)))]
    choice = int(random.integers(-1, len(ODD)))
    if choice < 0:
        del holder[key]
    else:
        holder[key] = ODD[choice]
    if isinstance(about, dict):
        about.update({key: to_json(about[key]) for key in inner if key in about})
    return to_json(whole).encode()


def with_odd_about(data: bytes, random: np.random.Generator) -> bytes:
    """Replace or drop one value of the object that describes a file's tree."""
    head = _head(data)
    header = json.loads(data[8:head])
    first, last = header[ABOUT]["data_offsets"]
    about = zlib.decompress(data[head + first : head + last])
    new = zlib.compress(with_odd_value(about, random))
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= last:
            entry["data_offsets"] = [
                at + len(new) - (last - first) for at in entry["data_offsets"]
            ]
    header[ABOUT] |= {"shape": [len(new)], "data_offsets": [first, first + len(new)]}
    text = to_json(header).encode()
    text = text.ljust(-8 * (-len(text) // 8))
    body = data[head : head + first] + new + data[head + last :]
    return struct.pack("<Q", len(text)) + text + body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """List the places of values: what holds them, and the key there."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in list(pairs):
        yield value, key
        if isinstance(below, dict | list):
            yield from _places(below)


def _head(data: bytes) -> int:
    """Count the bytes before the arrays."""
    return 8 + int.from_bytes(data[:8], "little")


def _spans(data: bytes) -> list[list[int]]:
    """Find the first byte, and the one after the last, of arrays and digests."""
    head = _head(data)
    entries = json.loads(data[8:head])
    entries.pop("__metadata__")
    return sorted([head + i for i in x["data_offsets"]] for x in entries.values())


def forged(files: dict[str, bytes]) -> dict[str, bytes]:
    """Give files the digests that fit them, where that can be."""
    found = {name: sealed(data) for name, data in files.items() if name != INDEX}
    if INDEX in files:
        found[INDEX] = files[INDEX]
        with contextlib.suppress(ValueError, LookupError, TypeError):
            index = json.loads(files[INDEX])
            about = index["metadata"]
            about["seals"] |= {name: found[name][-16:].hex() for name in about["seals"]}
            about["checksum"] = ""
            about["checksum"] = digest(to_json(index).encode()).hex()
            found[INDEX] = to_json(index).encode()
    return found


def sealed(data: bytes) -> bytes:
    """Give a file digests that fit it; as it is where its header says nothing."""
    try:
        rows = [digest(data[first:last]) for first, last in _spans(data)[:-1]]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return data
    rows.append(digest(data[: _head(data)]))
    rows.append(digest(b"".join(rows)))
    return data[: max(0, len(data) - 16 * len(rows))] + b"".join(rows)

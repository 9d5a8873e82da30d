"""The bytes of coded leaves and streams in files: lists of numbers, arrays, lanes.

`docs/format.md` says what each record holds. `Record` reads all of them.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

MOST_STACK_AXES = 15


class Record:
    """Reads the parts of a record in order.

    Whatever does not fit raises ValueError: the bytes are damaged. (What fits and is
    wrong all the same, a checksum must find.)

    Args:
      data: the bytes.
      what: they should be, for errors.
    """

    def __init__(self, data: bytes | memoryview, what: str):
        self._data, self._at, self._what = memoryview(data), 0, what

    def __len__(self) -> int:
        return len(self._data) - self._at

    def require(self, fits: bool, content: str) -> None:
        """Raise ValueError where the content does not fit."""
        require(fits, content, self._what)

    def take(self, size: int, content: str) -> memoryview:
        """Return the next bytes; `content` names them in an error."""
        self.require(0 <= size <= len(self), f"{content} in {len(self)} bytes")
        self._at += size
        return self._data[self._at - size : self._at]

    def array(self, dtype: str, shape: Sequence[int], content: str) -> np.ndarray:
        """Return an array that shares the memory of the record."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return np.frombuffer(self.take(size, content), dtype).reshape(shape)

    def number(self) -> int:
        number, shift = 0, 0
        data, at = self._data, self._at
        while True:
            if at >= len(data) or shift > 56:
                raise ValueError("a list of numbers is cut off or damaged")
            number |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                self._at = at
                return number

    def numbers(self, count: int) -> list[int]:
        """Return a list of `count` numbers that `write_numbers` wrote."""
        out: list[int] = []
        while len(out) < count:
            number = self.number()
            if number:
                out.append(number)
                continue
            run = self.number() + 1
            if run > count - len(out):
                raise ValueError("a run of zeros is longer than its list")
            out.extend([0] * run)
        return out

    def stack(self) -> tuple[int, ...]:
        """Return sizes of stack axes that `write_stack` wrote."""
        (axes,) = self.numbers(1)
        self.require(0 < axes <= 1 + MOST_STACK_AXES, f"{axes - 1} stack axes")
        return tuple(self.numbers(axes - 1))

    def words(self, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Return words of lanes, to the end of the record.

        Args:
          lengths: words of each lane, `[slices, lanes]`.

        Returns:
          `words` uint16 `[slices, most]`, padded with zeros, and int32 `offsets` of the
          lanes in them, `[slices, lanes + 1]`; no memory of the record.
        """
        offsets = np.zeros((len(lengths), lengths.shape[1] + 1), np.int64)
        np.cumsum(lengths, axis=1, out=offsets[:, 1:])
        total = int(offsets[:, -1].sum())
        self.require(2 * total == len(self), f"{len(self)} bytes of {total} words")
        words = np.zeros((len(lengths), int(offsets[:, -1].max(initial=0))), np.uint16)
        for row, last in zip(words, offsets[:, -1].tolist(), strict=True):
            row[:last] = self.array("<u2", (last,), "words")
        return {"words": words, "offsets": offsets.astype(np.int32)}


def require(fits: bool, content: str, what: str) -> None:
    """Raise ValueError where bytes hold other content than they should."""
    if not fits:
        raise ValueError(f"not {what}: {content}; the file is damaged")


def write_stack(lead: Sequence[int]) -> list[int]:
    """Return numbers that begin a record: one more than the stack axes, and their
    sizes.
    """
    return [len(lead) + 1, *lead]


def write_words(words: np.ndarray, offsets: np.ndarray) -> bytes:
    """Return words of lanes without padding, slice after slice; `Record.words` reads
    them.

    Args:
      words: `[..., words]`; offsets: of the lanes in them, `[..., lanes + 1]`.
    """
    last = np.asarray(offsets).reshape(-1, offsets.shape[-1])[:, -1]
    rows = np.asarray(words).reshape(last.size, words.shape[-1]).astype("<u2")
    pairs = zip(rows, last.tolist(), strict=True)
    return b"".join(row[:size].tobytes() for row, size in pairs)


def lane_lengths(offsets: np.ndarray) -> tuple[np.ndarray, int]:
    """Return words of each lane, `[slices, lanes]`, and the bytes that each length
    takes.
    """
    lengths = np.diff(np.asarray(offsets).reshape(-1, offsets.shape[-1]))
    return lengths, 4 if lengths.size and lengths.max() >= 1 << 16 else 2


def write_numbers(numbers: Iterable[int]) -> bytes:
    """Return numbers >= 0, seven bits to a byte, lowest first; zeros as 0, their run -
    1.
    """
    out = bytearray()

    def put(number: int) -> None:
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)

    run = 0
    for number in numbers:
        if number and run:
            out.append(0)
            put(run - 1)
        run = 0 if number else run + 1
        if number:
            put(int(number))
    if run:
        out.append(0)
        put(run - 1)
    return bytes(out)


def fold_sign(number: int) -> int:
    """Fold signs: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return 2 * number if number >= 0 else -2 * number - 1


def unfold_sign(number: int) -> int:
    """Undo `fold_sign`."""
    return -(number + 1) // 2 if number & 1 else number // 2

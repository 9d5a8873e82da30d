"""Recipes whose files, as written, are as large as asked and no larger."""

import ast
import dataclasses
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcompress.calibration.moments import Moments
from jaxcompress.shrinking.goals import REACHED
from jaxcompress.shrinking.stages import Stages
from jaxcompress.shrinking.store import Store
from jaxcompress.shrinking.subject import Subject
from jaxcompress.storage.checkpoint import open_checkpoint
from jaxcompress.tree.compress import compress
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import is_leaf
from jaxcompress.tree.paths import Entry, roots
from jaxcompress.types import Params, Rule

AIM = 0.9985  # of the limit; coded sizes are met within some thousandths
HEADER = 300  # bytes that the file's description spends on a leaf, about
NUDGE = 0.08  # the most that one leaf's rate changes to close a gap


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A recipe, what it made, and the bytes of its file and of each leaf in it."""

    rules: tuple[Rule, ...]
    params: Params
    file_bytes: int
    leaf_bytes: Mapping[str, int]


@dataclasses.dataclass
class Coder:
    """Compresses leaf by leaf; a leaf that was coded by a method is not coded again.

    Args:
      subject: the model.
      planned: the entries that recipes are of.
      moments, layouts: by name.
      metadata: of the file, besides the recipe.
      about: JSON values that the leaves depend on, for the store.
    """

    subject: Subject
    planned: list[Entry]
    moments: Mapping[str, Moments] | None
    layouts: Mapping[str, Layout]
    metadata: Mapping[str, Any]
    store: Store
    about: Any
    stages: Stages
    coded: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)

    def apply(self, rules: tuple[Rule, ...]) -> Params:
        """Return the tree with every planned leaf coded by its rule."""
        methods = {re.sub(r"\\(.)", r"\1", name): method for name, method in rules}
        missing = [
            e for e in self.planned if (e.name, methods[e.name]) not in self.coded
        ]
        if missing:
            with self.stages.stage("compressing", f"{len(missing)} leaves"):
                self._code_all(missing, methods)
        small = {e.name: self.coded[e.name, methods[e.name]] for e in self.planned}
        return replace_roots(self.subject.params, small)

    def _code_all(self, entries: list[Entry], methods: Mapping[str, str]) -> None:
        for entry in self.stages.items("compressing", "leaves")(entries):
            method = methods[entry.name]
            self.coded[entry.name, method] = self.store.get(
                "leaf",
                [self.about, entry.name, method],
                lambda entry=entry, method=method: self._code(entry, method),
            )

    def _code(self, entry: Entry, method: str) -> Any:
        name = entry.name
        moments = None
        if self.moments is not None and name in self.moments:
            moments = {name: self.moments[name]}
        layouts = {name: self.layouts[name]} if name in self.layouts else {}
        # One leaf as a tree of its own; a slash in a key is a slash in a name.
        rule = [(re.escape(name), method)]
        return compress({name: entry.value}, rule, moments, layouts=layouts)[name]

    def write(self, rules: tuple[Rule, ...], params: Params) -> Attempt:
        """Measure the file of a tree by writing it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            self.subject.save(path, params, self.about_file(rules))
            with open_checkpoint(path) as stored:
                size = sum(file.size for file in stored.files()) + stored.index_bytes
                inside = {
                    name.removeprefix("params/"): stored.nbytes(name)
                    for name in stored.names
                }
        return Attempt(tuple(rules), params, size, inside)

    def about_file(self, rules: tuple[Rule, ...]) -> dict[str, Any]:
        """Return the metadata of a file: the same recipe gives the same bytes."""
        return {**self.metadata, "recipe": [list(rule) for rule in rules]}

    def overhead(self) -> int:
        """Return bytes of a file besides the planned leaves; their headers are an
        estimate.
        """
        names = {entry.name for entry in self.planned}
        rest = {n: x for n, x in roots(self.subject.params) if n not in names}
        rules = tuple((name, "rate_distortion(rate=2.5)") for name in names)
        return self.write(rules, rest).file_bytes + HEADER * len(names)


def fit(
    coder: Coder,
    limit: int,
    plan: Callable[[int], tuple[Rule, ...]],
    *,
    aim: float = AIM,
    tries: int = 6,
) -> Attempt:
    """Return the recipe of a plan whose file is at most so large, and nearly so large.

    The first attempt takes what the limit leaves besides headers and unplanned leaves.
    The smallest leaf that can take the rest takes it; where none can, a new plan is
    made for it.

    Args:
      coder: of the model.
      limit: bytes of the file.
      plan: from bytes of the planned leaves to rules.
      aim: of the limit, below 1.
      tries: attempts at most.

    Returns:
      The largest attempt within the limit.

    Raises:
      ValueError: no attempt is within the limit; says how small the file became.
    """
    room = room_of(coder, limit, aim)
    rules, best, smallest = plan(room), None, None
    for _ in range(tries):
        attempt = coder.write(rules, coder.apply(rules))
        size = attempt.file_bytes
        smallest = min(size, smallest or size)
        if size <= limit and (best is None or size > best.file_bytes):
            best = attempt
        gap = int(limit * aim) - size
        if REACHED + (1 - REACHED) / 2 <= size / limit <= 1:
            break
        nudged = _nudged(attempt, gap)
        if nudged is None:
            room += gap
            nudged = plan(max(1, room))
        if nudged == rules:
            break
        rules = nudged
    if best is None:
        raise ValueError(
            f"no file within {limit} bytes in {tries} attempts; the smallest has "
            f"{smallest}. Ask for that"
        )
    return best


def room_of(coder: Coder, limit: int, aim: float) -> int:
    """Return bytes for the planned leaves in a file of so many.

    Raises:
      ValueError: what is not planned fills the file.
    """
    room = int(limit * aim) - coder.overhead()
    if room <= 0:
        raise ValueError(
            f"a file of {limit} bytes: what is not planned (tokenizer, norms, header) "
            f"takes {limit * aim - room:.0f} already. Ask for more, or trim the "
            "vocabulary first (models.trim_vocabulary)"
        )
    return room


def _nudged(attempt: Attempt, gap: int) -> tuple[Rule, ...] | None:
    """Return rules with one leaf's rate changed, so that the file changes by `gap`."""
    by_size = sorted(attempt.rules, key=lambda rule: attempt.leaf_bytes[_name(rule)])
    for rule in by_size:
        size = attempt.leaf_bytes[_name(rule)]
        if abs(gap) <= NUDGE * size:
            changed = (rule[0], with_rate(rule[1], 1 + gap / size))
            return tuple(changed if r == rule else r for r in attempt.rules)
    return None


def _name(rule: Rule) -> str:
    return re.sub(r"\\(.)", r"\1", rule[0])


def with_rate(method: str, factor: float) -> str:
    """Return a `rate_distortion(rate=...)` string with its rates times a factor."""
    match = re.search(r"rate=(\([^)]*\)|[\d.]+)", method)
    rate = ast.literal_eval(match[1])
    scaled = [round(min(x * factor, 12.0), 4) for x in _several(rate)]
    new = repr(tuple(scaled)) if isinstance(rate, tuple) else repr(scaled[0])
    return method[: match.start(1)] + new + method[match.end(1) :]


def _several(rate: Any) -> tuple[float, ...]:
    return rate if isinstance(rate, tuple) else (rate,)


def replace_roots(params: Params, new: Mapping[str, Any]) -> Params:
    """Return the tree with the outermost leaves of these names replaced."""
    treedef = jax.tree.structure(params, is_leaf=is_leaf)
    return jax.tree.unflatten(treedef, [new.get(n, x) for n, x in roots(params)])

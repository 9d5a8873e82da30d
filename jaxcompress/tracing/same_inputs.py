"""Weights that meet the same rows, as queries, keys and values do."""

import dataclasses
from collections.abc import Collection, Hashable
from typing import Any

from jaxcompress.tracing.uses import Use


@dataclasses.dataclass
class SameInputs:
    """The rows that each weight meets in one trace, use after use."""

    met: dict[str, list[Hashable]] = dataclasses.field(default_factory=dict)
    held: list[Any] = dataclasses.field(default_factory=list)  # an id is one value's

    def note(self, use: Use) -> None:
        """Note a use; to be called at each of them, in the order of the program."""
        self.held.append(use)
        plain = use.chosen is None and use.real is None and not use.picked
        if use.lookup or not plain:
            met: Hashable = use.name
        else:
            axes = use.stack, len(use.layout.stack), use.shared
            met = id(use.inputs), *axes, use.part, use.ordered, use.looped
        self.met.setdefault(use.name, []).append(met)

    def leaders(self, among: Collection[str] | None = None) -> dict[str, str]:
        """Return by name the first weight, itself if need be, that meets the same rows
        in all its uses.

        Args:
          among: names to choose from; all by default.
        """
        first: dict[Hashable, str] = {}
        names = [name for name in self.met if among is None or name in among]
        return {name: first.setdefault(tuple(self.met[name]), name) for name in names}

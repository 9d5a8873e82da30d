"""Finished parts of a long run, kept on disk: a killed one goes on from there."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress.storage import container
from jaxcompress.tree.methods import describe
from jaxcompress.tree.rules import LeafReport, chain


@dataclasses.dataclass(frozen=True)
class Part:
    """What was compressed in one go: leaves and reports by the leaves' full names.

    `index` is the slice of a stack that the leaves are, except those that `whole`
    names.
    """

    label: str
    index: int | None
    whole: tuple[str, ...]
    leaves: dict[str, Any]
    reports: list[LeafReport]


@dataclasses.dataclass(frozen=True)
class Store:
    """Parts in a directory, one file each, written beside and renamed; None: nowhere.

    `digest` says which run they belong to.
    """

    directory: str | os.PathLike | None
    digest: str

    def load(self, number: int) -> Part | None:
        """Part `number`, None where it is not there.

        Raises ValueError where it is one of another run.
        """
        if self.directory is None or not (path := self._path(number)).exists():
            return None
        with container.open(path) as file:
            about = file.metadata
            if about.get("run") != self.digest:
                raise ValueError(
                    f"{path} was written by a run with another model, recipe, options, "
                    "moments or batches; delete the directory, or pass another store"
                )
            leaves = jax.tree.map(file.read, file.tree)["leaves"]
        reports = [
            LeafReport(**row | {"shape": tuple(row["shape"])})
            for row in about["reports"]
        ]
        whole = tuple(about["whole"])
        return Part(about["label"], about["index"], whole, leaves, reports)

    def save(self, number: int, part: Part) -> None:
        if self.directory is None:
            return
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        about = {
            "run": self.digest,
            "label": part.label,
            "index": part.index,
            "whole": list(part.whole),
            "reports": [dataclasses.asdict(row) for row in part.reports],
        }
        container.save(self._path(number), {"leaves": part.leaves}, metadata=about)

    def _path(self, number: int) -> Path:
        return Path(self.directory) / f"part-{number:04}.safetensors"


def digest(
    recipe: Any,
    options: Mapping[str, Any],
    shapes: Mapping[str, Any],
    batches: Sequence,
) -> str:
    """What tells one run from another: recipe, options, weights' names, batches."""
    about = {
        "recipe": [_described(stage) for stage in chain(recipe).stages],
        "options": dict(options),
        "shapes": {n: [str(x.dtype), list(x.shape)] for n, x in shapes.items()},
    }
    found = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16)
    for batch in batches:
        for x in jax.tree.leaves(batch):
            x = np.ascontiguousarray(x)
            found.update(f"{x.dtype}{x.shape}".encode())
            found.update(x.tobytes())
    return found.hexdigest()


def _described(stage: Any) -> Any:
    if isinstance(stage, str) or stage is None:
        return stage
    if callable(stage):
        return describe(stage)
    return [[pattern, _described(f)] for pattern, f in stage]

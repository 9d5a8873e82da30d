"""Block checkpoints, so that an interrupted run resumes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.storage.resume import Results, digest
from jaxcompress.tree.compress import LeafReport, chain
from jaxcompress.tree.methods import describe
from jaxcompress.types import Recipe


@dataclasses.dataclass(frozen=True)
class Part:
    """Leaves and reports of one compressed segment, by the leaves' full names.

    `index` is the slice of a stack that the leaves are, except those that `whole`
    names.
    """

    label: str
    index: int | None
    whole: tuple[str, ...]
    leaves: dict[str, Any]
    reports: list[LeafReport]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Parts of one run among the results in a directory, by number.

    `run` is the digest of what distinguishes runs.
    """

    results: Results
    run: str

    def load(self, number: int) -> Part | None:
        """Return a part, None where it is not there.

        Raises ValueError where it is one of another run.
        """
        advice = (
            "the model, recipe, options, moments or batches differ; delete the "
            "directory, or pass another store"
        )
        stored = self.results.load(_name(number), {"run": self.run}, advice)
        if stored is None:
            return None
        tree, about = stored
        reports = [
            LeafReport(**row | {"shape": tuple(row["shape"])})
            for row in about["reports"]
        ]
        whole = tuple(about["whole"])
        return Part(about["label"], about["index"], whole, tree["leaves"], reports)

    def save(self, number: int, part: Part) -> None:
        about = {
            "run": self.run,
            "label": part.label,
            "index": part.index,
            "whole": list(part.whole),
            "reports": [dataclasses.asdict(row) for row in part.reports],
        }
        self.results.save(_name(number), {"leaves": part.leaves}, about)


def _name(number: int) -> str:
    return f"part-{number:04}"


def digest_run(
    recipe: Recipe,
    options: Mapping[str, Any],
    weights: Mapping[str, str],
    batches: Sequence,
) -> str:
    """Hash what distinguishes runs: recipe, options, digests of weights, batches."""
    about = {
        "recipe": [_described(stage) for stage in chain(recipe).stages],
        "options": dict(options),
        "weights": dict(weights),
    }
    return digest(about, list(batches))


def _described(stage: Any) -> Any:
    if isinstance(stage, str) or stage is None:
        return stage
    if callable(stage):
        return describe(stage)
    return [[pattern, _described(f)] for pattern, f in stage]


def one_part(parts: list[Part]) -> Part:
    """Merge the parts of one segment that were compressed in several steps."""
    first, *_ = parts
    leaves = {name: leaf for part in parts for name, leaf in part.leaves.items()}
    return Part(
        first.label,
        first.index,
        tuple(sorted(name for part in parts for name in part.whole)),
        dict(sorted(leaves.items())),
        sorted((r for part in parts for r in part.reports), key=lambda r: r.name),
    )


def joined(parts: list[Part], fetch: Callable[[str], Any]) -> dict[str, Any]:
    """Return all leaves by name; slices of a stack are stacked again."""
    by_name: dict[str, Any] = {}
    slices: dict[str, list[tuple[int, Any]]] = {}
    changed = {row.name for part in parts for row in part.reports if row.method}
    for part in parts:
        for name, leaf in part.leaves.items():
            if part.index is None or name in part.whole:
                by_name[name] = leaf
            else:
                slices.setdefault(name, []).append((part.index, leaf))
    for name, stack in slices.items():
        if name not in changed:
            by_name[name] = fetch(name)
            continue
        leaves = [leaf for _, leaf in sorted(stack, key=lambda pair: pair[0])]
        kinds = {
            (
                jax.tree.structure(x),
                tuple((a.shape, a.dtype) for a in jax.tree.leaves(x)),
            )
            for x in leaves
        }
        if len(kinds) > 1:
            raise ValueError(
                f"{name}: its layers were compressed to leaves of unlike shapes, which "
                "cannot be stacked; take methods whose shapes do not depend on values, "
                "or the looped model (unstack_layers)"
            )
        by_name[name] = jax.tree.map(lambda *x: jnp.stack(x), *leaves)
    return by_name


def reports_of(part: Part) -> list[LeafReport]:
    """Return its reports; those of a stack name the slice."""
    if part.index is None:
        return part.reports
    path = part.label.rsplit("[", 1)[0]
    return [
        row
        if row.name in part.whole
        else dataclasses.replace(row, name=part.label + row.name.removeprefix(path))
        for row in part.reports
    ]

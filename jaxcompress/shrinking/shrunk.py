"""`Shrunk`: what `shrink` returns."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jaxcompress.reporting import grouped
from jaxcompress.reporting.leaves import LeafTable
from jaxcompress.shrinking.subject import Subject
from jaxcompress.types import Params, Rule


@dataclasses.dataclass(frozen=True, repr=False)
class Shrunk:
    """A small model, measured.

    Args:
      model: to run with `params`. A path was loaded with its layers stacked where they
        are alike; an NNX module is a copy that holds the parameters.
      params: the compressed tree.
      tokenizer: of a language model, or None.
      recipe: rules `(name, method)`; `compress` makes the tree of them with the same
        moments, except for what training changed.
      report: a row per leaf; prints as a table.
      file_bytes: of the file that `save` writes, measured.
      predicted_file_bytes: what was aimed at.
      kl: measured mean KL(model || small) in nats per prediction on held-out batches;
        None where there was nothing to measure on.
      kl_standard_error: over windows, or examples.
      predicted_kl: to second order, by curvatures; None without them.
      candidates: what was measured, by name: `kl` and `file_bytes` of each; "plan",
        "uniform" and "tuned". The best within the limit is returned.
      notes: what a caller should know, in words.
      metadata: what the file says about its making.
      stages: by name of a stage: `seconds`, `processor_seconds`, and
        `peak_memory_bytes` of the process so far. What the store held took none.

    Example:
      >>> small = jc.shrink(model, params, size=60_000, effort="quick", progress=False)
      >>> small.file_bytes <= 60_000
      True
    """

    model: Any
    params: Params
    tokenizer: Any
    recipe: tuple[Rule, ...]
    report: LeafTable
    file_bytes: int
    predicted_file_bytes: int
    kl: float | None
    kl_standard_error: float | None
    predicted_kl: float | None
    candidates: Mapping[str, Mapping[str, float | None]]
    notes: tuple[str, ...]
    metadata: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, float | None]]
    subject: Subject

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file per weight of the dense model."""
        return 8 * self.file_bytes / self.subject.weights

    def save(self, path: str | os.PathLike) -> None:
        """Write the file whose size is `file_bytes`.

        `models.load` reads a language model of this package, `load` other parameters.
        """
        self.subject.save(path, self.params, self.metadata)

    def __str__(self) -> str:
        lines = [
            f"{grouped(self.file_bytes)} bytes, {self.bits_per_weight:.3f} bits per "
            "weight of the file"
        ]
        if self.kl is not None:
            error = self.kl_standard_error
            spread = "" if error is None else f" +- {error:.2g}"
            lines.append(f"KL {self.kl:.4g}{spread} nats per prediction, held out")
        if self.predicted_kl is not None:
            lines.append(f"KL {self.predicted_kl:.4g} predicted from curvatures")
        for name, row in self.candidates.items():
            if row["kl"] is not None:
                lines.append(
                    f"  {name}: {grouped(int(row['file_bytes']))} bytes, KL "
                    f"{row['kl']:.4g}"
                )
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__

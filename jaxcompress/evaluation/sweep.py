"""`sweep`: recipes side by side, each as a file that was written and read again."""

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.evaluation.language import Apply, compare
from jaxcompress.progress import each_item
from jaxcompress.storage.checkpoint import load, open_checkpoint, save
from jaxcompress.tree.compress import compress
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import materialize
from jaxcompress.tree.paths import roots
from jaxcompress.types import Batch, Model, Params, Progress, Recipe


@dataclasses.dataclass(frozen=True)
class Point:
    """One recipe, measured.

    Args:
      name: of the recipe.
      file_bytes: of the written file of parameters, without a tokenizer.
      bits_per_weight: of the file, over all weights.
      kl: mean KL(model || small) in nats per token.
      kl_standard_error: of the mean, windows as clusters; None for one window.
      perplexity: of the small model; `perplexity_before`: of the model.
      group: points of one group are joined in a plot; "" for none.
    """

    name: str
    file_bytes: int
    bits_per_weight: float
    kl: float
    kl_standard_error: float | None
    perplexity: float
    perplexity_before: float
    group: str = ""


def sweep(
    model: Model,
    params: Params,
    recipes: Mapping[str, Recipe] | Sequence[Recipe],
    batches: Iterable[Batch],
    *,
    moments: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    progress: Progress = False,
) -> list[Point]:
    """Compress by each recipe, write the file, read it again, and compare.


    Args:
      model: a Linen module, tokens `[B, T]` to logits `[B, T, V]`.
      params: dense.
      recipes: by name, or a list of which each is its own name. The group of a point
        is its name up to the first bracket.
      batches: of `windows`.
      moments, layouts: as for `compress`.
      progress: of the recipes.

    Raises:
      ValueError: no recipes; what `compress` and `compare` raise.

    Example:
      >>> points = jc.sweep(model, params, ["symmetric(bits=3)"], windows)
    """
    if not isinstance(recipes, Mapping):
        recipes = {str(recipe): recipe for recipe in recipes}
    if not recipes:
        raise ValueError("there are no recipes to compare; pass at least one")
    weights = sum(int(np.prod(x.shape)) for _, x in roots(params))
    batches, points = list(batches), []
    for name in each_item(list(recipes), progress, label="recipes", unit="recipes"):
        small = compress(params, recipes[name], moments, layouts=layouts)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            save(path, small)
            with open_checkpoint(path) as stored:
                size = sum(file.size for file in stored.files()) + stored.index_bytes
            small = load(path)
        report = compare(Apply(model), params, materialize(small), batches)
        points.append(
            Point(
                name,
                size,
                8 * size / weights,
                report.kl,
                report.kl_standard_error,
                report.small.perplexity,
                report.dense.perplexity,
                name.split("(")[0],
            )
        )
    return points

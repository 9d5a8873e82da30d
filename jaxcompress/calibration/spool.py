"""Arrays of a long run on disk, so that a killed one resumes."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from jaxcompress.storage import checkpoint


@dataclasses.dataclass(frozen=True)
class Spool:
    """Arrays of a run on disk, by the name of what made them."""

    directory: str | os.PathLike
    digest: str

    def save(self, name: str, tree: Any) -> None:
        os.makedirs(self.directory, exist_ok=True)
        about = {"run": self.digest}
        checkpoint.save(self._path(name), tree, metadata=about, coding="none")

    def load(self, name: str) -> Any:
        """Return what was saved; None where there is nothing."""
        path = self._path(name)
        if not os.path.exists(path):
            return None
        with checkpoint.open_checkpoint(path) as file:
            if file.metadata.get("run") != self.digest:
                raise ValueError(
                    f"{path} was written by a run with another model, options, moments "
                    "or batches; delete the directory, or pass another store"
                )
            return jax.tree.map(lambda place: np.asarray(file.read(place)), file.tree)

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, f"curvatures-{name}.safetensors")

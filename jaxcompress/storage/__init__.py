"""Files: one `.safetensors` file or shards of it, archives, and Orbax checkpoints."""

from jaxcompress.storage.archive import pack, unpack
from jaxcompress.storage.checkpoint import (
    StoredParams,
    load,
    open_checkpoint,
    save,
    verify,
)
from jaxcompress.storage.orbax import is_orbax, restore_orbax, save_orbax
from jaxcompress.storage.tree_json import FileDamaged

__all__ = [
    "FileDamaged",
    "StoredParams",
    "is_orbax",
    "load",
    "open_checkpoint",
    "pack",
    "restore_orbax",
    "save",
    "save_orbax",
    "unpack",
    "verify",
]

"""Files: one `.safetensors` file or shards of it, and Orbax checkpoints."""

from jaxcompress.storage.container import StoredParams, load, open, save, verify
from jaxcompress.storage.manifest import FileDamaged
from jaxcompress.storage.orbax import restore_orbax, save_orbax

__all__ = [
    "FileDamaged",
    "StoredParams",
    "load",
    "open",
    "restore_orbax",
    "save",
    "save_orbax",
    "verify",
]

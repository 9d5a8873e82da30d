"""One way in: a model, its parameters and its tokenizer, from wherever they are."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.models.assembly import parameter_shapes
from jaxcompress.models.gguf_files import open_gguf, read_gguf, read_model
from jaxcompress.models.huggingface import (
    open_huggingface,
    open_model,
    read_huggingface,
)
from jaxcompress.models.saved import (
    load_reference,
    load_saved,
    open_saved,
    reference_file,
    saved_shapes,
)
from jaxcompress.models.transformer import Transformer
from jaxcompress.tokenization import Tokenizer
from jaxcompress.types import DType, Params

REFERENCE = "reference"
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]
_NOT_NEEDED = ["consolidated*", "*/*"]  # the same weights again, in other formats


def load(
    name_or_path: str | Path,
    *,
    scan: bool | None = None,
    dtype: DType | None = None,
    ignore: Collection[str] = (),
    keep_quantized: bool = False,
    revision: str | None = None,
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Read model, parameters and tokenizer; weights stay as stored.

    A directory may also hold a BertModel: the model is then an encoder, a `Bert`.
    `name_or_path` is "reference" (the small model shipped with the package), a file of
    `models.save`, a `.gguf` file, a Hugging Face directory, or a name on its hub
    ("owner/name"). `scan=True` stacks the layers for one compiled loop, None keeps them
    as a file of ours has them and does not stack others. `dtype` casts dense weights;
    None keeps the stored type, except that GGUF and the reference model give float32.
    The tokenizer is None where there is none. `ignore` are keys of a foreign
    configuration to pass over: one that is not known is refused, since it may change
    what the model computes. `keep_quantized`: weights that a GGUF file stores as Q4_0,
    Q4_1 or Q8_0, and those of a compressed-tensors directory, become `Quantized` leaves
    of the same codes and scales. Raises FileNotFoundError or ValueError that say what
    was found.

    Args:
      name_or_path: of a model on the Hub, a directory, or a file.
      scan: stack the layers; None where they are alike.
      dtype: of the parameters; None as stored.
      ignore: keys of the configuration to pass over.
      keep_quantized: keep quantized weights as leaves.
      revision: branch, tag or commit on the Hub; None for the main branch.

    Example:
      >>> jc.models.save("model.safetensors", model, params)
      >>> loaded = jc.models.load("model.safetensors")
    """
    if str(name_or_path) == REFERENCE:
        return load_reference(scan=scan, dtype=dtype)
    path = Path(name_or_path)
    if _is_gguf(path):
        return read_gguf(
            path,
            scan=bool(scan),
            dtype=dtype,
            ignore=ignore,
            keep_quantized=keep_quantized,
        )
    if not path.is_dir():
        if path.is_file() or _is_ours(path):  # its shards, perhaps
            return load_saved(path, scan=scan, dtype=dtype)
        path = _download(str(name_or_path), revision)
    return read_huggingface(
        path,
        scan=bool(scan),
        dtype=dtype,
        ignore=ignore,
        keep_quantized=keep_quantized,
    )


def open_weights(
    name_or_path: str | Path,
    *,
    dtype: DType | None = None,
    ignore: Collection[str] = (),
    keep_quantized: bool = False,
    revision: str | None = None,
) -> tuple[Transformer, Any, Tokenizer | None]:
    """Open a model as `load` reads it; each weight is read when it is asked for.

    In place of the parameters it returns `LazyParams`, which `compress_blockwise`
    takes: `[name]` reads a leaf, `tree` has a name for each; those of a file of ours
    begin with `params/`.

    Args:
      name_or_path: a file of `models.save`, a `.gguf` file, a Hugging Face directory or
        a hub name; not "reference", which is small.
      dtype: of the weights of foreign files; a file of ours keeps its own.
      ignore, keep_quantized, revision: as for `load`.

    Raises as `load`.

    Example:
      >>> jc.models.save("model.safetensors", model, params, tokenizer)
      >>> model, lazy, tokenizer = jc.models.open_weights("model.safetensors")
      >>> lazy["params/final_norm/scale"].shape
      (64,)
    """
    path = Path(name_or_path)
    if _is_gguf(path):
        return open_gguf(
            path, dtype=dtype, ignore=ignore, keep_quantized=keep_quantized
        )
    if path.is_file() or _is_ours(path):
        return open_saved(path)
    if str(name_or_path) == REFERENCE:
        raise ValueError(
            f"{REFERENCE!r} is one small file; take its parameters from "
            f"load({REFERENCE!r})"
        )
    path = path if path.is_dir() else _download(str(name_or_path), revision)
    return open_huggingface(
        path, dtype=dtype, ignore=ignore, keep_quantized=keep_quantized
    )


def shapes(
    name_or_path: str | Path,
    *,
    ignore: Collection[str] = (),
    revision: str | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return dense shapes and dtypes, by name, of what `load` would give; reads no
    weight.

    Headers only, except that a model on the hub must be downloaded first. Raises as
    `load`.
    """
    if str(name_or_path) == REFERENCE:
        with reference_file() as path:
            stored = saved_shapes(path)
        return {
            name: jax.ShapeDtypeStruct(x.shape, jnp.float32)
            for name, x in stored.items()
        }
    path = Path(name_or_path)
    if _is_gguf(path):
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in parameter_shapes(read_model(path, ignore=ignore)).items()
        }
    if path.is_file() or _is_ours(path):
        return saved_shapes(path)
    path = path if path.is_dir() else _download(str(name_or_path), revision)
    _, params = open_model(path, ignore=ignore)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(params.kind(name)))
        for name, shape in params.shapes.items()
    }


def _is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file, by its first bytes or else by its
    suffix.
    """
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                return True
    return path.suffix.lower() == ".gguf"


def _is_ours(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _download(name: str, revision: str | None) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(
            f"no file or directory {name!r}, and not a hub name (owner/name) or "
            f"{REFERENCE!r}"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"no directory {name!r}; fetching it from the hub needs huggingface_hub: "
            "pip install 'jaxcompress[hub]', or pass a directory"
        ) from error
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_NOT_NEEDED,
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"no directory {name!r}, and the hub did not give it "
            f"({str(error).splitlines()[0]}); download it elsewhere and pass the "
            "directory"
        ) from error

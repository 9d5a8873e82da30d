"""A model in one file of ours: parameters, settings and tokenizer together."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import tokenization
from jaxcompress.models.stacking import stack_layers, unstack_layers
from jaxcompress.models.transformer import Transformer
from jaxcompress.storage import checkpoint
from jaxcompress.tokenization import Tokenizer
from jaxcompress.tree.leaf import Leaf, is_leaf, materialize
from jaxcompress.types import DType, Params

ARCHITECTURE = "architecture"  # the key in a file's metadata
_FLAX_FIELDS = ("parent", "name")


def save(
    path: str | Path,
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    coding: str = "size",
) -> None:
    """Write a model, compressed or not, to one file that `load_saved` reads back.

    The file holds the tree `{"params": ..., "tokenizer": uint8 [bytes]}`; the model's
    settings join `metadata` (JSON values) under "architecture"; `coding` is that of
    `jc.save`. Raises ValueError where `metadata` has such a key already, and TypeError
    for a model that is not of this package: `jc.save` writes its parameters.

    Args:
      path: of the file.
      model: its settings are stored.
      params: dense or compressed.
      tokenizer: stored too, if given.
      metadata: JSON.
      coding: as for `jc.save`.

    Example:
      >>> jc.models.save("model.safetensors", model, params)
    """
    if not isinstance(model, Transformer):
        raise TypeError(
            f"models.save writes a Transformer of this package, not a "
            f"{type(model).__name__}; write the parameters of any model by "
            "jc.save(path, params), and read them by jc.load(path)"
        )
    metadata = dict(metadata or {})
    if ARCHITECTURE in metadata:
        raise ValueError(
            f"metadata has an entry {ARCHITECTURE!r}, which is written here from the "
            "model; rename it"
        )
    tree = {"params": params}
    if tokenizer is not None:
        tree["tokenizer"] = np.frombuffer(tokenizer.to_bytes(), np.uint8)
    metadata[ARCHITECTURE] = describe(model)
    checkpoint.save(path, tree, metadata=metadata, coding=coding)


def load_saved(
    path: str | Path, *, scan: bool | None = None, dtype: DType | None = None
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Return model, parameters and tokenizer (or None) from a file of `models.save`.

    `scan=None` keeps the layers as they were saved. `dtype` casts dense floating-point
    arrays; compressed leaves keep theirs. Raises ValueError where the file holds
    parameters only, or an unknown architecture.
    """
    model, file, tokenizer = open_saved(path)
    with file:
        params = jax.tree.map(file.read, file.tree["params"])
    if scan is not None and scan != model.scan:
        params = stack_layers(params) if scan else unstack_layers(params)
        model = model.clone(scan=scan)
    return model, params if dtype is None else cast(params, dtype), tokenizer


def open_saved(
    path: str | Path,
) -> tuple[Transformer, checkpoint.StoredParams, Tokenizer | None]:
    """Return model, open file and tokenizer (or None) from a file of `models.save`.

    Leaves are read when they are asked for; close the file, or use it in a `with`
    statement. Raises as `load_saved`.
    """
    file = checkpoint.open_checkpoint(path)
    try:
        if ARCHITECTURE not in file.metadata:
            raise ValueError(
                f"{path} holds parameters without a model; read them with "
                "jaxcompress.load, or write the file with models.save"
            )
        model = rebuild(file.metadata[ARCHITECTURE])
        tokenizer = None
        if "tokenizer" in file.tree:
            stored = file.read(file.tree["tokenizer"], numpy=True)
            tokenizer = tokenization.from_bytes(stored.tobytes())
    except BaseException:
        file.close()
        raise
    return model, file, tokenizer


def load_reference(
    *, scan: bool | None = None, dtype: DType | None = None
) -> tuple[Transformer, Params, Tokenizer | None]:
    """Return reference model shipped with the package, dense, in float32 by default.

    The stored weights are bfloat16, coded without loss.
    """
    with reference_file() as path:
        model, params, tokenizer = load_saved(path)
    params = cast(materialize(params), jnp.float32 if dtype is None else dtype)
    if scan is not None and scan != model.scan:
        params = stack_layers(params) if scan else unstack_layers(params)
        model = model.clone(scan=scan)
    return model, params, tokenizer


@contextlib.contextmanager
def reference_file() -> Iterator[Path]:
    """Return reference model's file; FileNotFoundError where it was not installed."""
    packed = resources.files("jaxcompress.models") / "data" / "reference.safetensors"
    with resources.as_file(packed) as path:
        if not path.exists():
            raise FileNotFoundError(
                "this installation has no reference model; install the package from "
                "its wheel or repository, with its data files"
            )
        yield path


def saved_shapes(path: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return dense shapes and dtypes of a saved model's parameters; no weight is
    read.
    """
    with checkpoint.open_checkpoint(path) as file:
        described = {name: file.describe(name)[1:] for name in file.names}
    return {
        name.removeprefix("params/"): jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for name, (shape, dtype) in described.items()
        if name.startswith("params/")
    }


def cast(params: Params, dtype: DType) -> Params:
    """Return dense floating-point arrays in another type; compressed leaves as they
    are.
    """

    def one(x):
        keep = isinstance(x, Leaf) or not jnp.issubdtype(x.dtype, jnp.floating)
        return x if keep else x.astype(dtype)

    return jax.tree.map(one, params, is_leaf=is_leaf)


def describe(model: Transformer) -> dict[str, Any]:
    """Return the settings of a model as JSON values; `rebuild` is the inverse."""
    settings = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in _FLAX_FIELDS
    }
    settings["dtype"] = jnp.dtype(model.dtype).name
    return {"type": type(model).__name__, **settings}


def rebuild(description: Mapping[str, Any]) -> Transformer:
    """Return the model that `describe` described.

    Raises ValueError on another type of model and on settings this version lacks.
    """
    settings = dict(description)
    kind = settings.pop("type", None)
    if kind != Transformer.__name__:
        raise ValueError(
            f"the file holds a model of type {kind!r}; known: {Transformer.__name__}"
        )
    fields = {field.name for field in dataclasses.fields(Transformer)}
    if unknown := sorted(set(settings) - fields):
        raise ValueError(
            f"the file's model has settings this version does not know: {unknown}; "
            "update jaxcompress"
        )
    settings["dtype"] = jnp.dtype(settings["dtype"])
    return Transformer(**{key: _tuples(value) for key, value in settings.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value

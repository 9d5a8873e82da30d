"""The leaves of a model under the names that another ecosystem gives them."""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration.lazy_params import source_of
from jaxcompress.models.assembly import Modules, foreign_names, parameter_shapes
from jaxcompress.models.transformer import Transformer
from jaxcompress.tree.leaf import Leaf, dense
from jaxcompress.tree.methods import parse
from jaxcompress.types import DType, Params


class NamedLeaf(NamedTuple):
    """One parameter of the looped model: `name` is ours, `tensor` is theirs."""

    name: str
    tensor: str
    value: Any


class ExportedLeaf(NamedTuple):
    """Record of what was written for one leaf.

    `stored` is the format's name for it, `nbytes` its bytes in the file, and `error`
    the relative error that requantizing added, `|written - leaf| / |leaf|` (Frobenius);
    zero where codes and scales are unchanged.

    Example:
      >>> leaves = jc.export.huggingface("out", model, params)
      >>> sum(leaf.nbytes for leaf in leaves) == jc.nbytes(params)
      True
    """

    name: str
    tensor: str
    stored: str
    nbytes: int
    error: float = 0.0


@contextlib.contextmanager
def named_leaves(
    model: Transformer,
    params: Params,
    modules: Modules,
    *,
    norm_offset: float = 0.0,
    fused: Mapping[str, tuple[int, int]] | None = None,
    check_names: Callable[[Collection[str]], None] = lambda names: None,
) -> Iterator[Iterator[NamedLeaf]]:
    """Iterate over the parameters of a model, one read at a time.

    Args:
      model: looped or scanned; scanned parameters are taken apart layer by layer.
      params: a tree, or an open checkpoint such as `models.open_weights` gives, of
        which one leaf (one stack of layers, where scanned) is in memory at a time.
      modules: their name of each of our modules.
      norm_offset: what their readers add to the scales of norms; the difference is
        given, in the dtype of the embedding.
      fused: for modules that share a tensor, which part of how many of its outputs; the
        tensor is given once, dense, under the name of its last part.
      check_names: is given all names before any leaf is read.

    Raises:
      ValueError: `params` are not those of this model; names a leaf that differs.
    """
    shapes = parameter_shapes(model)
    check_names(list(shapes))
    with source_of(params) as source:
        places = {name: _place(name, model.scan) for name in shapes}
        strange = sorted({place for place, _ in places.values()} ^ set(source.shapes))
        if strange:
            raise ValueError(
                f"params do not belong to this model: {strange[0]} is in one of them "
                "only; pass the model and the parameters that belong together"
            )
        fetch = _keep_last(source.fetch)

        def leaves() -> Iterator[NamedLeaf]:
            waiting: dict[str, dict[int, jax.Array]] = {}
            for name in sorted(places, key=lambda name: places[name][0]):
                place, layer = places[name]
                value = fetch(place)
                if layer is not None:
                    value = jax.tree.map(lambda x, i=layer: x[i], value)
                if tuple(value.shape) != tuple(shapes[name]):
                    raise ValueError(
                        f"{name} has shape {tuple(value.shape)}; the model's settings "
                        f"make it {tuple(shapes[name])}"
                    )
                if norm_offset and name.endswith("norm/scale"):
                    shifted = jnp.asarray(dense(value), jnp.float32) - norm_offset
                    value = shifted.astype(source.shapes["embed/embedding"].dtype)
                tensors = foreign_names(name, shapes[name], modules)
                if len(tensors) > 1:  # one an expert
                    for i, tensor in enumerate(tensors):
                        one = jax.tree.map(lambda x, i=i: x[i], value)
                        yield NamedLeaf(name, tensor, one)
                    continue
                part = (fused or {}).get("/".join(name.split("/")[1:-1]))
                if part is not None:
                    parts = waiting.setdefault(tensors[0], {})
                    parts[part[0]] = dense(value)
                    if len(parts) < part[1]:
                        continue
                    ordered = [parts[i] for i in range(part[1])]
                    value = jnp.concatenate(ordered, axis=-1)
                    del waiting[tensors[0]]
                yield NamedLeaf(name, tensors[0], value)

        yield leaves()


def _place(name: str, scan: bool) -> tuple[str, int | None]:
    match = re.fullmatch(r"layer_(\d+)/(.+)", name)
    if not scan or match is None:
        return name, None
    return f"layers/{match[2]}", int(match[1])


def _keep_last(fetch: Callable[[str], Any]) -> Callable[[str], Any]:
    """Remember the last leaf: layers of one stack are asked for in sequence."""
    last: dict[str, Any] = {}

    def cached(name: str) -> Any:
        if name not in last:
            last.clear()
            last[name] = fetch(name)
        return last[name]

    return cached


def dense_tensor(name: str, value: Any, dtype: DType | None = None) -> np.ndarray:
    """Return the dense array of a leaf in their orientation, contiguous, in `dtype`."""
    array = dense(value)
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(dtype)
    array = np.asarray(array)
    return np.ascontiguousarray(array.T if name.endswith("/kernel") else array)


def is_compressed(value: Any) -> bool:
    """Return whether a leaf represents another array than it was made from."""
    return isinstance(value, Leaf) and not value.lossless


def apply_method(value: Any, method: Any) -> tuple[Any, float]:
    """Return a method applied to the dense array of a leaf, and the relative error it
    adds.

    Raises ValueError on a string that is no method.
    """
    method = parse(method) if isinstance(method, str) else method
    old = dense(value)
    new = method(old)
    old = np.asarray(old, np.float64)
    change = np.linalg.norm(np.asarray(dense(new), np.float64) - old)
    return new, float(change / max(np.linalg.norm(old), np.finfo(np.float64).tiny))

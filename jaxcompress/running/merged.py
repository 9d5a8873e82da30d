"""Layers that read the same inputs, multiplied by as one: `merge_layers`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.coding.packing import Packed
from jaxcompress.quantization.grids import Quantized
from jaxcompress.tree.leaf import Leaf, dense, leaf, static
from jaxcompress.types import Params

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@leaf
class Merged(Leaf):
    """The kernel of the first of several layers that read the same inputs.

    Invariant: `whole` is `[..., inputs, outputs]`, the kernels of the layers `names`
    one after another, each of as many outputs as `sizes` says. The others hold an
    `Elsewhere`. Made for running, not for files.

    Example:
      >>> small = jc.compress(params, "symmetric(bits=8)")
      >>> merged = merge_layers(small)["layer_0"]["mlp"]
      >>> merged["gate_proj"]["kernel"].names
      ('gate_proj', 'up_proj')
    """

    whole: Any
    names: tuple[str, ...] = static()
    sizes: tuple[int, ...] = static()

    weights: ClassVar[tuple[str, ...]] = ("whole",)
    for_files: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.whole.shape[:-1], self.sizes[0])

    @property
    def dtype(self) -> Any:
        return self.whole.dtype

    def materialize(self) -> jax.Array:
        return dense(self.whole)[..., : self.sizes[0]]


@leaf
class Elsewhere(Leaf):
    """A kernel that the `Merged` kernel of a sibling contains; it holds no array.

    Invariant: `of` is the sibling; `sizes` are inputs and outputs.

    Example:
      >>> small = jc.compress(params, "symmetric(bits=8)")
      >>> merged = merge_layers(small)["layer_0"]["mlp"]
      >>> merged["up_proj"]["kernel"].of
      'gate_proj'
    """

    of: str = static()
    sizes: tuple[int, int] = static()
    dtype: np.dtype = static()

    for_files: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def materialize(self) -> jax.Array:
        raise ValueError(
            f"this kernel is part of that of {self.of}, which merge_layers made: run "
            "the model inside jc.compressed_matmul(), or use the tree that was merged"
        )


def merge_layers(
    params: Params, groups: Sequence[Sequence[str]] = GROUPS, *, arrays: bool = False
) -> Params:
    """Merge kernels of sibling layers that read the same inputs, for running.

    Inside `compressed_matmul` an unmodified model then multiplies once for all layers
    of a group, which is faster for few tokens at a time. A group is merged where its
    kernels are quantized alike; all others stay as they are.

        ready = merge_layers(small)

    Args:
      params: compressed, layers looped or stacked; unchanged.
      groups: names of `nn.Dense` layers with one parent and the same inputs, in the
        order in which the model calls them.
      arrays: merge dense kernels too, which copies them.

    Raises:
      ValueError: no group could be merged.

    Example:
      >>> from jaxcompress.running.merged import merge_layers
      >>> ready = merge_layers(jc.compress(params, "symmetric(bits=8)"))
      >>> with jc.compressed_matmul():
      ...     logits = model.apply({"params": ready}, tokens)
    """
    count = 0

    def walk(tree: Any) -> Any:
        nonlocal count
        if not isinstance(tree, dict):
            return tree
        tree = {name: walk(part) for name, part in tree.items()}
        for group in groups:
            kernels = [_kernel(tree.get(name)) for name in group]
            whole = _whole(kernels, arrays)
            if whole is None:
                continue
            count += 1
            sizes = tuple(kernel.shape[-1] for kernel in kernels)
            first = Merged(whole, names=tuple(group), sizes=sizes)
            tree[group[0]] = {**tree[group[0]], "kernel": first}
            for name, kernel in zip(group[1:], kernels[1:], strict=True):
                other = Elsewhere(group[0], kernel.shape[-2:], np.dtype(kernel.dtype))
                tree[name] = {**tree[name], "kernel": other}
        return tree

    merged = walk(params)
    if not count:
        wanted = "; ".join(", ".join(group) for group in groups)
        raise ValueError(
            f"no layers to merge: siblings named {wanted}, with kernels quantized "
            "alike, are wanted; pass groups= of this model, or arrays=True for dense "
            "kernels"
        )
    return merged


def _kernel(layer: Any) -> Any:
    return layer.get("kernel") if isinstance(layer, dict) else None


def _whole(kernels: Sequence[Any], arrays: bool) -> Any:
    """Return the kernels joined along outputs; None where they do not fit together."""
    if any(getattr(x, "ndim", 0) < 2 for x in kernels):
        return None
    if len({(x.shape[:-1], x.dtype, type(x)) for x in kernels}) != 1:
        return None
    if isinstance(kernels[0], Quantized):
        return _joined(kernels) if all(map(_by_output, kernels)) else None
    if arrays and all(isinstance(x, jax.Array) for x in kernels):
        return jnp.concatenate(kernels, axis=-1)
    return None


def _by_output(x: Quantized) -> bool:
    """Return whether each output has arrays of its own."""
    codes = x.codes
    packed = codes.axis == -2 if isinstance(codes, Packed) else _is_array(codes)
    return packed and x.block != "tensor" and _is_array(x.scale)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


def _joined(leaves: Sequence[Any]) -> Any:
    """Return leaves of one structure as one, arrays concatenated along outputs."""
    parts = [jax.tree.flatten(x) for x in leaves]
    if any(treedef != parts[0][1] for _, treedef in parts):
        return None
    arrays = zip(*(arrays for arrays, _ in parts), strict=True)
    joined = [jnp.concatenate(each, axis=-1) for each in arrays]
    return jax.tree.unflatten(parts[0][1], joined)

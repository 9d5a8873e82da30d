"""Dense, DenseGeneral, Einsum and Embed.attend as products with stored weights."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress.running.compressed_matmul.narrow import is_narrow, narrow_product
from jaxcompress.running.compressed_matmul.siblings import merged_product
from jaxcompress.running.merged import Elsewhere, Merged
from jaxcompress.tree.layouts import Product, product
from jaxcompress.tree.leaf import Arithmetic, Leaf, is_box


def stored(module: nn.Module, name: str) -> Any:
    """Return what a module's parameter is stored as; None where there is none."""
    value = module.get_variable("params", name)
    while is_box(value):
        value = value.unbox()
    return value


def bias_of(module: nn.Module) -> jax.Array | None:
    """Return the array of a module's bias; None where there is none."""
    bias = stored(module, "bias") if module.use_bias else None
    return bias.unbox() if isinstance(bias, Leaf) else bias


def overrides(weight: Any, method: str) -> bool:
    """Return whether a leaf type has a way of its own to multiply."""
    return getattr(type(weight), method) is not getattr(Leaf, method)


def multiplies(kernel: Leaf, axes: tuple[int, ...]) -> bool:
    """Return whether a leaf multiplies along these axes by itself, a part at a time."""
    matched = product(kernel, axes)
    return matched is not None and (
        overrides(matched.weight, "contract") or matched.weight.has_tiles
    )


def stored_product(
    kernel: Any, shape: tuple[int, ...], axes: tuple[int, ...]
) -> Product | None:
    """Return the product with a kernel stored as a leaf or in 16 bits.

    None where Flax's own code is to run: the kernel is dense in 32 bits or more, its
    shape is another one (Flax names it), or its leaf type only makes the array.
    """
    if getattr(kernel, "shape", None) != shape:
        return None
    if isinstance(kernel, Leaf):
        return product(kernel, axes) if multiplies(kernel, axes) else None
    return narrow_product(kernel, axes) if is_narrow(kernel) else None


def dense(module: nn.Dense, activations: str, inputs: jax.Array) -> jax.Array | None:
    shape = (inputs.shape[-1], module.features)
    if module.dot_general is not None or module.dot_general_cls is not None:
        return None
    kernel = stored(module, "kernel")
    if isinstance(kernel, Merged | Elsewhere) and kernel.shape == shape:
        how = Arithmetic(module.precision, activations)
        y = merged_product(module, how, inputs, kernel)
        x, _, bias = module.promote_dtype(
            inputs, jnp.zeros((), kernel.dtype), bias_of(module), dtype=module.dtype
        )
        return _biased(y.astype(x.dtype), bias)
    return _affine(module, activations, inputs, shape, (0,))


def dense_general(
    module: nn.DenseGeneral, activations: str, inputs: jax.Array
) -> jax.Array | None:
    if module.dot_general is not None or module.dot_general_cls is not None:
        return None
    if module.batch_dims:
        return None
    axes = sorted(axis % inputs.ndim for axis in _tuple(module.axis))
    last = tuple(range(inputs.ndim - len(axes), inputs.ndim))
    moved = jnp.moveaxis(inputs, axes, last)
    shape = tuple(inputs.shape[axis] for axis in axes) + _tuple(module.features)
    return _affine(module, activations, moved, shape, tuple(range(len(axes))))


def einsum(
    module: nn.Einsum,
    activations: str,
    inputs: jax.Array,
    einsum_str: str | None = None,
) -> jax.Array | None:
    equation = (module.einsum_str or einsum_str or "").replace(" ", "")
    if "->" not in equation or equation.count(",") != 1:
        return None  # Flax says what is wrong
    if getattr(module, "preferred_element_type", None) is not None:
        return None
    operands, result = equation.split("->")
    left, right = operands.split(",")
    if "..." in left and "." not in right:
        named = set(left + right + result)
        free = [c for c in map(chr, range(0x61, 0x7B)) if c not in named]
        count = inputs.ndim - len(left.replace("...", ""))
        if not 0 <= count <= len(free):
            return None
        left, result = (s.replace("...", "".join(free[:count])) for s in (left, result))
    contracted = [c for c in right if c not in result]
    kept = [c for c in left if c not in contracted]
    outputs = [c for c in right if c in result]
    plain = all(len(set(s)) == len(s) and "." not in s for s in (left, right, result))
    if not plain or len(left) != inputs.ndim or not set(contracted) <= set(left):
        return None
    if sorted(kept + outputs) != sorted(result):  # an axis is summed, or is in both
        return None
    moved = inputs.transpose([left.index(c) for c in [*kept, *contracted]])
    axes = tuple(right.index(c) for c in contracted)
    order = [(kept + outputs).index(c) for c in result]
    # The bias has the kernel's axes in the order of the result.
    across = [i for i, c in enumerate(result) if c not in outputs]
    return _affine(
        module, activations, moved, tuple(module.shape), axes, order, tuple(across)
    )


def attend(module: nn.Embed, activations: str, query: jax.Array) -> jax.Array | None:
    table = stored(module, "embedding")
    shape = (module.num_embeddings, query.shape[-1])
    matched = stored_product(table, shape, (1,))
    if matched is None:
        return None
    query, _ = module.promote_dtype(
        query, jnp.zeros((), table.dtype), dtype=module.dtype
    )
    y = matched.multiply(query, Arithmetic(activations=activations))
    return y.astype(query.dtype)


def _affine(
    module: Any,
    activations: str,
    x: jax.Array,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    order: Sequence[int] | None = None,
    across: tuple[int, ...] = (),
) -> jax.Array | None:
    """Return the product along axes of a module's kernel, and its bias.

    `x` is `[..., *axes]`; `order` transposes the result, along whose axes `across` the
    bias repeats, besides all leading ones that it lacks.
    """
    kernel = stored(module, "kernel")
    matched = stored_product(kernel, shape, axes)
    if matched is None:
        return None
    if x.shape[x.ndim - len(axes) :] != tuple(shape[axis] for axis in axes):
        return None
    x, _, bias = module.promote_dtype(
        x, jnp.zeros((), kernel.dtype), bias_of(module), dtype=module.dtype
    )
    how = Arithmetic(module.precision, activations)
    y = matched.multiply(x, how).astype(x.dtype)
    y = y if order is None else y.transpose(order)
    return _biased(y, None if bias is None else jnp.expand_dims(bias, across))


def _biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Add a bias along the last axes of `y`."""
    if bias is None:
        return y
    return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(axes) if isinstance(axes, Sequence) else (axes,)

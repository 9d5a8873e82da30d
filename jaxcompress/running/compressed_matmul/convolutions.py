"""Conv as convolutions with the parts of a stored kernel."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress.running.compressed_matmul.products import bias_of, overrides, stored
from jaxcompress.tree.generic_leaves import Reshaped
from jaxcompress.tree.layouts import product
from jaxcompress.tree.leaf import Arithmetic, Leaf


def convolve(module: nn.Conv, activations: str, inputs: jax.Array) -> jax.Array | None:
    size = module.kernel_size
    size = tuple(size) if isinstance(size, Sequence) else (size,)
    window = (*size, inputs.shape[-1])
    kernel = stored(module, "kernel")
    if module.feature_group_count != 1 or module.mask is not None:
        return None
    if not isinstance(kernel, Leaf) or kernel.shape != (*window, module.features):
        return None
    matched = product(kernel, tuple(range(len(window))))
    if matched is None or not overrides(matched.weight, "convolve"):
        return None
    if matched.inputs != tuple(range(len(window))):
        return None
    x, _, bias = module.promote_dtype(
        inputs, jnp.zeros((), kernel.dtype), bias_of(module), dtype=module.dtype
    )

    def convolution(x: jax.Array, weight: Any, groups: int = 1) -> jax.Array:
        shape = (*size, x.shape[-1] // groups, weight.shape[-1])
        if isinstance(weight, Leaf):
            order = tuple(range(-len(shape), 0))
            weight = Reshaped(weight, sizes=shape, order=order)
        else:
            weight = weight.reshape(shape)
        layer = module.clone(
            parent=None,
            features=shape[-1],
            use_bias=False,
            feature_group_count=groups,
            dtype=x.dtype,
        )
        return layer.apply({"params": {"kernel": weight}}, x)

    how = Arithmetic(module.precision, activations)
    y = matched.weight.convolve(x, convolution, window, how).astype(x.dtype)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

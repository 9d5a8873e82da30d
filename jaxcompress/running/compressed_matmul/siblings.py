"""Dense layers whose kernels `merge_layers` joined: one product serves all of them."""

from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.running.merged import Elsewhere, Merged
from jaxcompress.tree.layouts import product
from jaxcompress.tree.leaf import Arithmetic, Leaf, contract

# Outputs of layers that have not been called yet, with the inputs that they belong to,
# by parent and name; `compressed_matmul` sets an empty dict, per thread.
computed: ContextVar[dict[Any, tuple[jax.Array, jax.Array]] | None] = ContextVar(
    "computed", default=None
)


def merged_product(
    module: nn.Dense, how: Arithmetic, x: jax.Array, kernel: Merged | Elsewhere
) -> jax.Array:
    """Multiply by the kernels of all siblings, or take what a sibling multiplied.

    Args:
      module: the layer, whose kernel is `kernel`.
      how: arithmetic of the product.
      x: `[..., inputs]`, as the layer was given it.

    Returns:
      `[..., features]`, float32 or wider, without the bias.

    Raises:
      ValueError: the layer reads other inputs than the sibling that holds its kernel,
        or is called before it.
    """
    results = computed.get()
    parent, name = module.path[:-1], module.name
    if isinstance(kernel, Elsewhere):
        inputs: Any
        inputs, y = (results or {}).pop((parent, name), (None, None))
        if inputs is not x:
            raise ValueError(
                f"{'/'.join(module.path)} was merged with {kernel.of}, but does not "
                "read the same inputs after it; merge_layers without this group"
            )
        return y
    whole = kernel.whole
    zero = jnp.zeros((), kernel.dtype)
    wide: Any = module.promote_dtype(x, zero, dtype=module.dtype)[0]
    matrix = product(whole, (0,)) if isinstance(whole, Leaf) else None
    y = contract(wide, whole, how) if matrix is None else matrix.multiply(wide, how)
    first, *others = jnp.split(y, np.cumsum(kernel.sizes)[:-1], axis=-1)
    if results is not None:
        for other, part in zip(kernel.names[1:], others, strict=True):
            results[parent, other] = x, part
    return first

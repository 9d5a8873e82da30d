"""Running a Linen model with about one dequantized layer in memory at a time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

from jaxcompress.running.compressed_matmul.products import attend, dense, stored
from jaxcompress.running.interception import instead, mode, running, waiting_weights
from jaxcompress.tree.layouts import product
from jaxcompress.tree.leaf import Leaf
from jaxcompress.tree.products import tiles_pay

# Layers whose weight may be large, and the axis along which they contract it.
LARGE: dict[tuple[type[nn.Module], str], tuple[Callable[..., Any], str, int]] = {
    (nn.Dense, "__call__"): (dense, "kernel", 0),
    (nn.Embed, "attend"): (attend, "embedding", 1),
}


@contextlib.contextmanager
def low_memory() -> Iterator[None]:
    """Keep the peak memory of `model.apply` on compressed parameters low.

    Inside it, every module call makes the stored weights it uses wait for its
    activation, so that XLA cannot dequantize a layer before its input exists, and
    `nn.Embed` reads only the rows it looks up. On CPUs a large quantized weight, such
    as a tied head, is dequantized a tile at a time. The outputs are those of a plain
    `apply`, but for the rounding of sums in such a product. It acts while a function is
    *traced*: enter it inside the jitted function, or around its first call. Subclasses
    of `nn.Embed` are materialized whole.

    ```python
    @jax.jit
    def forward(small, tokens):
        with jc.low_memory():
            return model.apply({"params": small}, tokens)
    ```

    Example:
      >>> small = jc.compress(params, "symmetric(bits=4)")
      >>> with jc.low_memory():
      ...     logits = model.apply({"params": small}, tokens)
    """
    outer = instead.get()
    token = instead.set(_in_tiles if outer is None else outer)
    try:
        with running(mode() or "low_memory"), waiting_weights():
            yield
    finally:
        instead.reset(token)


def _in_tiles(module: nn.Module, method: str, args: Any, kwargs: Any) -> Any:
    """Multiply by a large quantized weight in tiles; None where Flax's code runs."""
    if (type(module), method) not in LARGE:
        return None
    layer, name, axis = LARGE[type(module), method]
    weight = stored(module, name)
    matrix = product(weight, (axis,)) if isinstance(weight, Leaf) else None
    if matrix is None or not matrix.weight.has_tiles:
        return None
    if not tiles_pay(matrix.weight.shape):
        return None
    return layer(module, "float", *args, **kwargs)

"""Running a Linen model whose layers multiply by the parts that leaves store."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import flax.linen as nn

from jaxcompress.running.compressed_matmul.convolutions import convolve
from jaxcompress.running.compressed_matmul.products import (
    attend,
    dense,
    dense_general,
    einsum,
)
from jaxcompress.running.compressed_matmul.siblings import computed
from jaxcompress.running.interception import instead, mode, running, waiting_weights

Activations = Literal["float", "int8", "auto"]

# What replaces a method of a module of exactly this type: `(module, activations,
# ...)` with the arguments of the method; it gives None where Flax's code is to run.
LAYERS: dict[tuple[type[nn.Module], str], Callable[..., Any]] = {
    (nn.Dense, "__call__"): dense,
    (nn.DenseGeneral, "__call__"): dense_general,
    (nn.Einsum, "__call__"): einsum,
    (nn.Conv, "__call__"): convolve,
    (nn.Embed, "attend"): attend,
}


@contextlib.contextmanager
def compressed_matmul(*, activations: Activations = "float") -> Iterator[None]:
    """Make the layers of `model.apply` multiply by the stored parts of compressed
    weights.

    `LowRank`, `CP` and `Tucker` weights are never materialized where multiplying by
    their factors takes fewer operations, a `Sum` multiplies term by term where that
    does, in `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.Conv` and `nn.Embed.attend`
    of unmodified models, attention included; also under `scan`, `remat`, `vmap` and
    differentiation. What has to be dequantized waits for its activation as in
    `low_memory`, which this includes, so that it happens next to the product.

    Results differ from those of a plain `apply` by rounding. Subclasses of these
    layers, layers with a `dot_general` or a mask of their own, batch axes and grouped
    convolutions run as they do without it. It acts while a function is *traced*: enter
    it inside the jitted function, or around its first call.

    ```python
    @jax.jit
    def forward(small, tokens):
        with jc.compressed_matmul():
            return model.apply({"params": small}, tokens)
    ```

    Args:
      activations: "float" multiplies in the layer's own dtype. "int8" rounds the inputs
        of a layer whose codes are integers with one step per output or matrix to 8 bits
        per token, and multiplies integers, summed exactly: a change of the result, by
        about 1 % of each product. "auto" does so only where it was measured to be
        faster. Gradients are those of the float product.

    Raises:
      ValueError: another value of `activations`.

    Example:
      >>> small = jc.compress(params, "svd(rank=8)")
      >>> with jc.compressed_matmul():
      ...     logits = model.apply({"params": small}, tokens)
    """
    if activations not in get_args(Activations):
        raise ValueError(
            "compressed_matmul takes activations="
            f"{', '.join(map(repr, get_args(Activations)))}, not {activations!r}"
        )
    token = instead.set(functools.partial(_product, activations))
    siblings = computed.set({})
    try:
        with running(activations), waiting_weights():
            yield
    finally:
        computed.reset(siblings)
        instead.reset(token)


def surrounding() -> Activations:
    """Return the `activations` of the innermost `fast` around the call, or "float"."""
    how = mode()
    return how if how in get_args(Activations) else "float"


def _product(
    activations: Activations, module: nn.Module, method: str, args: Any, kwargs: Any
) -> Any:
    """Return result of a module's method, or None where Flax's own code is to run."""
    layer = LAYERS.get((type(module), method))
    return layer and layer(module, activations, *args, **kwargs)

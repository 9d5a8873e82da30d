"""Training through what compression rounds: quantization-aware training."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.quantization.awq import Scaled
from jaxcompress.quantization.grids import Quantized
from jaxcompress.training.qat_leaf import FakeQuantized, fake_quantize, quantize
from jaxcompress.tree.compress import Chain, compress
from jaxcompress.tree.generic_leaves import Mixed, Reshaped, Sum
from jaxcompress.tree.layouts import Layout
from jaxcompress.tree.leaf import Leaf, data_fields, dense, is_leaf
from jaxcompress.tree.methods import unwrap
from jaxcompress.types import Params

__all__ = ["convert", "prepare"]

Transform = Callable[[Params], Params]


def prepare(
    recipe: Transform | Any, layouts: Mapping[str, Layout] | None = None
) -> Transform:
    """Prepare parameters for quantization-aware training.

    Each weight that the recipe quantizes becomes a `FakeQuantized` leaf: a float that
    is read as its quantized value. The tree computes what the compressed one computes,
    to the bit, in an unmodified model. Gradients pass the rounding straight through,
    and the scales have those of LSQ. `partition` it, train it in an ordinary loop, then
    `convert` it.

    Adam is blind to the scale of a gradient, so steps move by its learning rate: give
    them one well below their size (1e-4), or `optax.multi_transform`.

    What is not quantized (sparse values, factors, norms) trains by itself. Called
    inside a loss, the grid is made anew from the weights at every step; gradients then
    reach those weights that are in the tree themselves or as quantized ones.

    Args:
      recipe: for `compress`; or a function of parameters that returns compressed ones.
      layouts: as for `compress`; not for a function.

    Returns:
      A function of parameters.

    Raises:
      ValueError: the result has no quantized weight: there is nothing to pass through.

    Example:
      >>> tree = jc.qat.prepare("symmetric(bits=2, block=64)")(params)
      >>> trainable, frozen = jc.partition(tree)
      >>> small = jc.qat.convert(jc.combine(trainable, frozen))

    Source: Bengio et al. 2013 (arXiv 1308.3432); learned steps, Esser et al. 2019
    (arXiv 1902.08153).
    """
    transform = recipe
    if _is_recipe(recipe):
        transform = functools.partial(compress, recipe=recipe, layouts=layouts)

    def apply(params: Params) -> Params:
        small = transform(jax.tree.map(jax.lax.stop_gradient, params))
        tree = jax.tree.map(_trained, params, small, is_leaf=is_leaf)
        nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, FakeQuantized))
        if not any(isinstance(x, FakeQuantized) for x in nodes):
            raise ValueError(
                "qat.prepare found no quantized weight in what the transform "
                "returns; quantize some, or train partition(compress(...)) as it is"
            )
        return tree

    return apply


def convert(params: Params) -> Params:
    """Convert every `FakeQuantized` weight to the `Quantized` leaf it is read as.

    Args:
      params: a tree with leaves of `prepare`, trained.

    Example:
      >>> tree = jc.qat.prepare("symmetric(bits=2)")(params)
      >>> small = jc.qat.convert(tree)
    """
    is_latent = lambda x: isinstance(x, FakeQuantized)  # noqa: E731
    return jax.tree.map(
        lambda x: quantize(x) if is_latent(x) else x, params, is_leaf=is_latent
    )


def _is_recipe(transform: Any) -> bool:
    inner, _ = unwrap(transform)
    listed = isinstance(transform, str | list | tuple | Chain)
    return listed or hasattr(inner, "traits")


def _trained(original: Any, small: Params) -> Any:
    """Return `small` with latent weights of `original`, the array that it replaces, or
    None.
    """
    if not isinstance(small, Leaf):
        return small if original is None else original
    original = None if original is None else dense(original)
    if isinstance(small, Quantized):
        return fake_quantize(small, original)
    originals = {} if original is None else _originals(original, small)
    changed = {}
    for field in data_fields(small):
        part = getattr(small, field)
        if field in small.weights and part is not None:
            whole = originals.get(
                field, jax.tree.map(lambda _: None, part, is_leaf=is_leaf)
            )
            changed[field] = jax.tree.map(
                _trained, whole, part, is_leaf=lambda x: x is None
            )
    return dataclasses.replace(small, **changed)


def _originals(original: jax.Array, small: Leaf) -> dict[str, Any]:
    """Return the array that each weight inside a generic leaf replaces; nothing for
    other leaves.
    """
    if isinstance(small, Reshaped):
        stack, axes = original.ndim - len(small.order), range(-len(small.order), 0)
        if small.stack:
            original = jnp.moveaxis(original, small.stack, range(stack))
        back = [stack + small.order.index(axis) for axis in axes]
        matrix = original.transpose((*range(stack), *back))
        return {"inner": matrix.reshape(small.inner.shape)}
    if isinstance(small, Mixed):
        rows = small.axis == -2
        order = small.order[..., :, None] if rows else small.order[..., None, :]
        order = order.astype(jnp.int32)
        parts = jnp.take_along_axis(original, order, axis=small.axis)
        count = small.kept.shape[small.axis]
        kept, rest = jnp.split(parts, [count], axis=small.axis)
        return {"kept": kept, "rest": rest}
    if isinstance(small, Scaled):
        factors = dense(small.factors).astype(jnp.float32)
        return {"weight": original.astype(jnp.float32) / factors[..., :, None]}
    if isinstance(small, Sum):
        # Only of terms that are quantized; an array among them trains as it is.
        values = [dense(term).astype(jnp.float32) for term in small.terms]
        rest = original.astype(jnp.float32) - sum(values)
        return {
            "terms": tuple(
                rest + value if is_leaf(term) else None
                for term, value in zip(small.terms, values, strict=True)
            )
        }
    return {}

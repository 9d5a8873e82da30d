"""LoRA: trainable thin products added to frozen weights, compressed ones included."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import checks
from jaxcompress.factorization.low_rank import LowRank
from jaxcompress.tree.generic_leaves import Reshaped, Sum
from jaxcompress.tree.leaf import Leaf, dense, is_leaf
from jaxcompress.tree.paths import join, key_name
from jaxcompress.types import DType, Params

# What trains of a tree of `lora`: `where=` of `partition` and `make_train_step`.
ADAPTERS = r".*/terms/1/(left|right)"


def lora(
    params: Params,
    *,
    rank: int,
    where: str = ".*kernel",
    dtype: DType = jnp.float32,
    key: jax.Array,
) -> Params:
    """LoRA: add a trainable product of rank `rank` to each weight that `where` names.

    Each becomes a `Sum` of the weight as it is, codes included, and of a `LowRank`
    whose second factor is zero: the tree computes what `params` does. Only the factors
    are to train, `where=ADAPTERS` says so. On quantized weights this is QLoRA.

    The scale `alpha / rank` of the paper is left to the learning rate: `alpha = rank`.

    Args:
      params: dense or compressed; of a dense weight only a matrix is taken.
      rank: of the products, at least 1.
      where: a pattern that names of weights fully match (`layer_0/mlp/up_proj/kernel`).
      dtype: of the factors.
      key: of the first factors, uniform within `1 / sqrt(inputs)`.

    Raises:
      ValueError: no weight matches, or a dense one is no matrix; names it.

    Example:
      >>> tree = jc.training.lora(small, rank=8, key=key)
      >>> step = jc.make_train_step(loss_fn, optimizer, where=jc.training.ADAPTERS)

    Source: Hu et al. 2021 (arXiv 2106.09685, section 4.1); Dettmers et al. 2023, QLoRA
    (arXiv 2305.14314).
    """
    checks.integer("lora", "rank", rank)
    pattern = re.compile(where)
    matched = 0

    def adapt(path: Any, x: Any) -> Any:
        nonlocal matched
        name = _name(path)
        if not pattern.fullmatch(name) or not hasattr(x, "dtype"):
            return x
        if isinstance(x, Sum):
            raise ValueError(f"{name} is a Sum already; merge() what was trained first")
        inner = x.inner if isinstance(x, Reshaped) else x
        if not isinstance(x, Leaf) and x.ndim != 2:
            raise ValueError(
                f"{name} is dense, of shape {x.shape}, and lora takes matrices there; "
                "compress it with its layout, or leave it out by where="
            )
        matched += 1
        *stack, inputs, outputs = inner.shape
        part = jax.random.fold_in(key, _number(name))
        bound = 1 / np.sqrt(inputs)
        left = jax.random.uniform(part, (*stack, inputs, rank), dtype, -bound, bound)
        product = LowRank(left, jnp.zeros((*stack, rank, outputs), dtype))
        total = Sum((inner, product))
        if isinstance(x, Reshaped):
            return dataclasses.replace(x, inner=total)
        return total

    tree = jax.tree_util.tree_map_with_path(adapt, params, is_leaf=is_leaf)
    if not matched:
        names = [_name(path) for path, _ in _paths(params)]
        raise ValueError(
            f"where={where!r} matches no weight of {', '.join(names[:4])}, ...; it is "
            "matched with whole names"
        )
    return tree


def detach(params: Params) -> dict[str, LowRank]:
    """Return the products that `lora` added, by the names of their weights.

    Args:
      params: with adapters.

    Example:
      >>> tree = jc.training.lora(small, rank=8, key=key)
      >>> jc.save("adapters.safetensors", jc.training.detach(tree))
    """
    return {
        _name(path): _sum(x).terms[1]
        for path, x in _paths(params)
        if _sum(x) is not None
    }


def attach(params: Params, adapters: Mapping[str, LowRank]) -> Params:
    """Return the tree of `lora` again, of its weights and what `detach` returned.

    Args:
      params: the tree without products, as `lora` was given it.
      adapters: products by the names of their weights.

    Raises:
      ValueError: a name is not that of a weight, or its shape is another one.

    Example:
      >>> tree = jc.training.lora(small, rank=8, key=key)
      >>> jc.save("adapters.safetensors", jc.training.detach(tree))
      >>> tree = jc.training.attach(small, jc.load("adapters.safetensors"))
    """
    left = dict(adapters)

    def add(path: Any, x: Any) -> Any:
        name = _name(path)
        if name not in left:
            return x
        product = left.pop(name)
        inner = x.inner if isinstance(x, Reshaped) else x
        if product.shape != inner.shape:
            raise ValueError(
                f"{name}: the product is {product.shape}, the weight {inner.shape}; "
                "they belong to different models"
            )
        total = Sum((inner, product))
        if isinstance(x, Reshaped):
            return dataclasses.replace(x, inner=total)
        return total

    tree = jax.tree_util.tree_map_with_path(add, params, is_leaf=is_leaf)
    if left:
        raise ValueError(f"no weights named {', '.join(sorted(left)[:4])} in the tree")
    return tree


def merge(params: Params) -> Params:
    """Return the tree with each weight and its product as one dense array.

    Compress it again for fewer bytes; the products are then rounded with the weights.

    Args:
      params: with adapters.

    Example:
      >>> tree = jc.training.lora(small, rank=8, key=key)
      >>> small = jc.compress(jc.training.merge(tree), "nf4(block=64)")
    """
    return jax.tree.map(
        lambda x: x if _sum(x) is None else dense(x), params, is_leaf=is_leaf
    )


def _sum(x: Any) -> Sum | None:
    inner = x.inner if isinstance(x, Reshaped) else x
    adapted = isinstance(inner, Sum) and len(inner.terms) == 2
    return inner if adapted and isinstance(inner.terms[1], LowRank) else None


def _paths(params: Params) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)[0]


def _name(path: Any) -> str:
    name = ""
    for step in path:
        name = join(name, key_name(step))
    return name


def _number(name: str) -> int:
    """Return a number of a name, so that draws do not depend on the order of leaves."""
    number = 0
    for byte in name.encode():
        number = (number * 257 + byte) % (2**31 - 1)
    return number

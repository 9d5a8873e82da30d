"""Reasons for which a model cannot take a compressed tree, without computing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.tree.leaf import Leaf, is_leaf, materialize
from jaxcompress.tree.paths import leaf_names
from jaxcompress.types import Params

Function = Callable[[Params, Any], Any]


class PartsChanged(TypeError):
    """A model changed the parts of a leaf before a layer read it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Probe(Leaf):
    """A leaf whose floats are booleans until a layer reads it.

    Arithmetic over the tree makes numbers of booleans, so that it shows even in factors
    that are floats. `dtypes` are those of the arrays of `inner`, in order.
    """

    inner: Leaf
    dtypes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})

    @property
    def stack(self) -> Any:
        return getattr(self.inner, "stack", ())

    def materialize(self) -> jax.Array:
        parts, treedef = jax.tree.flatten(self.inner)
        parts = [
            _restored(x, dtype, self)
            for x, dtype in zip(parts, self.dtypes, strict=True)
        ]
        return jax.tree.unflatten(treedef, parts).materialize()

    def add_axis(self, index: int, params: dict) -> Leaf:
        return dataclasses.replace(self, inner=self.inner.add_axis(index, params))

    def remove_axis(self, index: int, params: dict) -> Leaf:
        return dataclasses.replace(self, inner=self.inner.remove_axis(index, params))


def _restored(x: Any, dtype: str, probe: Probe) -> Any:
    """Return a part with its own dtype; raise PartsChanged where it is a number now."""
    wanted = jnp.dtype(dtype)
    stored = bool if jnp.issubdtype(wanted, jnp.inexact) else wanted
    if getattr(x, "dtype", stored) != stored:
        raise PartsChanged(
            f"{probe.name}: the model changes its parameters as a tree before its "
            "layers read them (nn.map_variables, an average, a cast), and reaches the "
            f"parts of a {type(probe.inner).__name__}. Keep this leaf with a rule "
            "(pattern, None), or pass materialize(small)"
        )
    return x.astype(wanted) if hasattr(x, "astype") else x


def find_refusal(function: Function, small: Params, batch: Any) -> str:
    """Return why a model cannot take a compressed tree; empty where it can.

    Args:
      function: of parameters and a batch.
      small: pytree of arrays and leaves; shapes are enough.
      batch: what the function takes.

    Raises:
      Exception: whatever the model raises of the dense tree too.
    """
    small = jax.eval_shape(lambda x: x, small)
    leaves, treedef = jax.tree.flatten(small, is_leaf=is_leaf)
    try:
        jax.eval_shape(function, small, batch)
    except Exception as error:
        failure = error
    else:
        return _changed_parts(function, small, batch)
    dense = jax.eval_shape(materialize, small)
    jax.eval_shape(function, dense, batch)  # if this fails, it is not the leaves
    arrays = jax.tree.leaves(dense)
    names = leaf_names(dense)
    for number, leaf in enumerate(leaves):
        if not is_leaf(leaf):
            continue
        one = [*arrays[:number], leaf, *arrays[number + 1 :]]
        try:
            jax.eval_shape(function, jax.tree.unflatten(treedef, one), batch)
        except Exception as error:
            advice = "Keep"
            if "__jax_array__" in str(error):
                advice = "Pass jnp.asarray(weight) to jax.lax, or keep"
            return (
                f"{names[number]}: the model cannot take a {type(leaf).__name__} "
                f"there: {error}. {advice} this leaf with a rule (pattern, None), or "
                "pass materialize(small)"
            )
    return f"the model cannot take these leaves together: {failure}"


def _changed_parts(function: Function, small: Params, batch: Any) -> str:
    """Return which leaf's parts a model changes; empty where it changes none."""
    leaves, treedef = jax.tree.flatten(small, is_leaf=is_leaf)
    names = leaf_names(jax.eval_shape(materialize, small))
    probes = [
        _probe(leaf, name) if is_leaf(leaf) else leaf
        for leaf, name in zip(leaves, names, strict=True)
    ]
    try:
        jax.eval_shape(function, jax.tree.unflatten(treedef, probes), batch)
    except PartsChanged as error:
        return str(error)
    except Exception:  # booleans are refused where floats are not: it says nothing
        return ""
    return ""


def _probe(leaf: Leaf, name: str) -> Probe:
    parts, treedef = jax.tree.flatten(leaf)
    dtypes = tuple(str(x.dtype) for x in parts)
    marked = [
        jax.ShapeDtypeStruct(x.shape, bool)
        if jnp.issubdtype(x.dtype, jnp.inexact)
        else x
        for x in parts
    ]
    return Probe(jax.tree.unflatten(treedef, marked), dtypes, name)

"""Running an unmodified NNX model on compressed parameters.

Import it as `from jaxcompress.running import nnx`; the package itself does not, so that
only those who use NNX pay for it:

    params = nnx.params_of(module)
    ready = nnx.with_params(module, jc.compress(params, "symmetric(bits=8)"))
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcompress.tracing.modules_nnx import (
    CompressedParam,
    params_of,
    store,
    stored,
    with_params,
)

__all__ = [
    "CompressedParam",
    "Optimizer",
    "params_of",
    "stored",
    "trainable",
    "with_params",
]


def trainable(path: Any, value: Any) -> bool:
    """Select the `Param`s that can be trained, as a filter of NNX.

    Those whose stored parts are all floating point: dense arrays, LoRA and factors.
    Quantized weights have integer codes, of which `nnx.grad` takes no gradient.

    Args:
      path: of the variable, which does not matter.
      value: a variable of a module, or of a state.

    Example:
      >>> of = flax_nnx.DiffState(0, nnx.trainable)
      >>> gradients = flax_nnx.grad(loss, argnums=of)(module)
    """
    del path
    if not isinstance(value, nnx.Param):
        return False
    parts = jax.tree.leaves(stored(value))
    return all(jnp.issubdtype(x.dtype, jnp.inexact) for x in parts)


class Optimizer(nnx.Optimizer):
    """An `nnx.Optimizer` of modules whose parameters are factors.

    Flax's own has dense moments of the factors, which do not fit these. It serves where
    every trained parameter is a dense array.

    Args:
      model: an NNX module, as `with_params` makes it.
      tx: an Optax transformation.
      wrt: filter of the variables to train, as in `nnx.DiffState`.

    Example:
      >>> module = nnx.with_params(module, jc.compress(params, "svd(rank=16)"))
      >>> optimizer = nnx.Optimizer(module, optax.adam(1e-3))
      >>> optimizer.update(module, gradients)
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: Any,
        *,
        wrt: Any = trainable,
    ):
        super().__init__(model, tx, wrt=wrt)
        self._set(tx.init(nnx.state(model, wrt)))

    def update(self, model: nnx.Module, grads: Any, /, **kwargs: Any) -> Any:
        """Update the moments and the parameters; return what was added to these.

        Args:
          model: the module that the optimizer was made for.
          grads: what `nnx.grad` returns for the same filter.
          **kwargs: for `tx.update`.

        Returns:
          The updates, a state of arrays and leaves.
        """
        state = nnx.state(model, self.wrt)
        params, slopes = _values(state), _values(grads)
        updates, moments = self.tx.update(
            slopes, _values(self.opt_state), params, **kwargs
        )
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        replaced = jax.tree.map(
            lambda variable, x: variable.replace(x), state, params, is_leaf=_is_variable
        )
        nnx.update(model, replaced)
        self._set(moments)
        self.step[...] = self.step[...] + 1
        return updates

    def _set(self, moments: Any) -> None:
        """Let the variables of the state hold these arrays, leaves or variables."""
        held, treedef = jax.tree.flatten(self.opt_state, is_leaf=_is_variable)
        for variable, x in zip(held, treedef.flatten_up_to(moments), strict=True):
            store(variable, stored(x) if _is_variable(x) else x)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _values(tree: Any) -> Any:
    """Return the tree with what its variables hold in place of them."""
    held = lambda x: stored(x) if _is_variable(x) else x  # noqa: E731
    return jax.tree.map(held, tree, is_leaf=_is_variable)

"""Interception of layers: stored weights wait for the activation that they multiply."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jax.core import Tracer

from jaxcompress.tree.leaf import Leaf, before_use

# `(module, method, args, kwargs)` to the result of that method, or to None where Flax's
# own code is to run; `low_memory` and `compressed_matmul` set it, per thread.
instead: ContextVar[Callable[..., Any] | None] = ContextVar("instead", default=None)
_mode: ContextVar[str | None] = ContextVar("mode", default=None)


def mode() -> str | None:
    """Return how layers run: activations of `compressed_matmul`, "low_memory" or None.

    It decides what a traced function computes, so a cache of compiled functions has it
    in its key.
    """
    return _mode.get()


@contextlib.contextmanager
def running(how: str) -> Iterator[None]:
    """Set `mode()`."""
    token = _mode.set(how)
    try:
        yield
    finally:
        _mode.reset(token)


@contextlib.contextmanager
def waiting_weights() -> Iterator[None]:
    """Make stored weights that a module uses wait for the activation it is given."""
    with nn.intercept_methods(_stream):
        yield


def _stream(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: InterceptorContext,
) -> Any:
    activation = _traced_array((args, kwargs))
    module, method, replace = context.module, context.method_name, instead.get()
    if method == "setup":
        return call(*args, **kwargs)
    with _waiting_for(activation):
        result = replace and replace(module, method, args, kwargs)
    if result is None and activation is not None and type(module) is nn.Embed:
        result = _embed(module, method, activation)
    if result is not None:
        return result
    with _waiting_for(activation):
        return call(*args, **kwargs)


@contextlib.contextmanager
def _waiting_for(activation: jax.Array | None) -> Iterator[None]:
    """Return stored weights used inside wait for the activation, if there is one."""
    if activation is None:
        yield
        return
    token = before_use.set(functools.partial(_after, activation))
    try:
        yield
    finally:
        before_use.reset(token)


def _traced_array(tree: Any) -> jax.Array | None:
    """Return the first array of real numbers under trace: what the call waits for."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, Tracer) and x.size and jnp.isrealobj(x):
            return x
    return None


def _after(activation: jax.Array, stored: Leaf) -> Leaf:
    """Return the same leaf, bit for bit, not available before the activation is.

    A barrier on both says so. XLA for CPUs did not order its work by barriers up to
    jax 0.10 (it does in 0.12), so there the stored arrays really depend on a zero that
    the compiler cannot know.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier((activation, stored))[1]
    zero = _zero_after(jax.lax.stop_gradient(activation))

    def wait(x: jax.Array) -> jax.Array:
        if x.dtype in (jnp.bfloat16, jnp.float16):
            return _held(x, zero)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return x * (1 + zero).astype(x.dtype)
        return x ^ zero.astype(x.dtype)

    return jax.tree.map(wait, stored)


@jax.custom_jvp
def _held(x: jax.Array, zero: jax.Array) -> jax.Array:
    """Hold 16-bit numbers back until the zero is available; the derivative is that of
    `x`.

    CPUs multiply them as float32 and round again, which costs more than a product.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16) ^ zero.astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@_held.defjvp
def _held_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    return _held(*primals), tangents[0]


@jax.custom_batching.custom_vmap
def _zero_after(activation: jax.Array) -> jax.Array:
    first = activation[(0,) * activation.ndim].astype(jnp.int32)
    return first & jax.lax.optimization_barrier(jnp.int32(0))


@_zero_after.def_vmap
def _zero_after_all(
    size: int, batched: list[bool], activation: jax.Array
) -> tuple[jax.Array, bool]:
    """Return one zero for all examples: the weights they share must not be batched."""
    del size
    return _zero_after(activation[0] if batched[0] else activation), False


def _embed(embed: nn.Embed, method: str, x: jax.Array) -> jax.Array | None:
    """Compute `embed.<method>(x)` from a stored table; None where Flax's own code is to
    run.
    """
    table = embed.get_variable("params", "embedding")
    if not isinstance(table, Leaf) or embed.num_embeddings == 1:
        return None
    if method == "attend":
        weights = _after(x, table).materialize()
        x, weights = embed.promote_dtype(x, weights, dtype=embed.dtype)
        return jnp.dot(x, weights.T)
    if method != "__call__" or not jnp.issubdtype(x.dtype, jnp.integer):
        return None
    # Flax gives NaN for a token outside the table; a gather of codes would hide it.
    inside = jnp.take(jnp.ones(embed.num_embeddings, bool), x, fill_value=False)
    rows = jnp.where(inside[..., None], table.take_rows(x), jnp.nan)
    return embed.promote_dtype(rows, dtype=embed.dtype, inexact=False)[0]

"""Factors that fit nothing, in the place of any weight, and what tests ask of them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small_random(*shape, seed):
    return jnp.asarray(random(*shape, seed=seed) / np.sqrt(shape[-1]))


# Methods that fit nothing: leaves of random factors, in the place of any weight.


def thin(rank):
    def method(x, moments=None):
        *stack, inputs, outputs = x.shape
        left = small_random(*stack, inputs, rank, seed=1)
        return jc.LowRank(left, small_random(*stack, rank, outputs, seed=2))

    return method


def split(sizes, inputs):
    """How many axes multiply to the inputs."""
    return next(i for i in range(len(sizes)) if np.prod(sizes[:i]) == inputs)


def terms(rank, sizes):
    def method(x, moments=None):
        factors = (small_random(n, rank, seed=i) for i, n in enumerate(sizes))
        return jc.CP(tuple(factors), split(sizes, x.shape[0]))

    return method


def core(ranks, sizes):
    def method(x, moments=None):
        factors = tuple(
            None if rank is None else small_random(size, rank, seed=i)
            for i, (rank, size) in enumerate(zip(ranks, sizes, strict=True))
        )
        kept = (r or n for r, n in zip(ranks, sizes, strict=True))
        return jc.Tucker(small_random(*kept, seed=9), factors, split(sizes, x.shape[0]))

    return method


FACTORS = [
    (".*(query|key|value)/kernel", core((6, None, 4), (16, 2, 8))),
    (".*out/kernel", terms(4, (2, 8, 16))),
    (".*split/kernel", terms(4, (16, 2, 8))),
    (".*join/kernel", core((1, 4, 6), (2, 8, 16))),
    (".*(kernel|embedding)", thin(4)),
]


def with_biases(params):
    """Biases as they are after training: not zero."""

    def change(path, x):
        is_bias = getattr(path[-1], "key", None) == "bias"
        return x + random(*x.shape, seed=len(path)) if is_bias else x

    return jax.tree_util.tree_map_with_path(change, params)


def applied(model, context=contextlib.nullcontext, **options):
    """`model.apply` of parameters, jitted anew."""

    @jax.jit
    def apply(params, x):
        with context(**options):
            return model.apply({"params": params}, x)

    return apply


def flops(function, *arguments):
    return function.lower(*arguments).compile().cost_analysis()["flops"]


def shapes_in(function, *arguments):
    """Shapes of all arrays that the program makes, inner programs included."""
    found = set()

    def read(jaxpr):
        for eqn in jaxpr.eqns:
            found.update(v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape"))
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    read(inner)

    read(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


materialize = jax.jit(jc.materialize)

"""The methods under the laws: one line each, and the model and data they are tried on.

A method of the table joins every law of `test_laws.py`. Those of `DATA` get the moments
of the model's own inputs, under which they owe two laws more.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.tree.methods import parse, traits

# Stages of a chain are separated by ">".
WITHOUT_DATA = [
    "symmetric(bits=4, block=16)",
    "symmetric(bits=2, block=25, full_range=True, search=True)",
    "symmetric(bits=1, block='tensor')",
    "asymmetric(bits=3, block=25)",
    "sign_split(bits=(3, 3))",
    "learned(bits=3, block=16, steps=10)",
    "hqq(bits=3, block=25, steps=3)",
    "nf4(block=16)",
    "fp8(kind='e5m2')",
    "mxfp4(search=True)",
    "nvfp4()",
    "mixed_channels(bits=3, channels=4, fine_bits=8, block=16)",
    "sign_split(bits=(3, 3)) > entropy_code()",
    "rate_distortion(rate=3, states=8)",
    "rate_distortion(rate=3, states=0, order='natural')",
    "outliers(fraction=0.02)",
    "svd(rank=40)",
    "corrected(base='symmetric(bits=3, block=16)', rank=8)",
    "tucker(ranks=(48, 8, 10), sizes=(64, 8, 12), sweeps=2)",
    "magnitude(nm='2:4')",
    "magnitude(threshold=0.02)",
    "magnitude(sparsity=0.25) > symmetric(bits=4, block=16) > entropy_code()",
    "code_floats()",
    "asymmetric(bits=3, block=16) > entropy_code() > code_floats()",
]
DATA = [
    "gptq(bits=3, block=16) | moments",
    "awq(bits=3, block=16, candidates=4) | moments",
    "learned(bits=3, block=32, steps=5) | moments",
    "mixed_channels(bits=3, channels=8, score='second_order', axis='outputs')"
    " | moments",
    "rate_distortion(rate=3, states=0) | moments",
    "wanda(sparsity=0.5) | moments",
    "sparsegpt(sparsity=0.5) | moments",
    "alps(sparsity=0.5) | moments",
    "outliers(fraction=0.05, score='activation') | moments",
    "svd(rank=40) | moments",
    "cp(rank=64, sizes=(64, 8, 12), sweeps=2) | moments",
    "tucker(ranks=(48, 8, 10), sizes=(64, 8, 12), sweeps=2) | moments",
    "corrected(base='gptq(bits=3, block=16)', rank=8) | moments",
]
METHODS = WITHOUT_DATA + DATA
# Quick ones of every room: the fast part of the tests; the others are marked slow.
QUICK = {
    "symmetric(bits=4, block=16)",
    "asymmetric(bits=3, block=25)",
    "fp8(kind='e5m2')",
    "sign_split(bits=(3, 3)) > entropy_code()",
    "svd(rank=40)",
    "magnitude(nm='2:4')",
    "magnitude(sparsity=0.25) > symmetric(bits=4, block=16) > entropy_code()",
    "code_floats()",
    "gptq(bits=3, block=16) | moments",
    "wanda(sparsity=0.5) | moments",
}
# An error moves on from row to row: another tie changes all that follows it.
SEQUENTIAL = ("gptq", "sparsegpt", "alps", "rate_distortion", "learned", "corrected")
# Those that choose among the weights as they are: drift moves no target of theirs.
CHOOSING = ("mixed_channels", "wanda", "sparsegpt", "alps")


def stages(method):
    """The stages of a chain, in order, without the mark of moments."""
    return [stage.strip() for stage in method.split("|")[0].split(">")]


def is_traceable(method):
    return all(traits(parse(stage)).traceable for stage in stages(method))


def each_of(methods):
    return pytest.mark.parametrize(
        "method",
        [
            method if method in QUICK else pytest.param(method, marks=pytest.mark.slow)
            for method in methods
        ],
    )


TRACEABLE = [method for method in METHODS if is_traceable(method)]
every = each_of(METHODS)
traceable = each_of(TRACEABLE)
driven_by_data = each_of(DATA)

FEATURES, HIDDEN, LAYERS = 64, 96, 2
TOKENS = jnp.arange(10).reshape(2, 5) * 9
STACK = jc.Layout((0,), (1,), (2,))
SCANNED = {"layers/up/kernel": STACK}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + y[..., :FEATURES] * y[..., -FEATURES:], None


class Model(nn.Module):
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(HIDDEN, FEATURES, name="embed")
        x = embed(tokens)
        if self.scanned:
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = layers(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = Layer(name=f"layer_{i}")(x)
        return embed.attend(x)


@functools.cache
def parameters(scanned=False, dtype="float32"):
    """NumPy arrays, so that a method that writes into its input is seen."""
    params = jax.jit(Model(scanned).init)(jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda x: np.array(x.astype(dtype)), params)


@functools.cache
def all_moments(scanned=False):
    """Of 640 random tokens: more than the inputs have directions."""
    tokens = jax.random.randint(jax.random.key(1), (16, 40), 0, HIDDEN)
    return jc.collect_moments(Model(scanned), parameters(scanned), [tokens])


def moments_for(method, scanned=False):
    """None for a method of the first list."""
    return all_moments(scanned) if method.endswith("| moments") else None


def apply(method, params, scanned=False, moments=None):
    recipe = jc.chain(*stages(method))
    known = moments or moments_for(method, scanned)
    layouts = SCANNED if scanned else None
    return jc.compress(params, recipe, known, layouts=layouts)


@functools.cache
def compressed(method, scanned=False, dtype="float32"):
    return apply(method, parameters(scanned, dtype), scanned)

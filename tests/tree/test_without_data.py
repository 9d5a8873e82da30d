"""One method for a model whose embedding is only looked up."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

ROWS, WIDTH = 96, 64
RNG = np.random.default_rng(4)
TABLE = jnp.asarray(RNG.normal(size=(ROWS, WIDTH)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(WIDTH, 96)), jnp.float32)
PARAMS = {"embed": {"embedding": TABLE}, "head": {"kernel": HEAD}}
TOKENS = jnp.asarray(RNG.integers(0, ROWS, (8, 40)))


def model(params, tokens):
    return params["embed"]["embedding"][tokens] @ params["head"]["kernel"]


@functools.cache
def known():
    return jc.collect_moments(model, PARAMS, [TOKENS])


@pytest.mark.parametrize(
    ("recipe", "plain"),
    [
        ("gptq(bits=4, block=32)", "symmetric(bits=4, block=32, search=True)"),
        ("gptq(bits=4, search=False, grid='asymmetric')", "asymmetric(bits=4)"),
        ("gptq(grid='nf4', block=32)", "nf4(block=32, search=True)"),
        ("awq(bits=3, block=32)", "asymmetric(bits=3, block=32, search=True)"),
        ("learned(bits=3, steps=3)", "learned(bits=3, steps=3, objective='weights')"),
        ("mixed_channels(bits=3, channels=4)", None),
        ("wanda(sparsity=0.5)", "magnitude(sparsity=0.5, scope='row')"),
        ("sparsegpt(sparsity=0.5)", "magnitude(sparsity=0.5)"),
        ("alps(nm='2:4')", "magnitude(nm='2:4')"),
        ("outliers(fraction=0.05)", "outliers(fraction=0.05, score='weight')"),
        ("corrected(base='gptq(bits=3)', rank=4)", None),
        ("rate_distortion(rate=3, states=0)", "rate_distortion(rate=3, states=0)"),
        ("svd(rank=8)", "svd(rank=8)"),
    ],
)
def test_one_method_for_a_model_whose_embedding_is_only_looked_up(recipe, plain):
    assert known()["embed/embedding"].looked_up
    rows = []
    small = jc.compress(PARAMS, recipe, known(), record=rows)
    row = {r.name: r for r in rows}
    assert row["head/kernel"].reason == ""
    assert row["head/kernel"].method.startswith(recipe.split("(")[0])
    told = row["embed/embedding"]
    if recipe == plain:
        assert told.reason == ""
        return
    name = recipe.split("(")[0]
    assert told.reason.startswith(f"only looked up, no inputs that {name}(")
    assert told.reason.endswith(told.method)
    if plain is not None:
        alone = jc.compress({"embed": PARAMS["embed"]}, plain)
        np.testing.assert_array_equal(
            jc.materialize(small)["embed"]["embedding"],
            jc.materialize(alone)["embed"]["embedding"],
        )
    # Told to, by a rule of its own, it says what it misses.
    if name != "learned":
        return
    with pytest.raises(ValueError, match="embed/embedding: learned needs"):
        jc.compress(PARAMS, [("embed.*", recipe)], known())


def test_block_by_block_too():
    rows = []
    small = jc.compress_blockwise(
        lambda p, x: model(p["block_0"], x),
        {"block_0": PARAMS},
        "gptq(bits=4, block=32)",
        [TOKENS],
        record=rows,
    )
    row = {r.name: r for r in rows}["block_0/embed/embedding"]
    assert row.method.startswith("symmetric(bits=4") and "looked up" in row.reason
    assert isinstance(small["block_0"]["head"]["kernel"], jc.Quantized)

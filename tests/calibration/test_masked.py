"""What follows pruning keeps its moments, against float64 oracles per output."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.calibration.masked import fill, gather
from jaxcompress.quantization.grids import spread

INPUTS, OUTPUTS, BLOCK, BITS = 48, 40, 8, 3
LOW, HIGH = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
CODES = (".*/values", f"gptq(bits={BITS}, block={BLOCK})")
PRUNINGS = ["magnitude(threshold=0.6)", "wanda(sparsity=0.5)", "sparsegpt(nm='2:4')"]


def correlated(seed, inputs=INPUTS):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((inputs, inputs)))
    scales = np.exp(rng.standard_normal(inputs) / 2)
    middle = (basis * np.exp(np.linspace(0, -5, inputs))) @ basis.T
    return (scales[:, None] * middle * scales).astype(np.float32)


@pytest.fixture(scope="module")
def case():
    """Two layers in a stack, and the moments of their inputs."""
    x = np.random.default_rng(1).standard_normal((2, INPUTS, OUTPUTS))
    second = jnp.stack([correlated(0), correlated(1)])
    layout = jc.Layout(stack=(), inputs=(-2,), outputs=(-1,))
    moments = dataclasses.replace(jc.moments_from_covariance(second), layout=layout)
    return {"kernel": jnp.asarray(x, jnp.float32)}, {"kernel": moments}


def loss(x, leaf, second):
    change = np.asarray(leaf.materialize(), np.float64) - np.asarray(x, np.float64)
    return float(np.sum(change * (np.asarray(second, np.float64) @ change)))


def restricted(x, mask, steps, second):
    """GPTQ of each output alone, on the moments of the inputs that it keeps."""
    second = second + 0.01 * np.mean(np.diag(second)) * np.eye(INPUTS)
    out = np.zeros_like(x)
    for o in range(OUTPUTS):
        kept = np.flatnonzero(mask[:, o])
        kept = kept[np.argsort(-np.diag(second)[kept], kind="stable")]
        row = x[kept, o].copy()
        inverse = np.linalg.inv(second[np.ix_(kept, kept)])
        factor = np.linalg.cholesky(inverse).T
        for i, j in enumerate(kept):
            out[j, o] = np.clip(np.round(row[i] / steps[j, o]), LOW, HIGH) * steps[j, o]
            row[i:] -= (row[i] - out[j, o]) / factor[i, i] * factor[i, i:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("prune", PRUNINGS)
def test_codes_after_a_mask_are_as_good_as_of_each_output_alone(case, prune):
    params, moments = case
    second = np.asarray(moments["kernel"].second, np.float64)
    pruned = jc.compress(params, [("kernel", prune)], moments)["kernel"]
    x, mask = pruned.materialize(), np.asarray(pruned.kept)
    leaf = jc.compress({"kernel": pruned}, [CODES], moments)["kernel"]
    blind = jc.compress({"kernel": pruned}, [CODES_WITHOUT_DATA])["kernel"]
    assert (np.asarray(leaf.materialize())[~mask] == 0).all()
    inner = leaf.values
    steps = spread(inner.steps, BLOCK, inner.shape[-2]).scale
    steps = np.asarray(fill(jnp.broadcast_to(steps, inner.shape), leaf.kept))
    alone = np.stack(
        [
            restricted(*map(np.float64, (x[i], mask[i], steps[i], second[i])))
            for i in (0, 1)
        ]
    )
    change = alone - np.asarray(x, np.float64)
    wanted = float(np.sum(change * (second @ change)))
    reached = loss(x, leaf, second)
    assert reached < 1.08 * wanted
    assert reached < 0.8 * loss(x, blind, second)


CODES_WITHOUT_DATA = (CODES[0], f"symmetric(bits={BITS}, block={BLOCK}, search=True)")


@pytest.mark.slow
def test_pruning_and_codes_lose_about_the_sum_of_their_parts(case):
    params, moments = case
    second = moments["kernel"].second
    losses = [
        loss(params["kernel"], jc.compress(params, recipe, moments)["kernel"], second)
        for recipe in (
            [("kernel", "alps(sparsity=0.5)")],
            [("kernel", CODES[1])],
            jc.chain([("kernel", "alps(sparsity=0.5)")], [CODES]),
        )
    ]
    assert losses[2] < 1.35 * (losses[0] + losses[1])


@pytest.mark.nightly
def test_rates_after_a_mask_need_no_mask(tmp_path):
    x = np.random.default_rng(2).standard_normal((96, 128))
    params = {"kernel": jnp.asarray(x, jnp.float32)}
    second = correlated(0, 96)
    moments = {"kernel": jc.moments_from_covariance(jnp.asarray(second))}
    pruned = jc.compress(params, [("kernel", "wanda(sparsity=0.5)")], moments)
    x, mask = pruned["kernel"].materialize(), pruned["kernel"].kept
    rules = [
        [(".*/values", f"rate_distortion(rate={rate}, states=0)")] for rate in (3.8, 2)
    ]
    leaf = jc.compress(pruned, rules[0], moments)["kernel"]
    assert leaf.mask is None and leaf.shape == x.shape
    assert (leaf.materialize()[~mask] == 0).all()
    assert ((leaf.kept <= mask) & (jc.masks.of({"k": leaf})["k"] == leaf.kept)).all()
    blind = jc.compress(pruned, rules[1])["kernel"]
    sizes = []
    for each in (leaf, blind):
        jc.save(tmp_path / "leaf", {"kernel": each})
        again = jc.load(tmp_path / "leaf")["kernel"]
        assert (again.materialize() == each.materialize()).all()
        sizes.append(os.path.getsize(tmp_path / "leaf"))
    assert sizes[0] < sizes[1]
    assert loss(x, leaf, second) < 0.3 * loss(x, blind, second)


@pytest.mark.slow
def test_layers_of_a_stack_are_coded_one_by_one(case):
    params, moments = case
    recipe = jc.chain([("kernel", "wanda(sparsity=0.5)")], [CODES])
    whole = jc.compress(params, recipe, moments)["kernel"].materialize()
    one = jax.tree.map(lambda x: x[1], (params, moments))
    assert (jc.compress(one[0], recipe, one[1])["kernel"] == whole[1]).all()


def test_what_a_mask_keeps_is_put_back():
    x = jnp.arange(1.0, 25).reshape(2, 3, 4)
    mask = jnp.asarray(np.random.default_rng(0).random((2, 3, 4)) < 0.5)
    kept = int(mask.sum(axis=(1, 2)).max())
    values = gather(x, mask, (2, kept, 1))
    assert (values[0, : mask[0].sum(), 0] == x[0].T[mask[0].T]).all()
    assert (fill(values, mask) == jnp.where(mask, x, 0)).all()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("awq(bits=4, block=8)", "gptq and rate_distortion can"),
        ("rate_distortion(rate=3)", "states=0 after pruning"),
    ],
)
def test_errors_say_what_follows_pruning(case, method, message):
    params, moments = case
    recipe = jc.chain([("kernel", "wanda(sparsity=0.5)")], [(".*/values", method)])
    with pytest.raises(ValueError, match=message):
        jc.compress(params, recipe, moments)

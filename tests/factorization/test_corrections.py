"""Coarse codes and a thin product that makes up for them."""

import jax
import numpy as np
import pytest
from matrices_for_tests import (
    INPUTS,
    MATRIX,
    OUTPUTS,
    RANK,
    correlated,
    drifted_moments,
    moments_of,
    output_loss,
    random,
    squared,
    wide,
)

import jaxcompress as jc
from jaxcompress.factorization import corrected

BASE = "symmetric(bits=3, block=8)"


def test_a_correction_is_the_best_of_its_rank():
    x, rows = random(INPUTS, OUTPUTS), correlated(INPUTS)
    moments = moments_of(rows)
    leaf = corrected(x, moments, base=BASE, rank=RANK, damping=0.0)
    coarse, thin = leaf.terms
    np.testing.assert_array_equal(wide(coarse), wide(jc.symmetric(x, bits=3, block=8)))
    # The symmetric root, as the paper has it.
    values, vectors = np.linalg.eigh(np.asarray(moments.second, np.float64))
    root = (vectors * np.sqrt(values)) @ vectors.T
    u, sizes, vt = np.linalg.svd(root @ (x - wide(coarse)), full_matrices=False)
    best = np.linalg.solve(root, (u[:, :RANK] * sizes[:RANK]) @ vt[:RANK])
    np.testing.assert_allclose(wide(thin), best, atol=1e-5)
    lost = np.sum(sizes[RANK:] ** 2)
    loss = output_loss(x, leaf, rows)
    assert abs(loss - lost) < 1e-5 * lost
    assert loss < 0.5 * output_loss(x, coarse, rows)
    plain = corrected(x, moments, base=BASE, rank=RANK, weighted=False)
    assert squared(x, plain) < squared(x, leaf) < squared(x, coarse)
    assert loss < 0.8 * output_loss(x, plain, rows)


def test_a_correction_aims_at_the_original_outputs():
    x, rows = random(INPUTS, OUTPUTS), correlated(INPUTS)
    drifted = rows + 0.3 * rows.std() * random(*rows.shape, seed=5)
    moments = drifted_moments(rows, drifted)
    leaf = corrected(x, moments, base=BASE, rank=RANK, damping=0.0)
    # reduced-rank regression of what the coarse weights leave of the outputs
    wanted = rows @ x - drifted @ wide(leaf.terms[0])
    basis, _ = np.linalg.qr(drifted)
    u, values, vt = np.linalg.svd(basis.T @ wanted, full_matrices=False)
    fitted = basis @ (u[:, :RANK] * values[:RANK]) @ vt[:RANK]
    best = np.sum((fitted - wanted) ** 2)
    found = np.sum((drifted @ wide(leaf) - rows @ x) ** 2)
    assert found < (1 + 1e-5) * best


def test_corrections_of_stacks_and_in_recipes():
    x = random(2, INPUTS, OUTPUTS)
    leaf = corrected(x, base=BASE, rank=RANK)
    assert leaf.shape == x.shape
    for i in range(2):
        one = jax.tree.map(lambda a: a[i], leaf)  # noqa: B023
        single = corrected(x[i], base=BASE, rank=RANK)
        np.testing.assert_allclose(wide(one), wide(single), atol=1e-6)
    params = {"up": {"kernel": random(64, 96)}}
    stages = jc.chain(
        f"corrected(base={BASE!r}, rank=8)",
        [("up/kernel/terms/1/(left|right)", "symmetric(bits=8)")],
        "entropy_code()",
    )
    small = jc.compress(params, stages)
    assert "up/kernel/terms/1/left/codes" in jc.leaf_names(small)
    coarse = jc.compress(params, BASE)
    errors = [
        squared(params["up"]["kernel"], t["up"]["kernel"]) for t in (small, coarse)
    ]
    assert errors[0] < 0.8 * errors[1]
    sparse = corrected(x[0], base=jc.magnitude(sparsity=0.5), rank=RANK)
    assert isinstance(sparse.terms[0], jc.Sparse)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"base": BASE, "rank": 25}, "rank from 1 to 24, not 25"),
        ({"base": BASE, "rank": 0}, "rank from 1 to 24, not 0"),
        ({"base": "entropy_code()", "rank": 2}, "a method on weights"),
        ({"base": 4, "rank": 2}, "a method on weights"),
        ({"base": "rounded_up()", "rank": 2}, "unknown method"),
        ({"base": BASE, "rank": 2, "damping": 2}, "damping at least 0"),
        ({"base": BASE, "rank": 2, "weighted": True}, "corrected needs moments"),
        ({"base": "gptq(bits=4)", "rank": 2}, "gptq needs moments"),
    ],
)
def test_corrections_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        corrected(MATRIX, **options)
    with pytest.raises(ValueError, match=r"needs \(24, 24\)"):
        corrected(MATRIX, moments_of(correlated(12)), base=BASE, rank=2)

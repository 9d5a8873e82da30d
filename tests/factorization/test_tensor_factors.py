"""Tucker and CP: against NumPy float64, tensorly, identities and bounds."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices_for_tests import (
    SIZES,
    correlated,
    moments_of,
    output_loss,
    random,
    squared,
    wide,
)

import jaxcompress as jc
from jaxcompress.factorization import CP, Tucker, cp, svd, tucker


def unfoldings(x):
    tensor = np.asarray(x, np.float64).reshape(SIZES)
    for axis, size in enumerate(SIZES):
        yield np.moveaxis(tensor, axis, 0).reshape(size, -1)


def test_curvatures_change_nothing():
    """They weigh outputs, which are cut into axes here."""
    x, moments = random(12, 30), moments_of(correlated(12))
    curved = dataclasses.replace(moments, curvatures=jnp.ones(3))
    for method in (
        tucker(ranks=(5, 4, 3), sizes=SIZES),
        cp(rank=4, sizes=SIZES, sweeps=2),
    ):
        np.testing.assert_array_equal(wide(method(x, moments)), wide(method(x, curved)))


def test_the_higher_order_svd_and_its_bound():
    x, ranks = random(12, 30), (5, 4, 3)
    start = tucker(x, ranks=ranks, sizes=SIZES, sweeps=0)
    core, discarded = x.astype(np.float64).reshape(SIZES), 0
    for axis, matrix in enumerate(unfoldings(x)):
        u, values, _ = np.linalg.svd(matrix, full_matrices=False)
        basis = u[:, : ranks[axis]]
        discarded += np.sum(values[ranks[axis] :] ** 2)
        core = np.moveaxis(np.tensordot(basis @ basis.T, core, (1, axis)), 0, axis)
        np.testing.assert_allclose(
            np.abs(start.factors[axis]), np.abs(basis), atol=1e-5
        )
    np.testing.assert_allclose(wide(start), core.reshape(12, 30), atol=1e-5)
    errors = [
        squared(x, tucker(x, ranks=ranks, sizes=SIZES, sweeps=n)) for n in (0, 1, 5)
    ]
    assert errors[2] < errors[1] < errors[0] < discarded
    norm = np.sum(np.square(x, dtype=np.float64))
    kept = np.sum(np.square(np.asarray(start.core, np.float64)))
    np.testing.assert_allclose(errors[0], norm - kept, rtol=1e-5)


def test_full_ranks_are_exact_and_none_keeps_an_axis():
    x = random(12, 30)
    full = tucker(x, ranks=SIZES, sizes=SIZES)
    np.testing.assert_allclose(wide(full), x, atol=1e-5)
    half = tucker(x, ranks=(5, None, 3), sizes=SIZES)
    assert half.factors[1] is None and half.core.shape == (5, 6, 3)
    assert half.sizes == SIZES and half.shape == (12, 30)
    other = tucker(x.reshape(72, 5), ranks=(5, 6, 3), sizes=SIZES)
    assert other.inputs == 2 and other.shape == (72, 5)
    np.testing.assert_allclose(wide(other).reshape(12, 30), wide(half), atol=1e-5)


@pytest.mark.parametrize("first", [4, None])
def test_weighted_tucker_of_one_axis_is_weighted_svd(first):
    x, rows = random(12, 30), correlated(12)
    moments = moments_of(rows)
    leaf = tucker(x, moments, ranks=(first, 6, None), sizes=SIZES)
    assert leaf.shape == x.shape
    loss = output_loss(x, leaf, rows)
    if first is None:
        assert loss < 1e-9 * output_loss(x, jnp.zeros_like(x), rows)
    else:
        expected = svd(x, moments, rank=first)
        np.testing.assert_allclose(loss, output_loss(x, expected, rows), rtol=1e-4)
        assert loss < 0.9 * output_loss(x, svd(x, rank=first), rows)


def terms(rank, seed=0):
    """An unfolded tensor that is exactly a sum of `rank` products."""
    factors = [random(size, rank, seed=seed + i) for i, size in enumerate(SIZES)]
    return np.einsum("ar,br,cr->abc", *factors).reshape(12, 30)


@pytest.mark.parametrize("init", ["svd", "random"])
def test_cp_recovers_a_tensor_of_its_rank(init):
    x = terms(4)
    leaf = cp(x, rank=4, sizes=SIZES, init=init)
    assert squared(x, leaf) < 1e-8 * squared(x, jnp.zeros_like(x))
    parts = [wide(factor) for factor in leaf.factors]
    total = sum(
        np.multiply.outer(np.multiply.outer(parts[0][:, r], parts[1][:, r]), column)
        for r, column in enumerate(parts[2].T)
    )
    np.testing.assert_allclose(wide(leaf), total.reshape(12, 30), atol=1e-5)
    norms = np.array([np.linalg.norm(part, axis=0) for part in parts])
    np.testing.assert_allclose(norms, np.broadcast_to(norms[0], norms.shape), rtol=1e-5)


def test_cp_loses_less_with_more_terms_and_sweeps():
    x = random(12, 30)
    few = squared(x, cp(x, rank=4, sizes=SIZES))
    many = squared(x, cp(x, rank=30, sizes=SIZES))
    assert few > 1.01 * np.sum(np.linalg.svd(x, compute_uv=False)[4:] ** 2)
    assert few < 0.9 * np.sum(x**2) and many < 0.1 * few
    assert squared(x, cp(x, rank=4, sizes=SIZES, sweeps=1)) > 1.01 * few


def test_fits_are_as_good_as_tensorly_s():
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import parafac
    from tensorly.decomposition import tucker as their_tucker

    x = terms(6) + 0.5 * random(12, 30, seed=9)
    tensor = x.astype(np.float64).reshape(SIZES)
    norm = np.sum(tensor**2)
    options = {"n_iter_max": 200, "tol": 1e-10, "init": "svd", "random_state": 0}
    theirs = tensorly.cp_to_tensor(parafac(tensor, 4, **options))
    ours = squared(x, cp(x, rank=4, sizes=SIZES, sweeps=200)) / norm
    assert abs(ours - np.sum((tensor - theirs) ** 2) / norm) < 1e-3
    ranks = (5, 4, 3)
    found = their_tucker(tensor, ranks, n_iter_max=100, tol=1e-12, init="svd")
    theirs = np.sum((tensor - tensorly.tucker_to_tensor(found)) ** 2) / norm
    ours = squared(x, tucker(x, ranks=ranks, sizes=SIZES, sweeps=50)) / norm
    assert abs(ours - theirs) < 1e-5


def test_degenerate_cp_stays_finite():
    a, b = np.eye(12)[:2], np.eye(6)[:2]
    c = np.eye(5)[:2]
    # rank three, and as near as one likes to rank two
    x = sum(
        np.einsum("a,b,c->abc", a[i], b[j], c[k])
        for i, j, k in [(0, 0, 1), (0, 1, 0), (1, 0, 0)]
    )
    x = x.reshape(12, 30).astype(np.float32)
    leaf = cp(x, rank=2, sizes=SIZES, sweeps=1000, tolerance=0.0, init="random")
    assert np.isfinite(wide(leaf)).all()
    assert squared(x, leaf) < 0.02 * squared(x, jnp.zeros_like(x))
    strong = cp(
        x, rank=2, sizes=SIZES, sweeps=1000, tolerance=0.0, ridge=0.01, init="random"
    )
    sizes = [np.abs(leaf.factors[0]).max() for leaf in (strong, leaf)]
    assert sizes[0] < sizes[1] < 1e8 ** (1 / 6) * np.linalg.norm(x)


def test_weighted_cp():
    x, rows = random(12, 30), correlated(12)
    losses = [
        output_loss(x, cp(x, moments, rank=4, sizes=SIZES), rows)
        for moments in (moments_of(rows), None)
    ]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize(
    "f", [cp(rank=4, sizes=SIZES), tucker(ranks=(4, None, 2), sizes=SIZES)]
)
def test_stacked_tensors_equal_one_by_one(f):
    x = random(3, 12, 30)
    leaf, mapped = f(x), jax.vmap(f)(x)
    assert jax.tree.structure(leaf) == jax.tree.structure(mapped)
    assert leaf.shape == x.shape and leaf.dtype == x.dtype
    for i in range(3):
        one = jax.tree.map(lambda a: a[i], leaf)  # noqa: B023
        assert one.shape == (12, 30)
        single = wide(f(x[i]))
        for value in (wide(one), wide(leaf)[i], wide(mapped)[i]):
            np.testing.assert_allclose(value, single, atol=1e-5)


def test_tensor_leaves_run_and_are_stored(tmp_path):
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            heads = nn.DenseGeneral((4, 16), name="query")(x)
            return nn.DenseGeneral(64, axis=(-2, -1), name="out")(heads)

    x = random(3, 64)
    params = Attention().init(jax.random.key(0), x)["params"]
    recipe = [
        ("query/kernel", "tucker(ranks=(60, None, 15), sizes=(64, 4, 16))"),
        ("out/kernel", "cp(rank=64, sizes=(4, 16, 64), sweeps=10)"),
    ]
    small = jc.compress(params, recipe, layouts=jc.find_layouts(Attention(), params, x))
    assert isinstance(small["query"]["kernel"].inner, Tucker)
    assert isinstance(small["out"]["kernel"].inner, CP)
    small = jc.compress(small, [(".*/factors/2", "symmetric(bits=8)")])
    assert "query/kernel/factors/2/codes" in jc.leaf_names(small)
    jc.save(tmp_path / "small.safetensors", small)
    loaded = jc.load(tmp_path / "small.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    run = jax.jit(Attention().apply)
    dense = run({"params": jax.jit(jc.materialize)(small)}, x)
    np.testing.assert_allclose(run({"params": loaded}, x), dense, atol=1e-5)


@pytest.mark.parametrize(
    "f, message",
    [
        (tucker(ranks=(1, 1, 1)), r"pass sizes=.*12 inputs.*30 outputs"),
        (tucker(ranks=(1, 1), sizes=(12, 30)), "three or more"),
        (tucker(ranks=(1, 1, 1), sizes=(6, 12, 5)), r"can't use sizes=\(6, 12, 5\)"),
        (tucker(ranks=(1, 1), sizes=SIZES), "each of the 3 axes"),
        (tucker(ranks=(1, 7, 1), sizes=SIZES), r"ranks\[1\] from 1 to 6, not 7"),
        (tucker(ranks=(1, 1, 1), sizes=SIZES, sweeps=-1), "sweeps"),
        (tucker(ranks=(1, 1, 1), sizes=SIZES, weighted=True), "tucker needs moments"),
        (
            tucker(ranks=(1, 1, 1, 1), sizes=(3, 4, 6, 5), weighted=True),
            "single axis, here they are 2",
        ),
        (cp(rank=1), "pass sizes"),
        (cp(rank=31, sizes=SIZES), "rank from 1 to 30, not 31"),
        (cp(rank=1, sizes=SIZES, ridge=0), "ridge above 0 and below 1"),
        (cp(rank=1, sizes=SIZES, tolerance=-1), "tolerance"),
        (cp(rank=1, sizes=SIZES, init="zeros"), "init='svd' or 'random'"),
    ],
)
def test_tensor_methods_refuse(f, message):
    with pytest.raises(ValueError, match=message):
        f(random(12, 30))

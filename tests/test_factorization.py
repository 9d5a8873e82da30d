"""Low rank, CP and Tucker: against NumPy float64, identities and bounds."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.calibration.moments import Moments
from jaxcompress.factorization import (
    CP,
    LowRank,
    Tucker,
    corrected,
    cp,
    energies,
    plan_ranks,
    svd,
    tucker,
)
from jaxcompress.tree.leaves import take_columns
from jaxcompress.tree.paths import entries

INPUTS, OUTPUTS, RANK = 24, 40, 6
SIZES = (12, 6, 5)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wide(x):
    return np.asarray(jc.materialize(x), np.float64)


MATRIX = random(INPUTS, OUTPUTS)


def correlated(inputs, seed=0, tokens=200):
    """Inputs `[tokens, inputs]` of very different sizes that depend on each other."""
    rows = random(tokens, inputs, seed=seed).astype(np.float64)
    return rows @ random(inputs, inputs, seed=seed + 1) * np.geomspace(1, 20, inputs)


def moments_of(rows):
    second = rows.T @ rows / len(rows)
    return jc.moments_from_covariance(jnp.asarray(second, jnp.float32))


def output_loss(x, value, rows):
    """Mean squared change of the outputs, row by row."""
    change = np.asarray(x, np.float64) - wide(value)
    return float(np.mean([np.sum((row @ change) ** 2) for row in rows]))


def squared(x, value):
    return float(np.sum((np.asarray(x, np.float64) - wide(value)) ** 2))


# Low rank


def test_svd_is_the_truncated_decomposition():
    x = random(INPUTS, OUTPUTS)
    leaf = svd(x, rank=RANK)
    u, values, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    best = sum(values[i] * np.outer(u[:, i], vt[i]) for i in range(RANK))
    np.testing.assert_allclose(wide(leaf), best, atol=2e-6)
    np.testing.assert_allclose(squared(x, leaf), sum(values[RANK:] ** 2), rtol=1e-6)
    np.testing.assert_allclose(energies(x), values**2, rtol=1e-5)
    for factor in (wide(leaf.left).T, wide(leaf.right)):
        norms = np.sum(factor**2, axis=1)
        np.testing.assert_allclose(norms, values[:RANK], rtol=1e-6)
    assert leaf.shape == x.shape and leaf.dtype == x.dtype and leaf.rank == RANK
    assert jc.nbytes(leaf) == 4 * RANK * (INPUTS + OUTPUTS)


def test_the_weighted_loss_is_what_the_singular_values_say():
    x, rows = random(INPUTS, OUTPUTS), correlated(INPUTS)
    moments = moments_of(rows)
    leaf = svd(x, moments, rank=RANK, damping=0.0)
    values, vectors = np.linalg.eigh(np.asarray(moments.second, np.float64))
    root = (vectors * np.sqrt(values)) @ vectors.T  # symmetric, not a Cholesky factor
    lost = np.linalg.svd(root @ x, compute_uv=False)[RANK:] ** 2
    loss = output_loss(x, leaf, rows)
    assert abs(loss - lost.sum()) < 1e-5 * lost.sum()
    gains = np.asarray(energies(x, moments, damping=0.0), np.float64)
    assert abs(gains[RANK:].sum() - lost.sum()) < 1e-5 * lost.sum()
    plain = svd(x, moments, rank=RANK, weighted=False)
    assert loss < 0.8 * output_loss(x, plain, rows)
    assert squared(x, plain) < 0.8 * squared(x, leaf)
    np.testing.assert_array_equal(plain.left, svd(x, rank=RANK).left)


def test_the_size_of_the_inputs_does_not_unbalance_the_factors():
    x, moments = random(INPUTS, OUTPUTS), moments_of(correlated(INPUTS))
    loud = jc.moments_from_covariance(1e6 * moments.second)
    a, b = svd(x, moments, rank=RANK), svd(x, loud, rank=RANK)
    np.testing.assert_allclose(np.abs(a.left), np.abs(b.left), rtol=1e-3, atol=1e-5)
    ratio = np.linalg.norm(a.left) / np.linalg.norm(a.right)
    assert 0.1 < ratio < 10


def test_dead_inputs_and_few_tokens():
    x, rows = random(INPUTS, OUTPUTS), correlated(INPUTS, tokens=10)
    rows[:, 3] = 0
    leaf = svd(x, moments_of(rows), rank=12)
    assert np.isfinite(wide(leaf)).all()
    # ten directions are seen, so that twelve ranks lose nothing but the damping's share
    assert output_loss(x, leaf, rows) < 1e-2 * output_loss(x, svd(x, rank=12), rows)
    nothing = jc.moments_from_covariance(jnp.zeros((INPUTS, INPUTS)))
    same = svd(x, nothing, rank=12)
    np.testing.assert_allclose(wide(same), wide(svd(x, rank=12)), atol=1e-5)


def test_moments_that_are_none_show():
    second = 2 * jnp.ones((INPUTS, INPUTS)) - jnp.eye(INPUTS)  # no inputs have these
    moments = jc.moments_from_covariance(second)
    assert np.isnan(wide(svd(MATRIX, moments, rank=RANK))).all()
    with pytest.raises(ValueError, match=r"^kernel: .* not positive definite"):
        plan_ranks(
            {"kernel": MATRIX}, budget=0.5, moments={"kernel": moments}, pattern=".*"
        )


def test_drifted_moments_move_the_target():
    x, rows = random(INPUTS, OUTPUTS), correlated(INPUTS)
    drifted = rows + 0.3 * rows.std() * random(*rows.shape, seed=5)
    count = len(rows)
    moments = Moments(
        count=jnp.ones(()),
        second=jnp.asarray(rows.T @ rows / count, jnp.float32),
        drifted=jnp.asarray(drifted.T @ drifted / count, jnp.float32),
        cross=jnp.asarray(rows.T @ drifted / count, jnp.float32),
    )
    leaf = svd(x, moments, rank=RANK, damping=0.0)
    # reduced-rank regression of the outputs on the drifted inputs, on the samples
    wanted = rows @ x
    basis, _ = np.linalg.qr(drifted)
    u, values, vt = np.linalg.svd(basis.T @ wanted, full_matrices=False)
    fitted = basis @ (u[:, :RANK] * values[:RANK]) @ vt[:RANK]
    best = np.sum((fitted - wanted) ** 2)
    assert np.sum((drifted @ wide(leaf) - wanted) ** 2) < (1 + 1e-5) * best


def test_stacked_kernels_equal_one_by_one():
    x = random(2, 3, INPUTS, OUTPUTS)
    rows = [correlated(INPUTS, seed=i) for i in range(6)]
    second = np.stack([r.T @ r / len(r) for r in rows]).astype(np.float32)
    second = jnp.asarray(second.reshape(2, 3, INPUTS, INPUTS))
    moments = jc.moments_from_covariance(second)
    leaf = svd(x, moments, rank=RANK)
    assert leaf.left.shape == (2, 3, INPUTS, RANK)
    assert leaf.shape == x.shape
    mapped = jax.vmap(lambda x, moments: svd(x, moments, rank=RANK))(x, moments)
    gains = energies(x, moments)
    for i, j in itertools.product(range(2), range(3)):
        part = jax.tree.map(lambda a: a[i, j], moments)  # noqa: B023
        single = svd(x[i, j], part, rank=RANK)
        one = jax.tree.map(lambda a: a[i, j], leaf)  # noqa: B023
        assert one.shape == (INPUTS, OUTPUTS)
        np.testing.assert_allclose(wide(one), wide(single), atol=1e-6)
        np.testing.assert_allclose(wide(mapped)[i, j], wide(single), atol=1e-6)
        np.testing.assert_allclose(gains[i, j], energies(x[i, j], part), rtol=1e-5)


def test_energy_finds_the_smallest_rank():
    x = random(2, INPUTS, OUTPUTS)
    x[0] *= np.geomspace(1, 30, INPUTS)[:, None]  # a steeper spectrum
    wanted = []
    for matrix in x.astype(np.float64):
        values = np.linalg.svd(matrix, compute_uv=False) ** 2
        rank = next(r for r in range(99) if sum(values[:r]) >= 0.9 * sum(values))
        wanted.append(rank)
        assert svd(matrix.astype(np.float32), energy=0.9).rank == rank
    assert wanted[0] < wanted[1] == svd(x, energy=0.9).rank
    assert svd(x, energy=1.0).rank <= INPUTS
    rows = correlated(INPUTS)
    assert svd(x[1], moments_of(rows), energy=0.9).rank < wanted[1]
    with pytest.raises(TypeError, match=r"svd.* is a host method"):
        jax.jit(svd(energy=0.9))(x)


def test_keep_is_a_fraction_of_the_weights():
    leaf = svd(random(INPUTS, OUTPUTS), keep=0.5)
    weights = leaf.left.size + leaf.right.size
    assert weights <= 0.5 * INPUTS * OUTPUTS < weights + INPUTS + OUTPUTS
    assert svd(random(INPUTS, OUTPUTS), keep=1e-9).rank == 1
    assert svd(random(INPUTS, OUTPUTS), keep=0.4).rank == RANK  # 0.4 * 15


def test_the_randomized_decomposition_is_nearly_optimal():
    x = random(96, 128) * np.geomspace(1, 0.01, 128, dtype=np.float32)
    options = {"rank": 8, "oversampling": 4}
    best = squared(x, svd(x, randomized=False, rank=8))
    once = svd(x, randomized=True, **options)
    assert best < squared(x, once) < 1.01 * best
    rough = svd(x, randomized=True, power_iterations=0, **options)
    assert squared(x, rough) > 1.05 * best
    again = svd(x, randomized=True, **options)
    np.testing.assert_array_equal(once.left, again.left)
    other = svd(x, randomized=True, seed=1, **options)
    assert np.any(np.asarray(other.left) != np.asarray(once.left))
    exact = random(96, 5) @ random(5, 128)
    found = svd(exact, randomized=True, **options)
    np.testing.assert_allclose(wide(found), exact, atol=1e-5)


@pytest.mark.parametrize(
    "rank, shape, expected",
    [
        (112, (2048, 4096), True),
        (113, (2048, 4096), False),
        (8, (2047, 4096), False),
        (8, (3, 4096, 2048), True),
    ],
)
def test_large_matrices_are_randomized_by_default(rank, shape, expected):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = str(jax.make_jaxpr(svd(rank=rank))(x))
    assert (" qr[" in program) == expected


def test_bfloat16_weights_have_bfloat16_factors():
    x = jnp.asarray(random(INPUTS, OUTPUTS), jnp.bfloat16)
    leaf = svd(x, rank=INPUTS)
    assert leaf.left.dtype == leaf.right.dtype == leaf.materialize().dtype == x.dtype
    error = squared(x.astype(jnp.float32), leaf)
    assert error < 3e-5 * squared(x.astype(jnp.float32), jnp.zeros_like(x))


def test_all_zero_weights():
    x, small = jnp.zeros((INPUTS, OUTPUTS)), jnp.zeros((12, 30))
    for leaf in (
        svd(x, rank=RANK),
        svd(x, energy=0.5),
        svd(x, moments_of(correlated(INPUTS)), rank=RANK),
        tucker(small, ranks=(5, 4, 3), sizes=SIZES),
        cp(small, rank=4, sizes=SIZES),
    ):
        np.testing.assert_array_equal(wide(leaf), 0)


def test_columns_of_a_product():
    x = random(INPUTS, OUTPUTS)
    leaf = svd(x, rank=RANK)
    indices = jnp.array([[3, 0, 39], [7, 7, 1]])
    for stored in (leaf, LowRank(leaf.left, jc.symmetric(leaf.right, bits=8))):
        columns = take_columns(stored, indices)
        assert columns.shape == (INPUTS, 2, 3)
        np.testing.assert_allclose(columns, wide(stored)[:, indices], atol=1e-6)


def test_moments_follow_into_the_factors():
    x, rows = random(64, 96), correlated(64)
    small = jc.compress({"kernel": x}, "svd(rank=64)")
    found = {e.name: e.moments for e in entries(small, {"kernel": moments_of(rows)})}
    left = np.asarray(small["kernel"].left, np.float64)
    expected = {"kernel/left": rows, "kernel/right": rows @ left}
    assert found.keys() == expected.keys()
    for name, inputs in expected.items():
        second = inputs.T @ inputs / len(inputs)
        atol = 1e-5 * np.abs(second).max()
        np.testing.assert_allclose(found[name].second, second, atol=atol)
    # the second stage is weighted by them: rank 32 of the right factor
    both = jc.compress(
        small, [("kernel/right", "svd(rank=8)")], {"kernel": moments_of(rows)}
    )
    plain = jc.compress(small, [("kernel/right", "svd(rank=8)")])
    losses = [output_loss(x, t["kernel"], rows) for t in (both, plain)]
    assert losses[0] < 0.8 * losses[1]


# Tucker and CP


def unfoldings(x):
    tensor = np.asarray(x, np.float64).reshape(SIZES)
    for axis, size in enumerate(SIZES):
        yield np.moveaxis(tensor, axis, 0).reshape(size, -1)


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


# Plans


def tree():
    """Spectra that fall fast and slowly, and one kernel that no rank makes smaller."""
    fall = np.geomspace(1, 1e-3, 64, dtype=np.float32)[:, None]
    return {
        "a": {"kernel": random(64, 96) * fall},
        "b": {"kernel": random(64, 96, seed=1)},
        "c.d": {"kernel": random(2, 64, 96, seed=2) * fall**0.3},
        "thin": {"kernel": random(1, 4096, seed=3)},
        "norm": {"scale": random(64)},
    }


LAYOUT = {"c.d/kernel": jc.Layout((0,), (1,), (2,))}
NAMES = ["a/kernel", "b/kernel", "c.d/kernel", "thin/kernel"]


def planned_bytes(params, recipe):
    small = jc.compress(params, recipe, layout=LAYOUT)
    return sum(jc.nbytes(small[name.split("/")[0]]) for name in NAMES), small


def uniform(params, budget):
    """The rank that the same fraction of every kernel but the thin one gives."""
    dense = 4 * 4096
    total = 4 * 4 * 64 * 96
    share = (budget * (total + dense) - dense) / total
    rank = int(share * 64 * 96 / (64 + 96))
    return [(".*thin.*", None), (".*kernel", f"svd(rank={rank})")]


@pytest.mark.parametrize("budget", [0.3, 0.8])
def test_a_plan_meets_its_budget_and_beats_uniform_ranks(budget):
    params = tree()
    recipe = plan_ranks(params, budget=budget, layout=LAYOUT, relative=False)
    names = ["a/kernel", "b/kernel", r"c\.d/kernel", "thin/kernel"]
    assert [pattern for pattern, _ in recipe] == names
    assert recipe[-1][1] is None
    size, small = planned_bytes(params, recipe)
    limit = budget * 4 * (4 * 64 * 96 + 4096)
    assert limit - 4 * 2 * (64 + 96) < size <= limit
    same, plain = planned_bytes(params, uniform(params, budget))
    assert same <= limit
    loss, other = (
        sum(squared(params[n]["kernel"], t[n]["kernel"]) for n in params if n != "norm")
        for t in (small, plain)
    )
    assert loss < 0.9 * other
    assert recipe == plan_ranks(
        params, budget=int(limit), layout=LAYOUT, relative=False
    )


def test_a_plan_by_loss():
    params = {n: tree()[n] for n in ("a", "b")}
    rows = {"a/kernel": 0.1 * correlated(64), "b/kernel": correlated(64, seed=4)}
    moments = {name: moments_of(r) for name, r in rows.items()}
    recipes = [
        plan_ranks(params, budget=0.4, moments=moments),
        plan_ranks(params, budget=0.4),
        "svd(keep=0.4)",
    ]
    assert "weighted=True" in recipes[0][0][1]
    losses = []
    for recipe in recipes:
        small = jc.compress(params, recipe, moments)
        assert jc.nbytes(small) <= 0.4 * jc.nbytes(params)
        parts = [
            output_loss(params[n]["kernel"], small[n]["kernel"], rows[f"{n}/kernel"])
            for n in params
        ]
        losses.append(sum(parts))
    assert losses[0] < min(losses[1:])


def brute_force(spectra, limit):
    """The least loss over all ranks of all leaves, each `[inputs, outputs]`."""
    options = []
    for x in spectra:
        values = np.linalg.svd(x, compute_uv=False) ** 2
        sizes = [(r * sum(x.shape), values[r:].sum()) for r in range(1, len(values))]
        saving = [s for s in sizes if s[0] < x.size]
        options.append([*saving, (x.size, 0.0)])
    choices = itertools.product(*options)
    return min(
        sum(loss for _, loss in choice)
        for choice in choices
        if sum(cost for cost, _ in choice) <= limit
    )


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
def test_a_plan_is_nearly_the_best_of_all(budget):
    shapes = [(8, 8), (6, 12), (10, 5)]
    params = {
        str(i): random(*s, seed=i) * np.geomspace(1, 0.2 + i / 3, s[0])[:, None]
        for i, s in enumerate(shapes)
    }
    params = {name: x.astype(np.float32) for name, x in params.items()}
    recipe = plan_ranks(params, budget=budget, pattern=".*", relative=False)
    small = jc.compress(params, recipe)
    loss = sum(squared(x, small[name]) for name, x in params.items())
    total = sum(x.size for x in params.values())
    assert jc.nbytes(small) <= 4 * budget * total
    best = brute_force(params.values(), budget * total)
    every = sum(squared(x, np.zeros_like(x)) for x in params.values())
    assert best <= (1 + 1e-6) * loss and loss <= best + 0.05 * every


# Corrections

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
    count = len(rows)
    moments = Moments(
        count=jnp.ones(()),
        second=jnp.asarray(rows.T @ rows / count, jnp.float32),
        drifted=jnp.asarray(drifted.T @ drifted / count, jnp.float32),
        cross=jnp.asarray(rows.T @ drifted / count, jnp.float32),
    )
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
        ({"base": BASE, "rank": 25}, "rank=1 to 24 here, not 25"),
        ({"base": BASE, "rank": 0}, "rank=1 to 24 here, not 0"),
        ({"base": "entropy_code()", "rank": 2}, "a method on weights"),
        ({"base": 4, "rank": 2}, "a method on weights"),
        ({"base": "rounded_up()", "rank": 2}, "unknown method"),
        ({"base": BASE, "rank": 2, "damping": 2}, "damping from 0 to 1"),
        ({"base": BASE, "rank": 2, "weighted": True}, "corrected needs moments"),
        ({"base": "gptq(bits=4)", "rank": 2}, "gptq needs moments"),
    ],
)
def test_corrections_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        corrected(MATRIX, **options)
    with pytest.raises(ValueError, match=r"needs \(24, 24\)"):
        corrected(MATRIX, moments_of(correlated(12)), base=BASE, rank=2)


# Composition


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, name="down")(nn.relu(nn.Dense(128, name="up")(x)))


def test_factorized_and_quantized_runs_in_an_unmodified_model(tmp_path):
    x = random(5, 64)
    params = Model().init(jax.random.key(0), x)["params"]
    recipe = jc.chain("svd(rank=64)", "symmetric(bits=8, block=32)")
    small = jc.compress(params, recipe)
    assert isinstance(small["up"]["kernel"], LowRank)
    names = jc.leaf_names(small)
    assert {"up/kernel/left/codes", "up/kernel/right/scale"} <= set(names)
    path = tmp_path / "small.safetensors"
    jc.save(path, small)
    loaded = jc.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    for a, b in zip(*map(jax.tree.leaves, (small, loaded)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    outputs = [
        np.asarray(jax.jit(Model().apply)({"params": p}, x))
        for p in (params, loaded, jc.materialize(small))
    ]
    np.testing.assert_allclose(outputs[1], outputs[2], atol=1e-5)
    error = np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0])
    assert 0 < error < 0.05


def test_pruned_factorized_quantized_and_coded_by_one_chain(tmp_path):
    x = random(5, 64)
    params = Model().init(jax.random.key(0), x)["params"]
    rows = correlated(128)
    stages = jc.chain(
        # one kernel through every stage, the other pruned or factorized
        [("up/kernel", "magnitude(sparsity=0.5)"), ("down/kernel", None)],
        [("up/kernel/values", "svd(keep=0.9)"), ("down/kernel", "svd(rank=40)")],
        [(".*/(left|right)", "symmetric(bits=8, block=32)")],
        "entropy_code()",
        "code_floats()",
    )
    small = jc.compress(params, stages, {"down/kernel": moments_of(rows)})
    assert isinstance(small["up"]["kernel"], jc.Sparse)
    names = set(jc.leaf_names(small))
    assert {"up/kernel/values/left/codes", "down/kernel/right/codes"} <= names
    assert isinstance(small["up"]["kernel"].values.left.codes, jc.Coded)
    jc.save(tmp_path / "small.safetensors", small)
    loaded = jc.load(tmp_path / "small.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    for a, b in zip(*map(jax.tree.leaves, (small, loaded)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "small.safetensors").stat().st_size < jc.nbytes(params) / 2
    dense = jax.jit(jc.materialize)(small)
    assert float(np.mean(np.asarray(dense["up"]["kernel"]) == 0)) >= 0.5
    run = jax.jit(Model().apply)
    want = run({"params": dense}, x)
    np.testing.assert_allclose(run({"params": loaded}, x), want, atol=1e-5)

    @jax.jit
    def quick(params, x):
        with jc.fast():
            return Model().apply({"params": params}, x)

    np.testing.assert_allclose(quick(loaded, x), want, atol=1e-5)
    error = np.linalg.norm(want - run({"params": params}, x))
    assert 0 < error < 0.7 * np.linalg.norm(want)


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
    small = jc.compress(params, recipe, layout=jc.layout(Attention(), params, x))
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


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "exactly one of rank, keep and energy"),
        ({"rank": 3, "keep": 0.5}, "exactly one"),
        ({"rank": 0}, r"rank=1 to 24 here, not 0"),
        ({"rank": 25}, r"rank=1 to 24 here, not 25"),
        ({"rank": 2.0}, r"rank=1 to 24 here, not 2\.0"),
        ({"rank": True}, "rank=1 to 24"),
        ({"keep": 0.0}, "keep above 0"),
        ({"keep": 1.5}, "keep above 0 and at most 1"),
        ({"energy": -1}, "energy above 0"),
        ({"rank": 3, "damping": -1}, "damping from 0 to 1"),
        ({"rank": 3, "weighted": "yes"}, "weighted=True, False or 'auto'"),
        ({"rank": 3, "weighted": True}, "svd needs moments"),
        ({"rank": 3, "randomized": "no"}, "randomized=True, False or 'auto'"),
        ({"rank": 3, "randomized": True, "power_iterations": -1}, "power_iterations"),
        ({"rank": 3, "randomized": True, "oversampling": -1}, "oversampling"),
    ],
)
def test_svd_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        svd(MATRIX, **options)


def test_svd_refuses_other_weights_and_moments():
    with pytest.raises(ValueError, match=r"needs \(24, 24\)"):
        svd(MATRIX, moments_of(correlated(12)), rank=3)
    with pytest.raises(ValueError, match="needs Moments"):
        svd(MATRIX, {"second": np.eye(24)}, rank=3)
    with pytest.raises(TypeError, match="floating-point"):
        svd(np.ones((4, 4), np.int32), rank=1)
    with pytest.raises(ValueError, match="not empty"):
        svd(np.ones((0, 4), np.float32), rank=1)
    with pytest.raises(ValueError, match=r"^up/kernel: .*rank=1 to 64"):
        jc.compress({"up": {"kernel": random(64, 96)}}, "svd(rank=65)")
    looked_up = Moments(count=jnp.ones(()), tokens=jnp.ones(OUTPUTS))
    np.testing.assert_array_equal(
        svd(MATRIX, looked_up, rank=3).left, svd(MATRIX, rank=3).left
    )


@pytest.mark.parametrize(
    "f, message",
    [
        (tucker(ranks=(1, 1, 1)), r"pass sizes=.*12 inputs.*30 outputs"),
        (tucker(ranks=(1, 1), sizes=(12, 30)), "three or more"),
        (tucker(ranks=(1, 1, 1), sizes=(6, 12, 5)), r"can't use sizes=\(6, 12, 5\)"),
        (tucker(ranks=(1, 1), sizes=SIZES), "each of the 3 axes"),
        (tucker(ranks=(1, 7, 1), sizes=SIZES), r"ranks\[1\]=1 to 6 here, not 7"),
        (tucker(ranks=(1, 1, 1), sizes=SIZES, sweeps=-1), "sweeps"),
        (tucker(ranks=(1, 1, 1), sizes=SIZES, weighted=True), "tucker needs moments"),
        (
            tucker(ranks=(1, 1, 1, 1), sizes=(3, 4, 6, 5), weighted=True),
            "single axis, here they are 2",
        ),
        (cp(rank=1), "pass sizes"),
        (cp(rank=31, sizes=SIZES), "rank=1 to 30 here, not 31"),
        (cp(rank=1, sizes=SIZES, ridge=0), "ridge between 0 and 1"),
        (cp(rank=1, sizes=SIZES, tolerance=-1), "tolerance"),
        (cp(rank=1, sizes=SIZES, init="zeros"), "init='svd' or 'random'"),
    ],
)
def test_tensor_methods_refuse(f, message):
    with pytest.raises(ValueError, match=message):
        f(random(12, 30))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 0}, "fraction of bytes kept"),
        ({"budget": 1.5}, "at most 1"),
        ({"budget": True}, "fraction of bytes kept"),
        ({"budget": 0.001}, "below the .* that the smallest ranks take"),
        ({"budget": 0.5, "pattern": "nothing"}, "matches no leaf"),
        ({"budget": 0.5, "pattern": "norm/scale"}, "norm/scale: shape"),
        ({"budget": 0.5, "layout": None}, r"c\.d/kernel: shape .* pass layout"),
        ({"budget": 0.5, "moments": {}}, "a/kernel: no second moment"),
    ],
)
def test_plans_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        plan_ranks(tree(), **{"layout": LAYOUT, **options})


def test_plans_refuse_tracers_and_trees_without_kernels():
    with pytest.raises(TypeError, match="plan_ranks reads values on the host"):
        jax.jit(lambda p: plan_ranks(p, budget=0.5))(tree())
    with pytest.raises(ValueError, match="takes no leaf of this tree"):
        plan_ranks({"scale": random(64)}, budget=0.5)


def test_moments_of_another_model_are_refused():
    params = {"up": {"kernel": random(64, 96)}}
    others = {"layer_0/mlp/kernel": moments_of(correlated(64))}
    with pytest.raises(ValueError, match=r"of another model.*'layer_0/mlp/kernel'.*up"):
        jc.compress(params, "svd(rank=4)", others)
    smaller = {"up/kernel": moments_of(correlated(32))}
    with pytest.raises(ValueError, match=r"^up/kernel: svd: .*needs \(64, 64\)"):
        jc.compress(params, "svd(rank=4)", smaller)


def test_energy_works_in_a_recipe():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((96, 64)), jnp.float32)
    small = jc.compress({"a": {"kernel": x}}, "svd(energy=0.9)")["a"]["kernel"]
    kept = np.linalg.norm(small.materialize()) ** 2 / np.linalg.norm(x) ** 2
    assert 0.9 <= kept < 0.92
    with pytest.raises(TypeError, match="host method"):
        jax.jit(lambda x: jc.svd(x, energy=0.9))(x)

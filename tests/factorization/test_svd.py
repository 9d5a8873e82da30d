"""Low rank: against NumPy float64, identities and bounds; alone and in chains."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices_for_tests import (
    INPUTS,
    MATRIX,
    OUTPUTS,
    RANK,
    SIZES,
    correlated,
    drifted_moments,
    moments_of,
    output_loss,
    random,
    squared,
    wide,
)

import jaxcompress as jc
from jaxcompress.calibration.moments import Moments
from jaxcompress.factorization import LowRank, cp, energies, svd, tucker
from jaxcompress.planning.ranks import plan_ranks
from jaxcompress.tree.leaf import take_columns
from jaxcompress.tree.paths import entries


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


def test_outputs_that_do_more_are_kept_better():
    """The loss counts errors of an output by its curvature, drawn towards the mean."""
    x, rows = random(48, 64, seed=1), correlated(48)
    curvatures = np.exp2(np.random.default_rng(2).uniform(-6, 0, 64))
    moments = dataclasses.replace(
        moments_of(rows), curvatures=jnp.asarray(curvatures, jnp.float32)
    )
    counts = (8 * curvatures + curvatures.mean()) / 9
    second = np.asarray(moments.second, np.float64)
    second = second + 1e-3 * np.mean(np.diagonal(second)) * np.eye(48)

    def loss(leaf):
        error = np.asarray(leaf.left, np.float64) @ np.asarray(leaf.right, np.float64)
        error = error - np.asarray(x, np.float64)
        return float(np.sum(counts * error * (second @ error)))

    found = jc.svd(x, moments, rank=12)
    gains = np.asarray(energies(x, moments), np.float64)
    assert loss(found) == pytest.approx(gains[12:].sum(), rel=1e-4)
    assert loss(found) < 0.9 * loss(jc.svd(x, moments_of(rows), rank=12))
    other = dataclasses.replace(moments, curvatures=moments.curvatures[::-1])
    both = jax.tree.map(lambda *a: jnp.stack(a), (x, moments), (2 * x, other))
    both = jc.svd(*both, rank=12)
    np.testing.assert_allclose(both.left[0], found.left, rtol=1e-4, atol=1e-5)
    alone = jc.svd(2 * x, other, rank=12)
    np.testing.assert_allclose(both.right[1], alone.right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="curvatures"):
        jc.svd(x, dataclasses.replace(moments, curvatures=jnp.ones(3)), rank=12)
    small = dataclasses.replace(moments, curvatures=1e-8 * moments.curvatures)
    np.testing.assert_allclose(jc.svd(x, small, rank=12).left, found.left, rtol=1e-3)
    none = dataclasses.replace(moments, curvatures=jnp.zeros(64))
    np.testing.assert_allclose(
        jc.svd(x, none, rank=12).materialize(),
        jc.svd(x, moments_of(rows), rank=12).materialize(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_curvatures_follow_into_the_factors():
    """What an error of a factor does, by its outputs, is what it does to the whole."""
    x, rows = random(48, 64, seed=1), correlated(48)
    curvatures = jnp.asarray(np.random.default_rng(2).uniform(0, 1, 64), jnp.float32)
    moments = dataclasses.replace(moments_of(rows), curvatures=curvatures)
    low = jc.svd(x, moments, rank=12)

    def harm(change, second, counts):
        change, second = (np.asarray(a, np.float64) for a in (change, second))
        return np.sum(np.asarray(counts) * change * (second @ change))

    known = {part: low.inner_moments(part, moments) for part in ("left", "right")}
    moved = 0.01 * random(12, 64, seed=5)
    whole = harm(low.left @ moved, moments.second, curvatures)
    parts = harm(moved, known["right"].second, known["right"].curvatures)
    assert parts == pytest.approx(whole, rel=1e-3)
    for column in (0, 7):  # errors of one output; together they may add up or cancel
        moved = np.zeros((48, 12), np.float32)
        moved[:, column] = 0.01 * random(48, 1, seed=6)[:, 0]
        whole = harm(moved @ low.right, moments.second, curvatures)
        parts = harm(moved, known["left"].second, known["left"].curvatures)
        assert parts == pytest.approx(whole, rel=1e-3)
    tree = {"a": {"kernel": low}}
    plan = jc.planning.plan_bits(
        tree, fraction=0.2, moments={"a/kernel": moments}, where=".*(left|right)"
    )
    jc.compress(tree, plan, {"a/kernel": moments})
    mixed = jc.mixed_channels(x, bits=4, channels=8, axis="outputs")
    order = np.asarray(mixed.order)
    for part, places in (("kept", order[:8]), ("rest", order[8:])):
        found = mixed.inner_moments(part, moments).curvatures
        np.testing.assert_array_equal(found, np.asarray(curvatures)[places])


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
    with pytest.warns(UserWarning, match="svd: no calibration token reached it"):
        same = svd(x, nothing, rank=12)
    np.testing.assert_allclose(wide(same), wide(svd(x, rank=12)), atol=1e-5)


def test_moments_that_are_none_show():
    second = 2 * jnp.ones((INPUTS, INPUTS)) - jnp.eye(INPUTS)  # no inputs have these
    moments = jc.moments_from_covariance(second)
    assert np.isnan(wide(svd(MATRIX, moments, rank=RANK))).all()
    with pytest.raises(ValueError, match=r"^kernel: .* not positive definite"):
        plan_ranks(
            {"kernel": MATRIX}, fraction=0.5, moments={"kernel": moments}, where=".*"
        )


def test_drifted_moments_move_the_target():
    x, rows = random(INPUTS, OUTPUTS), correlated(INPUTS)
    drifted = rows + 0.3 * rows.std() * random(*rows.shape, seed=5)
    moments = drifted_moments(rows, drifted)
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
    leaf = svd(random(INPUTS, OUTPUTS), fraction=0.5)
    weights = leaf.left.size + leaf.right.size
    assert weights <= 0.5 * INPUTS * OUTPUTS < weights + INPUTS + OUTPUTS
    assert svd(random(INPUTS, OUTPUTS), fraction=1e-9).rank == 1
    assert svd(random(INPUTS, OUTPUTS), fraction=0.4).rank == RANK  # 0.4 * 15


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


@pytest.mark.slow
def test_pruned_factorized_quantized_and_coded_by_one_chain(tmp_path):
    x = random(5, 64)
    params = Model().init(jax.random.key(0), x)["params"]
    rows = correlated(128)
    stages = jc.chain(
        # one kernel through every stage, the other pruned or factorized
        [("up/kernel", "magnitude(sparsity=0.5)"), ("down/kernel", None)],
        [("up/kernel/values", "svd(fraction=0.9)"), ("down/kernel", "svd(rank=40)")],
        [(".*/(left|right)", "symmetric(bits=6, block=32)")],
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
        with jc.compressed_matmul():
            return Model().apply({"params": params}, x)

    np.testing.assert_allclose(quick(loaded, x), want, atol=1e-5)
    error = np.linalg.norm(want - run({"params": params}, x))
    assert 0 < error < 0.7 * np.linalg.norm(want)


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "exactly one of rank, fraction and energy"),
        ({"rank": 3, "fraction": 0.5}, "exactly one"),
        ({"rank": 0}, r"rank from 1 to 24, not 0"),
        ({"rank": 25}, r"rank from 1 to 24, not 25"),
        ({"rank": 2.0}, r"rank from 1 to 24, not 2\.0"),
        ({"rank": True}, "rank from 1 to 24"),
        ({"fraction": 0.0}, "fraction above 0"),
        ({"fraction": 1.5}, "fraction above 0 and at most 1"),
        ({"energy": -1}, "energy above 0"),
        ({"rank": 3, "damping": -1}, "damping at least 0"),
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
    with pytest.raises(ValueError, match="one input or more"):
        svd(np.ones((0, 4), np.float32), rank=1)
    with pytest.raises(ValueError, match=r"^up/kernel: .*rank from 1 to 64"):
        jc.compress({"up": {"kernel": random(64, 96)}}, "svd(rank=65)")
    looked_up = Moments(count=jnp.ones(()), tokens=jnp.ones(OUTPUTS))
    np.testing.assert_array_equal(
        svd(MATRIX, looked_up, rank=3).left, svd(MATRIX, rank=3).left
    )


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

"""Feedback between outputs: what moves, what it gains, and that it comes back."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantization.test_rate_distortion import covariance, gaussian, natural

import jaxcompress as jc
from jaxcompress.calibration import curvature_sums
from jaxcompress.calibration import output_feedback as module
from jaxcompress.calibration.error_feedback import shrunk
from jaxcompress.calibration.output_feedback import (
    choose_shrinkage,
    count_groups,
    output_feedback,
    stretched,
)
from jaxcompress.coding.levels import leaf as coded_levels
from jaxcompress.coding.levels import rate_coded, trellis
from jaxcompress.quantization.rate_distortion import sweep
from jaxcompress.storage import tree_json
from jaxcompress.tree.equality import same_bits


def joint_of(outputs, heads=8, seed=0):
    """Outputs of a head do much the same, as those of queries."""
    rng = np.random.default_rng(seed)
    found = 0.1 * np.eye(outputs)
    size = outputs // heads
    for head in range(heads):
        x = rng.standard_normal((size, 2))
        part = slice(head * size, (head + 1) * size)
        found[part, part] += x @ x.T
    return found


@pytest.mark.parametrize(
    ("outputs", "groups"), [(576, 12), (192, 4), (64, 1), (577, 1), (1152, 12)]
)
def test_groups_fit_the_walks(outputs, groups):
    assert count_groups(outputs) == groups
    count, places = trellis.walks(outputs)
    if groups > 1:
        x = np.arange(outputs)
        laid = coded_levels.in_groups(x, groups, places)
        back = coded_levels.out_of_groups(laid, groups, places)
        np.testing.assert_array_equal(back, x)
        size = places // groups
        for group in range(groups):  # of each walk, and of all walks together
            part = laid.reshape(count, groups, size)[:, group].reshape(-1)
            np.testing.assert_array_equal(part, np.arange(group, outputs, groups))


def test_targets_move_to_where_errors_cost_least():
    """Against the linear systems that define it, in float64."""
    joint = joint_of(96, heads=4)
    found = output_feedback(joint)
    order = np.arange(96).reshape(-1, 2).T.reshape(-1)
    alone = np.diag(joint)
    matrix = joint + np.diag(np.full(96, module.STEADY * alone.mean()))
    matrix = matrix[np.ix_(order, order)]
    np.testing.assert_allclose(found.matrix, matrix, rtol=1e-6)
    early, late = slice(0, 48), slice(48, 96)
    pull = np.linalg.solve(matrix[late, late], matrix[late, early])
    np.testing.assert_allclose(found.moves[1, early], pull.T, atol=1e-6)
    assert not found.moves[0].any() and not found.moves[1, late].any()
    left = matrix[early, early] - matrix[early, late] @ pull
    wanted = np.concatenate([np.diag(left), np.diag(matrix)[late]])
    wanted -= module.STEADY * alone.mean()
    np.testing.assert_allclose(found.curvatures[order], wanted, rtol=1e-9)
    # Errors of weights divided by factors are smaller by as much.
    factors = np.exp(gaussian(96, seed=1))
    wide = stretched(found, factors)
    error, flat = gaussian(96, seed=2), factors[order]
    np.testing.assert_allclose(
        error @ wide.matrix @ error,
        (error * flat) @ found.matrix @ (error * flat),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        error @ wide.moves[1] * flat[late], (error * flat) @ found.moves[1], atol=1e-4
    )
    np.testing.assert_allclose(wide.curvatures, found.curvatures * factors**2)


def test_the_sweep_feeds_errors_both_ways():
    """Rounding, group by group and row by row, against its definition in float64."""
    x, second, joint = gaussian(12, 96), covariance(12), joint_of(96)
    target, factor = natural(x, second)
    feedback = output_feedback(joint)
    between = feedback.matrix, feedback.moves
    levels, steps = sweep(target, factor, jnp.float32(0.2), between, states=0)
    matrix = np.empty((96, 96))  # in natural order
    order = np.arange(96).reshape(-1, 2).T.reshape(-1)
    matrix[np.ix_(order, order)] = feedback.matrix
    left, wanted, sizes = x.astype(np.float64).copy(), [], []
    early, late = order[:48], order[48:]
    for j in range(12):
        rest = np.arange(j + 1, 12)
        step = 0.2 * np.sqrt(np.linalg.inv(second[j:, j:])[0, 0])
        step = float(jnp.asarray(step, jnp.bfloat16))
        row, level = left[j] / step, np.zeros(96)
        level[early] = np.round(row[early])
        error = level[early] - row[early]
        pull = np.linalg.solve(matrix[np.ix_(late, late)], matrix[np.ix_(late, early)])
        level[late] = np.round(row[late] - pull @ error)
        shrunk = (level @ matrix @ row) / (level @ matrix @ level)
        sizes.append(float(jnp.asarray(shrunk * step, jnp.bfloat16)))
        wanted.append(level)
        if len(rest):
            pull = np.linalg.solve(second[np.ix_(rest, rest)], second[rest, j])
            left[rest] -= np.outer(pull, sizes[-1] * level - left[j])
    assert np.mean(np.asarray(levels) != np.array(wanted)) < 0.01
    np.testing.assert_allclose(steps, sizes, rtol=2**-7)


def known_of(second, joint):
    found = jc.moments_from_covariance(jnp.asarray(second, jnp.float32))
    counts = jnp.asarray(np.diagonal(joint, axis1=-2, axis2=-1), jnp.float32)
    joint = jnp.asarray(joint, jnp.float32)
    return dataclasses.replace(found, curvatures=counts, joint_curvatures=joint)


def harm(leaf, x, second, joint):
    error = np.asarray(leaf.materialize(), np.float64) - x
    return np.einsum("...io,...ij,...jp,...op->...", error, second, error, joint)


@pytest.mark.parametrize("states", [0, 8])
def test_it_does_less_harm_at_the_same_size(states, tmp_path):
    second, joint, x = covariance(32), joint_of(192), gaussian(32, 192)
    known = known_of(second, joint)
    apart = dataclasses.replace(known, joint_curvatures=None)
    method = jc.rate_distortion(rate=3.0, states=states)
    found = {}
    for name, moments in (("apart", apart), ("together", known)):
        leaf = method(jnp.asarray(x, jnp.float32), moments)
        jc.save(tmp_path / f"{name}.safetensors", {"kernel": leaf})
        with jc.open_checkpoint(tmp_path / f"{name}.safetensors") as file:
            assert 8 * file.nbytes("kernel") / x.size == pytest.approx(3, rel=0.01)
        back = jc.load(tmp_path / f"{name}.safetensors")["kernel"]
        assert same_bits(back, leaf)
        found[name] = harm(back, x, second, joint)
    feedback = output_feedback(joint)
    theory = np.log(np.diag(feedback.matrix)).mean()
    theory -= np.log(feedback.curvatures).mean()
    assert theory > 0.3
    assert np.log(found["apart"] / found["together"]) > 0.8 * theory


def test_walks_of_a_stack_go_on_from_group_to_group():
    """Two walks in each row, twelve groups in each walk; decoded whole and in part."""
    shape = 2, 8, 1152
    x, second = gaussian(*shape), np.stack([covariance(8)] * 2)
    joint = np.stack([joint_of(1152, heads=24, seed=i) for i in range(2)])
    known = known_of(second, joint)
    leaf = jc.rate_distortion(rate=3.0, states=8)(jnp.asarray(x, jnp.float32), known)
    assert leaf.levels.groups == 12
    whole = np.asarray(jax.jit(jc.materialize)(leaf))
    np.testing.assert_array_equal(whole, leaf.materialize())
    alone = jc.rate_distortion(rate=3.0, states=8)(
        jnp.asarray(x[1], jnp.float32), jax.tree.map(lambda a: a[1], known)
    )
    np.testing.assert_allclose(whole[1], alone.materialize(), atol=0.3)
    assert np.corrcoef(whole.ravel(), x.ravel())[0, 1] > 0.85
    # Along the groups, a level's parity is that of its state.
    walks = coded_levels.in_groups(np.asarray(leaf.levels.materialize()), 12, 576)
    state = np.zeros((2, 8, 2), np.int32)
    for place in range(576):
        here = walks.reshape(2, 8, 2, 576)[..., place].astype(np.int32)
        assert not ((here ^ state) & 1).any()
        state = np.asarray(trellis.advance(state, here, 8))


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 96, name="embed")(tokens)
        x = x + nn.Dense(96, name="square")(nn.tanh(x))
        x = nn.Dense(192, name="wide")(x)
        return nn.Dense(11, name="head")(nn.gelu(x))


def sampled(joint, count, seed):
    """As measured from so many gradients."""
    root = np.linalg.cholesky(joint)
    x = root @ np.random.default_rng(seed).standard_normal((len(joint), count))
    return x @ x.T / count


def test_the_shrinkage_that_serves_the_other_half():
    joint = joint_of(96)
    many = [sampled(joint, 4000, seed)[None] for seed in (0, 1)]
    assert choose_shrinkage(many) == module.SHRINKAGES[0]
    some = [sampled(joint, 16, seed)[None] for seed in (0, 1)]
    assert 0.1 < choose_shrinkage(some) < 1
    even = [sampled(np.eye(96), 60, seed)[None] for seed in (0, 1)]
    assert choose_shrinkage(even) == 1
    assert choose_shrinkage([np.zeros((3, 96, 96))] * 2) == 1
    drawn = shrunk(many[0], 0.25)
    np.testing.assert_array_equal(drawn.diagonal(0, 1, 2), many[0].diagonal(0, 1, 2))
    np.testing.assert_allclose(drawn[0, 3, 4], 0.75 * many[0][0, 3, 4])


def test_joint_curvatures_are_measured_where_they_are_of_use(monkeypatch):
    kept = []
    monkeypatch.setattr(
        curvature_sums, "choose_shrinkage", lambda halves: kept.extend(halves) or 0.2
    )
    tokens = jax.random.randint(jax.random.key(1), (3, 24), 0, 11)
    params = jax.jit(Model().init)(jax.random.key(0), tokens)["params"]

    def apply(params, tokens):
        return Model().apply({"params": params}, tokens)

    options = {"key": jax.random.key(2), "where": ".*kernel"}
    moments = jc.collect_moments(Model(), params, [tokens])
    batches = [{"tokens": tokens}]
    plain = jc.measure_curvatures(apply, params, batches, moments, **options)
    options["joint"] = True
    found = jc.measure_curvatures(apply, params, batches, moments, **options)
    for name in ("square", "wide", "head"):
        one, other = found[f"{name}/kernel"], plain[f"{name}/kernel"]
        np.testing.assert_allclose(one.curvatures, other.curvatures, rtol=1e-4)
        assert other.joint_curvatures is None
        assert (one.joint_curvatures is not None) == (name == "square")
    known = found["square/kernel"]
    joint = np.asarray(known.joint_curvatures, np.float64)
    np.testing.assert_allclose(np.diag(joint), known.curvatures, rtol=1e-6)
    # The same, from gradients of the tokens it would sample, by hand.
    second = np.asarray(known.second, np.float64)
    second += 0.01 * np.mean(np.diag(second)) * np.eye(96)
    each = []
    for row, at in zip(tokens, (0, 24, 48), strict=True):
        key = jax.random.fold_in(options["key"], at)
        said = jax.random.categorical(key, apply(params, row[None])[0])

        def score(kernel, row=row, said=said):
            tree = {**params, "square": {**params["square"], "kernel": kernel}}
            logs = jax.nn.log_softmax(apply(tree, row[None])[0])
            return jnp.take_along_axis(logs, said[:, None], axis=-1).sum()

        slope = np.asarray(jax.grad(score)(params["square"]["kernel"]), np.float64)
        each.append(slope.T @ np.linalg.solve(second, slope))
    scale = np.abs(sum(each)).max()
    for found_half, half in zip(kept, (each[0] + each[2], each[1]), strict=True):
        np.testing.assert_allclose(found_half[0], half, rtol=1e-3, atol=1e-5 * scale)
    wanted = shrunk(sum(each) / (2 * 72 * 96), 0.2)
    np.testing.assert_allclose(joint, wanted, rtol=1e-3, atol=1e-9)
    plan = jc.planning.plan_rates(
        params, found, bits_per_weight=4.0, where=".*kernel", states=0
    )
    small = jc.compress(params, plan, found)
    assert small["square"]["kernel"].levels.groups == 2
    assert small["wide"]["kernel"].levels.groups == 1
    monkeypatch.setattr(curvature_sums, "choose_shrinkage", lambda halves: 1.0)
    none = jc.measure_curvatures(apply, params, batches, moments, **options)
    assert all(x.joint_curvatures is None for x in none.values())
    np.testing.assert_array_equal(none["square/kernel"].curvatures, known.curvatures)


def test_a_plan_counts_what_feedback_saves():
    """Of two kernels alike but for the feedback the one that gains gets fewer bits."""
    joint = joint_of(192)
    x = jnp.asarray(gaussian(48, 192), jnp.float32)
    known = known_of(covariance(48), joint)
    apart = dataclasses.replace(known, joint_curvatures=None)
    params = {"a": {"kernel": x}, "b": {"kernel": x}}
    moments = {"a/kernel": apart, "b/kernel": known}
    (_, first), (_, second) = jc.planning.plan_rates(
        params, moments, bits_per_weight=3.0, states=0
    )
    rate = [float(rule.split("rate=")[1].split(",")[0]) for rule in (first, second)]

    def cost(counts):  # of an error that is white where outputs are scaled
        squares = rate_coded.SCALES[rate_coded.column_scales(counts)] ** 2
        return np.log2((counts * squares).mean()) - np.log2(squares).mean()

    gain = cost(np.diag(joint)) - cost(output_feedback(joint).curvatures)
    assert gain > 0.15
    assert rate[0] - rate[1] == pytest.approx(gain / 2, rel=0.08)
    # Outputs that have nothing to do with each other cost what they do alone.
    moments["b/kernel"] = known_of(covariance(48), np.diag(np.diag(joint)))
    (_, first), (_, second) = jc.planning.plan_rates(
        params, moments, bits_per_weight=3.0, states=0
    )
    rate = [float(rule.split("rate=")[1].split(",")[0]) for rule in (first, second)]
    assert rate[0] == pytest.approx(rate[1], abs=0.01)


def test_bad_joint_curvatures():
    known = known_of(covariance(16), joint_of(96))
    x = jnp.asarray(gaussian(16, 96), jnp.float32)
    broken = known.joint_curvatures.at[3, 4].set(jnp.nan)
    with pytest.raises(ValueError, match=r"'joint_curvatures' are NaN.*measure"):
        jc.rate_distortion(rate=3.0)(
            x, dataclasses.replace(known, joint_curvatures=broken)
        )
    wrong = 2 * jnp.eye(96) - jnp.ones((96, 96))
    with pytest.raises(ValueError, match="not positive definite; measure them"):
        jc.rate_distortion(rate=3.0)(
            x, dataclasses.replace(known, joint_curvatures=wrong)
        )
    few = dataclasses.replace(known, joint_curvatures=jnp.eye(95))
    with pytest.raises(ValueError, match=r"'joint_curvatures' has shape \(95, 95\)"):
        jc.rate_distortion(rate=3.0)(x, few)


def test_parts_of_a_layer_leave_joint_curvatures_behind():
    known = known_of(covariance(48), joint_of(96))
    x = jnp.asarray(gaussian(48, 96), jnp.float32)
    low = jc.svd(rank=12)(x, known)
    left = low.inner_moments("left", known)
    right = low.inner_moments("right", known)
    assert left.joint_curvatures is None
    assert right.joint_curvatures is known.joint_curvatures
    mixed = jc.mixed_channels(x, known, bits=4, channels=8, axis="outputs")
    for field in ("kept", "rest"):
        assert mixed.inner_moments(field, known).joint_curvatures is None


def test_files_without_groups_are_read():
    """Those written before there were any."""
    node = {"static": {"places": 64, "trellis": 8, "dtype": {"dtype": "int8"}}}
    found = tree_json._static_of(coded_levels.CodedLevels, node, ())
    assert "groups" not in found and coded_levels.CodedLevels.groups == 1


@pytest.mark.parametrize("groups", [0, -2, 5, 97])
def test_groups_that_do_not_fit_are_told(groups):
    x = jnp.asarray(gaussian(16, 96), jnp.float32)
    leaf = jc.rate_distortion(rate=3.0, states=8)(
        x, known_of(covariance(16), joint_of(96))
    )
    static = {"places": 96, "trellis": 8, "kind": "int8", "groups": groups}
    with pytest.raises(ValueError, match=f"{groups} groups of 96 outputs"):
        coded_levels.CodedLevels.restored(leaf.levels.stored(), static)


def test_sums_of_moments_that_say_more_and_less_of_pairs():
    known = known_of(covariance(16), joint_of(96))
    less = dataclasses.replace(known, joint_curvatures=None)
    assert (known + less).joint_curvatures is None
    assert (known + known).joint_curvatures is not None

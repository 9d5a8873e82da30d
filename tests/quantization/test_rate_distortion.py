"""Levels near the rate-distortion bound: the trellis, the coder's contexts, the search.

Oracles are float64 loops from the definitions; quality on a trained model is in
test_reference.
"""

import dataclasses
import functools
import importlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.calibration.error_feedback import inverse_factor
from jaxcompress.coding.levels import (
    contexts,
    generalized_gaussian,
    trellis,
)
from jaxcompress.coding.levels import (
    leaf as coded_levels,
)
from jaxcompress.planning import rates
from jaxcompress.quantization.order_of_inputs import pivots, prepare
from jaxcompress.quantization.rate_distortion import sweep
from jaxcompress.running.decode_once import code_again, decode_once
from jaxcompress.tree.equality import same_bits

search = jax.jit(lambda x, states: trellis.search(x, states)[0], static_argnums=1)
sweep_once = jax.jit(sweep, static_argnames="states")


def follow(levels, states):
    """The states before each level of one walk, from the parity-check definition.

    Bit `i` of a register of `n` is fed the sum of the checks' bits at `n - i`.
    """
    low, high = trellis.CHECKS[states]
    size = states.bit_length() - 1
    register, found = [0] * size, []
    for level in levels:
        found.append(sum(bit << i for i, bit in enumerate(register)))
        first, second = level % 2, level // 2 % 2
        assert first == register[0]
        register = [
            (register[i + 1] if i + 1 < size else 0)
            ^ (low >> (i + 1) & first)
            ^ (high >> (i + 1) & second)
            for i in range(size)
        ]
    return found


def entropy(values):
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(size, decay=4.0, seed=0):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
    scales = np.exp(rng.standard_normal(size) / 2)
    return (
        scales[:, None]
        * ((turn * np.exp(np.linspace(0, -decay, size))) @ turn.T)
        * scales
    )


@pytest.mark.parametrize("states", sorted(trellis.CHECKS))
def test_a_walk_keeps_to_the_code(states):
    levels = np.asarray(search(jnp.asarray(4 * gaussian(40, 5), jnp.float32), states))
    for walk in levels.T:
        by_definition = follow([int(k) for k in walk], states)
        state, seen = jnp.int32(0), []
        for level in walk:
            seen.append(int(state))
            state = trellis.advance(state, jnp.int32(level), states)
        assert seen == by_definition


@pytest.mark.parametrize("states", [8, 128])
def test_a_walk_goes_on_where_another_ended(states):
    x = jnp.asarray(4 * gaussian(20, 5), jnp.float32)
    start = jnp.arange(5, dtype=jnp.int32) * (states // 5)
    levels, end = trellis.search(x, states, start=start)
    state = start
    for level in levels:
        assert (level % 2 == state % 2).all()
        state = trellis.advance(state, level, states)
    assert (state == end).all()


@pytest.mark.parametrize("states", [8, 16])
def test_the_walk_found_is_the_best_of_all(states):
    x = 2 * gaussian(7, 6, seed=1)
    levels = np.asarray(search(jnp.asarray(x, jnp.float32), states))
    for place, walk in zip(x.T, levels.T, strict=True):
        best = math.inf
        # Two choices a place, whether half the level is odd, tell the whole walk.
        for bits in itertools.product((0, 1), repeat=len(place)):
            state, cost = 0, 0.0
            for value, bit in zip(place, bits, strict=True):
                offset = (state & 1) + 2 * bit
                level = 4 * round((value - offset) / 4) + offset
                cost += (value - level) ** 2
                state = int(trellis.advance(np.int32(state), np.int32(level), states))
            best = min(best, cost)
        assert np.sum((place - walk) ** 2) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(("states", "most"), [(8, 0.09), (128, 0.06)])
@pytest.mark.parametrize("step", [0.26, 1.2])
def test_the_trellis_comes_near_the_bound(states, most, step):
    x = gaussian(576, 64, seed=2)
    levels = np.asarray(search(jnp.asarray(x / step, jnp.float32), states))
    odd = levels % 2 == 1
    rate = sum(m.mean() * entropy(levels[m]) for m in (odd, ~odd))
    shrunk = np.sum(levels * x) / np.sum(levels**2.0)
    gap = rate + 0.5 * np.log2(np.mean((x - shrunk * levels) ** 2))
    assert 0 < gap < most
    rounded = np.round(x / (2 * step))
    shrunk = np.sum(rounded * x) / np.sum(rounded**2)
    plain = entropy(rounded) + 0.5 * np.log2(np.mean((x - shrunk * rounded) ** 2))
    assert gap < plain - 0.1


def test_tables_are_densities_and_the_same_everywhere():
    x = np.linspace(-30, 30, 1001)
    np.testing.assert_allclose(generalized_gaussian.exp2(x), np.exp2(x), rtol=4e-15)
    y = np.exp(np.linspace(-10, 10, 1001))
    np.testing.assert_allclose(
        generalized_gaussian.log2(y), np.log2(y), rtol=1e-14, atol=1e-15
    )
    for scale, shape, parity in itertools.product(
        (0, 20, 44, 70, 127), (0, 4, 11), (0, 1)
    ):
        table = generalized_gaussian.table(scale, shape, 2, parity).astype(np.int64)
        assert table.sum() == 4096 and table[-1] >= 1 and table.shape == (512,)
        levels = 2 * np.arange(-255, 256) + parity
        b, s = generalized_gaussian.SHAPES[shape], 2 ** (scale / 8 - 4)
        far = 2 * np.arange(-1020, 1021) + parity
        least = (parity / s) ** b
        shares = np.exp2(least - (np.abs(levels) / s) ** b)
        shares /= np.exp2(least - (np.abs(far) / s) ** b).sum()
        assert np.abs(table[:-1] - 4095 * shares).max() <= 1.5
    # Files depend on these numbers: they may never change.
    assert generalized_gaussian.table(36, 8, 1, 0)[250:261].tolist() == GOLDEN


GOLDEN = [0, 5, 60, 340, 962, 1360, 962, 340, 60, 5, 0]


def test_contexts_cost_what_the_stream_takes():
    rng = np.random.default_rng(3)
    scales = np.exp(rng.uniform(-1, 3, (300, 1))) * np.exp(rng.uniform(0, 1, 200))
    levels = np.rint(rng.standard_normal((300, 200)) * scales).astype(np.int32)
    found = contexts.fit(levels, 1)
    ideal = sum(entropy(row) for row in np.rint(rng.standard_normal((400, 4000)))) / 400
    assert ideal > 0 and 4 <= len(found.parameters) <= contexts.MOST
    words = 16 * coded_levels.code_levels(levels, 0).words.size
    assert abs(words - found.bits) < 0.002 * found.bits
    bits = found.bits / levels.size
    # A Gaussian of every size at its own entropy, within 2 %.
    sizes = np.log2(scales * math.sqrt(2 * math.pi * math.e)).mean()
    assert bits < entropy(levels) - 0.5
    assert sizes < bits < 1.02 * sizes + 0.06


@pytest.mark.slow
@pytest.mark.parametrize("states", [0, 8])
def test_all_levels_come_back(states):
    rng = np.random.default_rng(4)
    levels = np.rint(rng.standard_t(1.5, (2, 40, 700)) * [[[1]], [[30]]]).astype(
        np.int32
    )
    levels = np.clip(levels, -32766, 32766)
    levels[0, 3], levels[1, 5, 7] = 0, 32767 - (states > 0)
    if states:
        count, places = trellis.walks(700)
        for stack, row, walk in np.ndindex(2, 40, count):
            state, part = 0, levels[stack, row, walk * places : (walk + 1) * places]
            for i, level in enumerate(part):
                part[i] = level - (level - state) % 2
                state = int(trellis.advance(np.int32(state), part[i], states))
    coded = coded_levels.code_levels(levels, states)
    np.testing.assert_array_equal(coded.materialize(), levels)
    steps = np.exp2(rng.integers(-9, 3, (2, 40)))
    leaf = jc.RateCoded(
        coded, jnp.asarray(steps, jnp.bfloat16), None, np.dtype("float32")
    )
    weights = np.asarray(jax.jit(lambda leaf: leaf.materialize())(leaf))
    np.testing.assert_array_equal(
        weights, (levels * steps[..., None]).astype("float32")
    )
    one = jax.tree.map(lambda x: x[1], leaf)
    np.testing.assert_array_equal(one.materialize(), weights[1])
    again = type(coded).restored(coded.stored(), statics(coded))
    for a, b in zip(*map(jax.tree.leaves, (coded, again)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def statics(coded):
    return {"places": coded.places, "trellis": coded.trellis, "dtype": coded.dtype}


def test_damaged_bytes_are_told():
    x = jnp.asarray(gaussian(32, 80), jnp.float32)
    leaf = jc.rate_distortion(x, rate=3).levels
    data = np.array(leaf.stored()["stream"])
    for cut in (1, 5, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="damaged"):
            type(leaf).restored({"stream": data[:cut]}, statics(leaf))
    with pytest.raises(ValueError, match="walks of 79 places"):
        type(leaf).restored({"stream": data}, statics(leaf) | {"places": 79})
    with pytest.raises(ValueError, match="trellis of 12 states"):
        type(leaf).restored({"stream": data}, statics(leaf) | {"trellis": 12})
    rng, raised = np.random.default_rng(0), 0
    for _ in range(200):  # anything may come back, but in the right shape, or an error
        bad = data.copy()
        bad[rng.integers(len(data) // 3, size=3)] ^= rng.integers(1, 256, 3, np.uint8)
        try:
            back = type(leaf).restored({"stream": bad}, statics(leaf))
        except ValueError:
            raised += 1
        else:
            assert back.columns.shape[-1] > 0
    assert raised > 20


def by_definition(x, second, scale):
    """Rounding with feedback in natural order, float64: levels, and steps as stored."""
    x, levels, steps = x.astype(np.float64).copy(), [], []
    for j in range(len(x)):
        rest = np.arange(j + 1, len(x))
        inverse = np.linalg.inv(second[j:, j:])
        step = scale * np.sqrt(inverse[0, 0])  # what this row's error is worth
        step = float(jnp.asarray(step, jnp.bfloat16))
        level = np.round(x[j] / step)
        size = np.sum(level**2)
        shrunk = np.sum(level * x[j]) / step / size if size else 0.0
        stored = float(jnp.asarray(shrunk * step, jnp.bfloat16))
        if len(rest):
            pull = np.linalg.solve(second[np.ix_(rest, rest)], second[rest, j])
            x[rest] -= np.outer(pull, stored * level - x[j])
        levels.append(level)
        steps.append(stored)
    return np.array(levels), np.array(steps)


def natural(x, second):
    """Target and factor in natural order, hardly damped."""
    x, second = jnp.asarray(x, jnp.float32), jnp.asarray(second, jnp.float32)
    return prepare(x, second, order="natural", damping=1e-6)[:2]


def test_the_sweep_is_successive_cancellation():
    x, second = gaussian(24, 60), covariance(24)
    target, factor = natural(x, second)
    levels, steps = sweep_once(target, factor, jnp.float32(0.2), states=0)
    second = second + 1e-6 * np.mean(np.diag(second)) * np.eye(24)
    wanted, sizes = by_definition(x, second, 0.2)
    assert np.mean(np.asarray(levels) != wanted) < 0.01
    np.testing.assert_allclose(steps, sizes, rtol=2**-7)

    def loss(levels, steps):
        change = np.asarray(levels) * np.asarray(steps)[:, None] - x
        return np.trace(change.T @ second @ change)

    assert loss(levels, steps) == pytest.approx(loss(wanted, sizes), rel=0.01)
    # Every direction gets the error of a uniform distribution: 1 / 12 of the square.
    fine, steps = sweep_once(target, factor, jnp.float32(0.01), states=0)
    assert loss(fine, steps) / x.size == pytest.approx(0.01**2 / 12, rel=0.1)


@pytest.mark.parametrize("states", [8, 128])
@pytest.mark.parametrize("outputs", [577, 1153, 1190])
def test_walks_that_are_filled_up_come_back(states, outputs):
    """The last walk of a row ends in the zeros that the coder fills it up with."""
    count, places = trellis.walks(outputs)
    assert count * places > outputs
    x = jnp.asarray(gaussian(48, outputs), jnp.float32)
    levels, _ = sweep_once(x, jnp.eye(48), jnp.float32(0.4), states=states)
    coded = coded_levels.code_levels(np.asarray(levels), states)
    np.testing.assert_array_equal(coded.materialize(), levels)
    with pytest.raises(ValueError, match="no walk through a trellis"):
        coded_levels.code_levels(np.asarray(levels) + 1, states)


def test_pivots_explain_most_first():
    second = covariance(12)
    found = list(pivots(second))
    assert sorted(found) == list(range(12))
    for i in range(1, 12):
        done, left = found[:i], [j for j in range(12) if j not in found[:i]]
        inside = np.linalg.solve(second[np.ix_(done, done)], second[np.ix_(done, left)])
        variances = np.diag(second)[left] - np.sum(
            second[np.ix_(done, left)] * inside, 0
        )
        assert left[int(np.argmax(variances))] == found[i]


def test_pivots_of_fewer_tokens_than_inputs():
    """What rounding leaves of explained inputs is not divided by."""
    x = gaussian(12, 64).astype(np.float32)
    second = np.asarray(x.T @ x, np.float64)
    found = pivots(second)
    assert sorted(found) == list(range(64))
    rest = second[np.ix_(found[:12], found[12:])]
    explained = rest.T @ np.linalg.solve(second[np.ix_(found[:12], found[:12])], rest)
    np.testing.assert_allclose(
        explained, second[np.ix_(found[12:], found[12:])], atol=1e-3
    )
    assert sorted(pivots(np.zeros((5, 5)))) == list(range(5))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.7, 2.0, 4.5])
@pytest.mark.parametrize("shape", [(128, 400), (6, 200, 320)])
def test_the_file_meets_the_rate(rate, shape, tmp_path):
    """To half a percent; the steps of the stack are many enough to be coded too."""
    x = gaussian(*shape) * np.exp(gaussian(*shape[:-1], 1, seed=1) / 2)
    moments = jc.moments_from_covariance(
        jnp.broadcast_to(
            jnp.asarray(covariance(shape[-2]), jnp.float32),
            (*shape[:-2], shape[-2], shape[-2]),
        )
    )
    spread = np.exp(gaussian(*shape[:-2], shape[-1], seed=5))
    moments = dataclasses.replace(moments, curvatures=jnp.asarray(spread, jnp.float32))
    leaf = jc.rate_distortion(jnp.asarray(x, jnp.float32), moments, rate=rate, states=8)
    jc.save(tmp_path / "x.safetensors", {"kernel": leaf})
    with jc.open_checkpoint(tmp_path / "x.safetensors") as file:
        bits = 8 * file.nbytes("kernel") / x.size
    assert bits == pytest.approx(rate, rel=0.005)
    np.testing.assert_array_equal(
        jc.load(tmp_path / "x.safetensors")["kernel"].materialize(), leaf.materialize()
    )


def water_filling(variances, distortion):
    low, high = 0.0, float(variances.max())
    for _ in range(100):
        level = (low + high) / 2
        less = np.minimum(variances, level).mean() < distortion
        low, high = (level, high) if less else (low, level)
    return np.maximum(0, 0.5 * np.log2(variances / level)).mean()


@pytest.mark.slow
@pytest.mark.parametrize(("states", "most"), [(0, 0.32), (128, 0.13)])
def test_it_comes_near_the_bound(states, most):
    places = np.arange(96)
    second = 0.9 ** np.abs(np.subtract.outer(places, places))
    x = gaussian(96, 1200)
    moments = jc.moments_from_covariance(jnp.asarray(second, jnp.float32))
    options = {"states": states, "damping": 1e-6, "shrinkage": 0.0}
    leaf = jc.rate_distortion(jnp.asarray(x, jnp.float32), moments, rate=3.0, **options)
    change = np.asarray(leaf.materialize(), np.float64) - x
    distortion = np.sum(change * (second @ change)) / x.size
    bits = 8 * leaf.levels.stored()["stream"].nbytes / x.size + 16 / 1200
    gap = bits - water_filling(np.linalg.eigvalsh(second), distortion)
    assert 0 < gap < most


def test_shrinkage_trusts_correlations_less():
    """On inputs correlated in other ways it loses less, on the calibrated ones more."""
    x = jnp.asarray(gaussian(64, 256), jnp.float32)
    first, other = (covariance(64, seed=seed) for seed in (1, 2))
    lost = {}
    for shrinkage in (0.0, 0.3):
        moments = jc.moments_from_covariance(jnp.asarray(first, jnp.float32))
        leaf = jc.rate_distortion(x, moments, rate=2.5, states=0, shrinkage=shrinkage)
        weak = first - shrinkage * (first - np.diag(np.diag(first)))
        moments = jc.moments_from_covariance(jnp.asarray(weak, jnp.float32))
        options = {"rate": 2.5, "states": 0, "shrinkage": 0.0}
        same = jc.rate_distortion(x, moments, **options)
        near = np.mean(leaf.materialize() == same.materialize())
        assert near > 0.98  # but for how the two were rounded
        change = np.asarray(leaf.materialize() - x, np.float64)
        lost[shrinkage] = [np.trace(change.T @ s @ change) for s in (first, other)]
    assert lost[0.3][0] > lost[0.0][0] and lost[0.3][1] < 0.9 * lost[0.0][1]


def test_the_prior_gives_up_what_is_too_dear():
    """Where the inputs hardly reach some directions, it comes nearer to the bound."""
    turn, _ = np.linalg.qr(gaussian(96, 96, seed=3))
    second = (turn * np.exp(np.linspace(0, -8, 96))) @ turn.T
    x = gaussian(96, 800)
    moments = jc.moments_from_covariance(jnp.asarray(second, jnp.float32))
    gaps = {}
    options = {"damping": 1e-6, "shrinkage": 0.0}
    for prior in (0.0, 0.5):
        leaf = jc.rate_distortion(
            jnp.asarray(x, jnp.float32), moments, rate=2, prior=prior, **options
        )
        change = np.asarray(leaf.materialize(), np.float64) - x
        distortion = np.sum(change * (second @ change)) / x.size
        bits = 8 * leaf.levels.stored()["stream"].nbytes / x.size + 16 / 800
        gaps[prior] = bits - water_filling(np.linalg.eigvalsh(second), distortion)
    assert 0 < gaps[0.5] < gaps[0.0] - 0.04


def test_the_target_with_a_prior_is_ridge_regression():
    second, x = covariance(24), gaussian(24, 40)
    target, factor, first = prepare(
        *(jnp.asarray(a, jnp.float32) for a in (x, second)),
        order="pivoted",
        damping=1e-9,
        ridge=0.3,
    )
    wide = second + 0.3 * np.eye(24)
    wanted = np.linalg.solve(wide, second @ x)[first]
    np.testing.assert_allclose(target, wanted, rtol=1e-3, atol=1e-4)
    inverse = np.linalg.inv(wide)[first][:, first]
    found = np.asarray(factor, np.float64)
    np.testing.assert_allclose(found.T @ found, inverse, rtol=1e-3, atol=1e-4)


def test_each_slice_of_a_stack_has_its_rate():
    x = gaussian(2, 32, 200).astype(np.float32)
    second = np.stack([covariance(32), np.eye(32)]).astype(np.float32)
    moments = jc.moments_from_covariance(jnp.asarray(second))
    leaf = jc.rate_distortion(jnp.asarray(x), moments, rate=(4.0, 2.0), states=8)
    for i, rate in enumerate((4.0, 2.0)):
        alone = jc.rate_distortion(
            jnp.asarray(x[i]),
            jc.moments_from_covariance(jnp.asarray(second[i])),
            rate=rate,
            states=8,
        )
        np.testing.assert_array_equal(
            leaf.levels.materialize()[i], alone.levels.materialize()
        )
        np.testing.assert_array_equal(leaf.steps[i], alone.steps)


@pytest.mark.slow
def test_slices_are_searched_on_all_devices_that_hold_them(monkeypatch):
    module = importlib.import_module("jaxcompress.quantization.rate_distortion")
    used, search = [], module._search
    monkeypatch.setattr(
        module, "_search", lambda x, *rest: used.append(x.devices()) or search(x, *rest)
    )
    x = jnp.asarray(gaussian(4, 24, 40))
    known = jc.Moments(jnp.ones(4), second=jnp.stack([covariance(24)] * 4))
    mesh = jax.make_mesh((2,), ("layers",))
    alone = jc.rate_distortion(rate=3.0, states=8)(x, known)
    assert set().union(*used) == {jax.devices()[0]}
    for spec in (jax.P(), jax.P("layers")):
        used.clear()
        spread = jax.device_put(x, jax.NamedSharding(mesh, spec))
        found = jc.rate_distortion(rate=3.0, states=8)(spread, known)
        assert sorted(map(str, used)) == sorted(str({d}) for d in jax.devices() * 2)
        assert same_bits(found, alone)


@pytest.mark.slow
def test_outputs_that_do_more_are_coded_finer(tmp_path):
    """Errors in inverse proportion to the curvatures, less loss at the same size."""
    second, x = covariance(48), gaussian(2, 48, 600)
    curvatures = np.exp(2 * gaussian(2, 600, seed=5))
    known = jc.moments_from_covariance(jnp.asarray(np.stack([second] * 2), jnp.float32))
    loss = {}
    for name in ("even", "weighted"):
        if name == "weighted":
            found = jnp.asarray(curvatures, jnp.float32)
            known = dataclasses.replace(known, curvatures=found)
        leaf = jc.rate_distortion(jnp.asarray(x, jnp.float32), known, rate=3, states=8)
        jc.save(tmp_path / f"{name}.safetensors", {"kernel": leaf})
        with jc.open_checkpoint(tmp_path / f"{name}.safetensors") as file:
            assert 8 * file.nbytes("kernel") / x.size == pytest.approx(3, rel=0.01)
        back = jc.load(tmp_path / f"{name}.safetensors")["kernel"].materialize()
        np.testing.assert_array_equal(back, leaf.materialize())
        error = np.asarray(back, np.float64) - x
        each = np.einsum("sio,ij,sjo->so", error, second, error)
        loss[name] = (curvatures * each).sum(axis=1)
    gain = np.exp(np.log(curvatures).mean(axis=1)) / curvatures.mean(axis=1)
    assert (loss["weighted"] < 0.5 * loss["even"]).all()
    assert (loss["weighted"] > gain * loss["even"]).all()
    scales = np.asarray(leaf.scales.materialize()).squeeze(1)
    wide = curvatures + curvatures.mean(axis=1, keepdims=True) / 8
    slope = np.log2(wide) / 2 - scales / 4
    assert (np.ptp(slope, axis=1) <= 0.2501).all()
    assert (scales.min(axis=1) == 0).all()


def test_drifted_inputs_get_a_target_of_their_own():
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((3000, 40)) @ rng.standard_normal((40, 40))
    drifted = inputs + 0.7 * rng.standard_normal(inputs.shape) @ np.diag(
        np.arange(40) / 9
    )
    x = rng.standard_normal((40, 120))
    plain = {
        "count": jnp.float32(3000),
        "mean": jnp.asarray(inputs.mean(0), jnp.float32),
        "second": jnp.asarray(inputs.T @ inputs / 3000, jnp.float32),
    }
    moments = jc.Moments(
        **plain,
        drifted=jnp.asarray(drifted.T @ drifted / 3000, jnp.float32),
        cross=jnp.asarray(inputs.T @ drifted / 3000, jnp.float32),
    )
    lost = {}
    for name, given in (("corrected", moments), ("plain", jc.Moments(**plain))):
        leaf = jc.rate_distortion(
            jnp.asarray(x, jnp.float32), given, rate=3.0, states=8
        )
        change = drifted @ np.asarray(leaf.materialize(), np.float64) - inputs @ x
        lost[name] = np.sum(change**2)
    assert lost["corrected"] < 0.9 * lost["plain"]


@pytest.mark.slow
def test_moments_help_and_none_mean_equal_inputs():
    x, second = jnp.asarray(gaussian(64, 300), jnp.float32), covariance(64)
    moments = jc.moments_from_covariance(jnp.asarray(second, jnp.float32))
    lost = []
    for given in (moments, None):
        leaf = jc.rate_distortion(x, given, rate=2.0)
        change = np.asarray(leaf.materialize() - x, np.float64)
        lost.append((np.trace(change.T @ second @ change), np.sum(change**2)))
    assert lost[0][0] < 0.5 * lost[1][0] and lost[0][1] > lost[1][1]
    looked_up = jc.Moments(jnp.float32(7), tokens=jnp.ones(300))
    leaf, same = (jc.rate_distortion(x, m, rate=2.0) for m in (None, looked_up))
    np.testing.assert_array_equal(leaf.materialize(), same.materialize())


def test_an_input_ten_thousand_times_larger():
    """As some models have; its row needs more bits than a table has columns."""
    second = covariance(64)
    large = np.where(np.arange(64) == 5, 1e4, 1.0)
    second = second * np.outer(large, large) + 1e-3 * np.eye(64)
    x = jnp.asarray(gaussian(64, 300), jnp.float32)
    moments = jc.moments_from_covariance(jnp.asarray(second, jnp.float32))
    leaf = jc.rate_distortion(x, moments, rate=3.0, damping=1e-9)
    levels = np.abs(np.asarray(leaf.levels.materialize()))
    assert (
        0.99 * 2**14 < levels[5].max() < 1.01 * 2**14 and leaf.levels.dtype == "int16"
    )
    change = np.asarray(leaf.materialize() - x, np.float64)
    parts = np.sum(change * (second @ change), axis=1)
    assert parts[5] < 0.5 * parts.sum()


def test_scales_of_any_range_come_back():
    """More octaves than kinds: none is taken for the edge that stands for none."""
    scales = np.exp2(np.linspace(0, 14, 300))
    levels = np.rint(gaussian(300, 40) * scales[:, None] / 16).astype(np.int32)
    levels = np.clip(levels * np.exp2(np.linspace(0, 1, 40)), -32767, 32767)
    levels = levels.astype(np.int32)
    coded = coded_levels.code_levels(levels, 0)
    assert int(coded.rows.max()) + int(coded.columns.max()) < 255
    np.testing.assert_array_equal(coded.materialize(), levels)


def test_what_explains_most_goes_last():
    """In any other order the deviations differ less, and the same bits buy less."""
    scales = np.exp(1.5 * gaussian(96, seed=9))
    second = scales[:, None] * covariance(96, decay=4.0) * scales
    moments = jc.moments_from_covariance(jnp.asarray(second, jnp.float32))
    x, lost = jnp.asarray(gaussian(96, 400), jnp.float32), {}
    for order in ("pivoted", "activation", "natural"):
        leaf = jc.rate_distortion(
            x, moments, rate=1.5, states=8, order=order, damping=1e-6
        )
        change = np.asarray(leaf.materialize() - x, np.float64)
        lost[order] = np.sum(change * (second @ change))
    assert lost["pivoted"] < 0.95 * lost["natural"] < lost["activation"]


def test_moments_that_are_none_are_told():
    x = jnp.asarray(gaussian(64, 100), jnp.float32)
    second = jnp.eye(64).at[3, 3].set(-5.0)
    moments = jc.Moments(jnp.float32(9), jnp.zeros(64), second)
    with pytest.raises(ValueError, match="not positive definite"):
        jc.rate_distortion(x, moments, rate=2.0)


def test_zeros_cost_next_to_nothing():
    leaf = jc.rate_distortion(jnp.zeros((64, 200)), rate=3.0)
    assert not np.asarray(leaf.materialize()).any()
    x = jnp.asarray(gaussian(64, 200), jnp.float32).at[10:40].set(0)
    half = jc.rate_distortion(x, rate=2.0)
    assert not np.asarray(half.materialize()[10:40]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "0 to 12 bits"),
        ({"rate": 13.0}, "0 to 12 bits"),
        ({"rate": 2.0, "states": 12}, "states=0 or 8 or .*, not 12"),
        ({"rate": 2.0, "order": "random"}, "'pivoted' or"),
        ({"rate": 2.0, "damping": 0}, "damping above"),
        ({"rate": 2.0, "shrinkage": 1}, "shrinkage at least 0 and below 1"),
        ({"rate": 2.0, "prior": -1}, "prior of 0 or more"),
        ({"rate": (2.0, 3.0)}, "2 rates for a stack of 1"),
        ({"rate": ()}, "0 to 12 bits"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        jc.rate_distortion(jnp.ones((64, 64)), **options)


def test_what_cannot_be_met_is_told():
    x = jnp.asarray(gaussian(200, 3), jnp.float32)
    with pytest.raises(ValueError, match="describe rows and columns"):
        jc.rate_distortion(x, rate=1.0)
    with pytest.raises(ValueError, match=r"\(200, 200\)"):
        jc.rate_distortion(
            x, jc.moments_from_covariance(jnp.eye(100, dtype=jnp.float32)), rate=2.0
        )
    with pytest.raises(ValueError, match="16 bits"):
        coded_levels.code_levels(np.full((4, 4), 40000, np.int32), 0)


def test_steps_train_and_levels_do_not():
    leaf = jc.rate_distortion(jnp.asarray(gaussian(64, 100), jnp.float32), rate=3)
    trainable, frozen = jc.partition({"kernel": leaf})
    arrays = jax.tree.leaves(trainable)
    assert [x.shape for x in arrays] == [(64,)]
    slopes = jax.grad(
        lambda t: jnp.sum(jc.combine(t, frozen)["kernel"].materialize() ** 2)
    )(trainable)
    steps = np.asarray(leaf.steps, np.float64)
    wanted = (
        2
        * steps
        * np.sum(np.asarray(leaf.levels.materialize(), np.float64) ** 2, axis=1)
    )
    np.testing.assert_allclose(
        np.asarray(jax.tree.leaves(slopes)[0], np.float64), wanted, rtol=0.01
    )


def test_products_are_precise_in_the_threads_of_a_stack(monkeypatch):
    """The precision that a method asks for holds in one thread only."""
    seen = []

    def prepare(*given, **options):
        seen.append(jax.config.jax_default_matmul_precision)
        return original(*given, **options)

    # The method hides the module of its name.
    module = importlib.import_module("jaxcompress.quantization.rate_distortion")
    original = module.prepare
    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(rates, "prepare", prepare)
    x = jnp.asarray(np.stack([gaussian(16, 32)] * 3), jnp.float32)
    jc.rate_distortion(x, rate=4, states=0)
    plan_of = {"c": {"kernel": x[0]}}
    jc.planning.plan_rates(plan_of, {}, bits_per_weight=5, where=".*kernel", states=0)
    assert seen == ["highest"] * 4


def test_the_step_is_rounded_where_it_cannot_be_dropped():
    """XLA may drop a cast to bfloat16 and back, and then errors are not fed on."""
    x, factor = jnp.asarray(gaussian(8, 32), jnp.float32), jnp.eye(8)
    run = functools.partial(sweep, states=8)
    program = str(jax.make_jaxpr(run)(x, factor, jnp.float32(0.5)))
    assert "reduce_precision" in program and "bf16" not in program


def test_trained_steps_go_back_to_coded_levels():
    """Decoded once, trained, and coded as before: the same bytes but for the steps."""
    small = {
        "kernel": jc.rate_distortion(
            jnp.asarray(gaussian(64, 100), jnp.float32), rate=3
        ),
        "bias": jnp.zeros(100),
        "norm": jc.code_floats(jnp.ones(4096)),
    }
    coarse = decode_once(small)
    assert coarse["kernel"].levels.dtype == jnp.int8
    trainable, frozen = jc.partition(coarse)
    trainable = jax.tree.map(lambda x: (2 * x + 1).astype(x.dtype), trainable)
    back = code_again(jc.combine(trainable, frozen), small)
    steps = small["kernel"].steps
    steps = (2 * steps + 1).astype(steps.dtype)
    wanted = dataclasses.replace(small["kernel"], steps=steps)
    trained = {"bias": jnp.ones(100), "norm": jnp.full(4096, 3.0)}
    assert same_bits(back, {"kernel": wanted, **trained})


def test_the_factor_is_what_the_theory_names():
    """Its diagonal is one over the deviation of an input given those to come."""
    second = covariance(10)
    factor = inverse_factor(jnp.asarray(second, jnp.float32), damping=1e-9)
    for j in range(10):
        rest = second[j + 1 :, j + 1 :]
        given = second[j, j]
        if len(rest):
            given -= second[j, j + 1 :] @ np.linalg.solve(rest, second[j + 1 :, j])
        assert float(factor[j, j]) ** -2 == pytest.approx(given, rel=1e-3)


def test_inputs_that_count_alike_are_those_of_an_identity():
    x = jnp.asarray(gaussian(12, 8), jnp.float32)
    target, factor, order = prepare(x, None, order="pivoted", damping=0.02)
    same, wanted, natural = prepare(x, jnp.eye(12), order="natural", damping=0.02)
    np.testing.assert_allclose(factor, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(target, same)
    np.testing.assert_array_equal(order, natural)

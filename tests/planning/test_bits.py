"""Plans from one budget: exact where they can be, never worse than uniform, honest."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.calibration import damage as damage_of
from jaxcompress.planning.allocation import Curve, allocate, hull, total_loss
from jaxcompress.planning.bits import CANDIDATES as WIDTHS
from jaxcompress.planning.bits import _sizes
from jaxcompress.tree.paths import entries
from jaxcompress.tree.selection import planned_entries


def curves(seed, parts=4, sizes=4):
    """Costs and losses that are neither convex nor even."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(parts):
        costs = np.cumsum(rng.integers(1, 9, sizes))
        losses = np.sort(rng.exponential(size=sizes))[::-1] * rng.exponential()
        made.append(Curve(costs, losses))
    return made


def every_choice(made):
    """Cost and loss of each combination, by enumeration."""
    for picks in itertools.product(*(range(len(c.costs)) for c in made)):
        pairs = list(zip(made, picks, strict=True))
        yield sum(c.costs[p] for c, p in pairs), sum(c.losses[p] for c, p in pairs)


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_exact_where_the_lagrangian_is(seed):
    made = curves(seed)
    choices = list(every_choice(made))
    least = sum(int(c.costs[0]) for c in made)
    most = sum(int(c.costs[-1]) for c in made)
    exact = 0
    steepest = max(
        (c.losses[a] - c.losses[b])
        for c in made
        for a, b in itertools.pairwise(hull(c))
    )
    for limit in range(least, most + 1):
        picks = allocate(made, limit)
        cost = sum(c.costs[p] for c, p in zip(made, picks, strict=True))
        best = min(loss for cost, loss in choices if cost <= limit)
        found = total_loss(made, picks)
        assert cost <= limit
        # At most one step of a hull is missing.
        assert best - 1e-12 <= found <= best + steepest
        exact += found <= best + 1e-12
    # What the Lagrangian finds: the least of loss + price * cost, for every price.
    for price in np.geomspace(1e-3, 10, 40):
        cost, loss = min(choices, key=lambda pair: pair[1] + price * pair[0])
        assert total_loss(made, allocate(made, int(cost))) == pytest.approx(loss)
    assert exact > (most - least) / 2


def test_a_limit_below_the_smallest_is_refused():
    with pytest.raises(ValueError, match="3 below the smallest"):
        made = curves(0)
        allocate(made, sum(int(c.costs[0]) for c in made) - 3)


def test_the_hull_is_convex_and_below():
    for made in (curves(seed, parts=1, sizes=12)[0] for seed in range(5)):
        kept = hull(made)
        slopes = np.diff(made.losses[kept]) / np.diff(made.costs[kept])
        assert kept[0] == 0 and kept[-1] == 11 and np.all(np.diff(slopes) > 0)
        line = np.interp(made.costs, made.costs[kept], made.losses[kept])
        assert np.all(made.losses >= line - 1e-12)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "embed": {"embedding": draw(64, 64)},
        "a": {"kernel": draw(64, 128), "bias": draw(128)},
        "b": {"kernel": draw(2, 128, 64)},
    }


LAYOUT = {"b/kernel": jc.Layout((0,), (1,), (2,))}
NAMES = ["a/kernel", "b/kernel", "embed/embedding"]
SENSITIVITY = {"a/kernel": 1.0, "b/kernel": 0.01, "embed/embedding": 100.0}
BLIND = "ignore:plan_bits got neither:UserWarning"
CANDIDATES = [f"symmetric(bits={bits}, block=32)" for bits in (2, 3, 4, 6, 8)]


def planned_bytes(params, recipe):
    small = jc.compress(params, recipe, layouts=LAYOUT)
    a, b, e = small["a"]["kernel"], small["b"]["kernel"], small["embed"]["embedding"]
    return jc.nbytes((a, b, e)), small


def bits_of(rules):
    return {
        name.replace("\\", ""): int(f.split("bits=")[1].split(",")[0])
        for name, f in rules
    }


def damage(params, small, sensitivity=SENSITIVITY):
    total = 0.0
    for name in NAMES:
        top, last = name.split("/")
        x = np.asarray(params[top][last], np.float64)
        change = np.asarray(small[top][last].materialize(), np.float64) - x
        total += sensitivity[name] * (change**2).sum() / (x**2).sum()
    return total


def test_sensitive_leaves_get_more_bits_within_the_budget(params):
    plan = {"sensitivities": SENSITIVITY, "candidates": CANDIDATES, "layouts": LAYOUT}
    uniform, middle = planned_bytes(
        params, [("embed/embedding|.*kernel", CANDIDATES[2])]
    )
    rules = jc.planning.plan_bits(params, nbytes=uniform, **plan)
    assert sorted(bits_of(rules)) == NAMES
    bits = bits_of(rules)
    assert bits["b/kernel"] < bits["a/kernel"] < bits["embed/embedding"]
    size, small = planned_bytes(params, rules)
    assert uniform * 0.8 < size <= uniform
    assert damage(params, small) < 0.3 * damage(params, middle)
    # The best of all 125 plans, by their measured damage.
    best = np.inf
    for choice in itertools.product(CANDIDATES, repeat=3):
        recipe = list(zip(NAMES, choice, strict=True))
        cost, other = planned_bytes(params, recipe)
        if cost <= uniform:
            best = min(best, damage(params, other))
    assert damage(params, small) == pytest.approx(best, rel=1e-4)
    whole = sum(params[n.split("/")[0]][n.split("/")[1]].nbytes for n in NAMES)
    fraction = (uniform + 0.5) / whole
    assert jc.planning.plan_bits(params, fraction=fraction, **plan) == rules


@pytest.mark.filterwarnings(BLIND)
def test_uniform_is_taken_where_nothing_is_better(params):
    twins = {name: {"kernel": params["a"]["kernel"] + 0} for name in "abc"}
    small = jc.compress(twins, CANDIDATES[1])
    rules = jc.planning.plan_bits(twins, nbytes=jc.nbytes(small), candidates=CANDIDATES)
    assert [f for _, f in rules] == [CANDIDATES[1]] * 3


@pytest.mark.filterwarnings(BLIND)
def test_coded_plans_count_coded_bytes(params):
    part = {"a": params["a"]}
    options = {"candidates": CANDIDATES[:3], "coded": True}
    recipe = jc.chain([("a/kernel", CANDIDATES[1])], "entropy_code()", "code_floats()")
    exact = jc.nbytes(jc.compress(part, recipe)["a"]["kernel"])
    found = jc.planning.plan_bits(part, nbytes=exact, **options)
    assert jc.nbytes(jc.compress(part, found)["a"]["kernel"]) == exact
    lower = jc.planning.plan_bits(part, nbytes=exact - 1, **options)
    assert jc.nbytes(jc.compress(part, lower)["a"]["kernel"]) < exact


def test_none_keeps_a_leaf_and_patterns_choose(params):
    rules = jc.planning.plan_bits(
        params,
        fraction=1.0,
        candidates=[CANDIDATES[0], None],
        where="a/kernel|embed.*",
        sensitivities=SENSITIVITY,
    )
    assert dict(rules) == {"a/kernel": None, "embed/embedding": None}


def test_a_plan_without_data_says_what_it_rests_on(params):
    part = {"a": params["a"]}
    with pytest.warns(UserWarning, match="neither sensitivities nor curvatures.*meas"):
        jc.planning.plan_bits(part, fraction=0.2)
    known = jc.moments_from_covariance(jnp.eye(64))
    with pytest.warns(UserWarning, match="rests on rounding errors alone"):
        jc.planning.plan_bits(part, fraction=0.2, moments={"a/kernel": known})
    jc.planning.plan_bits(part, fraction=0.2, sensitivities=SENSITIVITY)  # no warning


@pytest.mark.filterwarnings(BLIND)
def test_without_data_no_leaf_pays_for_being_large():
    """Each weight counts alike: none falls below the bits that all could have."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {f"l{i}": {"kernel": draw(64, 64)} for i in range(8)}
    params["wide"] = {"kernel": draw(64, 1024)}
    size = lambda wide: jc.nbytes(jc.compress(params, WIDTHS[wide - 2]))  # noqa: E731
    for budget in ((size(3) + size(4)) // 2, size(5) + 5000):
        found = bits_of(jc.planning.plan_bits(params, nbytes=budget)).values()
        least = max(b for b in range(2, 9) if size(b) <= budget)
        assert min(found) == least


@pytest.mark.filterwarnings(BLIND)
def test_embeddings_keep_six_bits_where_no_one_else_needs_them():
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {f"l{i}": {"kernel": draw(64, 128)} for i in range(8)}
    params["embed"] = {"embedding": draw(128, 64)}
    size = lambda wide: jc.nbytes(jc.compress(params, WIDTHS[wide - 2]))  # noqa: E731
    found = bits_of(jc.planning.plan_bits(params, nbytes=(size(4) + size(5)) // 2))
    assert found["embed/embedding"] >= 6 and min(found.values()) == 4
    found = bits_of(jc.planning.plan_bits(params, nbytes=size(4)))
    assert set(found.values()) == {4}, "nobody says that it deserves what others lose"
    given = {"candidates": list(WIDTHS)}
    found = bits_of(
        jc.planning.plan_bits(params, nbytes=(size(4) + size(5)) // 2, **given)
    )
    assert found["embed/embedding"] == 5 and set(found.values()) == {4, 5}


def test_an_embedding_counts_twice_where_it_is_the_head():
    draw = lambda *shape: jnp.ones(shape, jnp.float32)  # noqa: E731
    tree = {
        "embed": {"embedding": draw(512, 64)},
        "position": {"embedding": draw(128, 64)},
        "out": {"kernel": draw(64, 96), "bias": draw(512)},
    }

    def uses(tree, moments=None):
        planned = planned_entries(tree, moments, ".*(kernel|embedding)")
        sizes = _sizes(tree, planned)
        return {e.name: sizes[e.name] / e.value.size for e in planned}

    once = {"embed/embedding": 1, "position/embedding": 1, "out/kernel": 1}
    assert uses(tree) == once | {"embed/embedding": 2}
    headed = tree | {"out": {"kernel": draw(64, 512)}}
    assert uses(headed) == once
    stored = tree | {"head": {"weight": draw(512, 64)}}  # [outputs, inputs]
    assert uses(stored) == once, "not planned, and the head all the same"
    looked = jc.Moments(jnp.float32(9), tokens=draw(512))
    assert uses(tree, {"embed/embedding": looked}) == once
    both = dataclasses.replace(looked, second=jnp.eye(64))
    assert uses(headed, {"embed/embedding": both}) == once | {"embed/embedding": 2}


def with_moments(params):
    scale = jnp.where(jnp.arange(64) < 4, 10.0, 0.1)
    return {"a/kernel": jc.moments_from_covariance(jnp.diag(scale**2))}


def test_sensitivities_are_the_curvature_of_the_loss(params):
    """A quadratic loss: its growth over the squared relative error, by definition."""
    curvature = {"a": 3.0, "b": 0.5, "embed": 7.0}

    def loss(tree):
        total = 0.25
        for top, slope in curvature.items():
            (name,) = (k for k in params[top] if k != "bias")
            change = tree[top][name] - params[top][name]
            size = jnp.sum(jnp.square(params[top][name]))
            total += slope * jnp.sum(jnp.square(change)) / size
        return total

    found = jc.measure_sensitivities(
        jax.jit(loss), params, layouts=LAYOUT, key=jax.random.key(0)
    )
    for name, value in found.items():
        assert value == pytest.approx(curvature[name.split("/")[0]], rel=1e-3)
    # By the outputs: noise where the inputs are small counts for little.
    moments = with_moments(params)
    second = np.asarray(moments["a/kernel"].second)

    def by_output(tree):
        change = tree["a"]["kernel"] - params["a"]["kernel"]
        return 2.0 * jnp.sum(change * (second @ change))

    x = np.asarray(params["a"]["kernel"], np.float64)
    found = jc.measure_sensitivities(
        jax.jit(by_output),
        params,
        moments=moments,
        where="a/kernel",
        key=jax.random.key(1),
    )
    assert found["a/kernel"] == pytest.approx(2 * np.sum(x * (second @ x)), rel=1e-3)


@pytest.mark.filterwarnings(BLIND)
def test_moments_judge_by_outputs(params):
    """gptq has the larger weight error; only by its outputs is it the better one."""
    rng = np.random.default_rng(4)
    mix = rng.standard_normal((64, 64)) * np.exp(-np.arange(64) / 8)
    moments = {"a/kernel": jc.moments_from_covariance(jnp.asarray(mix @ mix.T))}
    part = {"a": {"kernel": params["a"]["kernel"]}}
    both = ["symmetric(bits=3, block=32, search=True)", "gptq(bits=3, block=32)"]
    size = jc.nbytes(jc.compress(part, both[0]))
    for candidates in (both, both[::-1]):
        rules = jc.planning.plan_bits(
            part, nbytes=size, candidates=candidates, moments=moments
        )
        assert rules == [("a/kernel", both[1])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fraction": 0.001},
            r"below the \d+ that the smallest .* 2\.\d+ bits per wei",
        ),
        ({"fraction": 0}, "fraction of the bytes now"),
        ({"fraction": 1.5}, "at most 1"),
        ({"fraction": True}, "fraction of the bytes now .*, not True"),
        ({"candidates": []}, "list of candidates"),
        ({"candidates": "symmetric(bits=4)"}, "list of candidates"),
        ({"candidates": ["symmetric(bits=9)"]}, "^a/kernel: .*from 1 to 8, not 9"),
        ({"sensitivities": {"a/kernel": 1.0}}, "^b/kernel: no sensitivity"),
        ({"sensitivities": SENSITIVITY | {"a/kernel": -1.0}}, "^a/kernel: a sensit"),
        (
            {"sensitivities": SENSITIVITY | {"b/kernel": float("nan")}},
            "^b/kernel: a sensitivity of nan",
        ),
        ({"layouts": {}}, "^b/kernel: shape .* 3 axes"),
        ({"where": "nope"}, "matches no leaf"),
    ],
)
def test_bad_plans_say_what_to_do(params, options, message):
    options = {
        "fraction": 0.2,
        "layouts": LAYOUT,
        "candidates": CANDIDATES[:1],
    } | options
    with pytest.raises(ValueError, match=message):
        jc.planning.plan_bits(params, **options)


def test_curvatures_take_the_place_of_sensitivities():
    """The damage is a sum over outputs, in nats; the larger one gets more bits."""
    rng = np.random.default_rng(0)
    params = {
        n: {"kernel": jnp.asarray(rng.standard_normal((64, 96)), jnp.float32)}
        for n in "ab"
    }
    covariance = 0.5 * np.eye(64) + 0.5
    moments = jc.moments_from_covariance(jnp.asarray(covariance, jnp.float32))
    sizes = {"a": rng.uniform(0, 1, 96), "b": rng.uniform(0, 100, 96)}
    curved = {
        f"{n}/kernel": dataclasses.replace(moments, curvatures=jnp.asarray(c))
        for n, c in sizes.items()
    }
    candidates = [f"symmetric(bits={b}, block=64)" for b in (2, 4, 6)]
    budget = jc.nbytes(jc.compress(params, candidates[1]))
    plan = jc.planning.plan_bits(
        params, nbytes=budget, candidates=candidates, moments=curved
    )
    assert [method for _, method in plan] == [candidates[0], candidates[2]]

    def damage(name, method):
        small = jc.compress(params[name], method)["kernel"].materialize()
        error = np.asarray(small - params[name]["kernel"], np.float64)
        return np.sum(sizes[name] * error * (covariance @ error))

    stacked = {"c": {"kernel": jnp.stack([params[n]["kernel"] for n in "ab"])}}
    both = jax.tree.map(lambda *a: jnp.stack(a), *curved.values())
    options = {"layouts": {"c/kernel": jc.Layout((0,), (1,), (2,))}}
    (entry,) = entries(stacked, {"c/kernel": both}, options["layouts"])
    small = jc.compress(stacked, candidates[0], **options)["c"]["kernel"]
    found = damage_of.divergence(entry, small)
    wanted = damage("a", candidates[0]) + damage("b", candidates[0])
    assert found == pytest.approx(wanted, rel=1e-4)

    given = {f"{n}/kernel": 1.0 for n in "ab"}
    same = jc.planning.plan_bits(
        params,
        nbytes=budget,
        candidates=candidates,
        moments=curved,
        sensitivities=given,
    )
    assert [method for _, method in same] == [candidates[1]] * 2, "as it is told"
    for name in "ab":
        entry = next(e for e in entries(params, curved) if e.name == f"{name}/kernel")
        small = jc.compress(params[name], candidates[0])["kernel"]
        found = damage_of.divergence(entry, small)
        assert found == pytest.approx(damage(name, candidates[0]), rel=1e-4)
    zero = dataclasses.replace(moments, curvatures=jnp.zeros(96))
    with pytest.raises(ValueError, match="a/kernel: curvatures that are all zero"):
        jc.planning.plan_bits(
            params, nbytes=budget, moments=curved | {"a/kernel": zero}
        )
    few = dataclasses.replace(moments, curvatures=jnp.ones(3))
    with pytest.raises(ValueError, match=r"a/kernel: .*'curvatures' has shape \(3,\)"):
        jc.planning.plan_bits(params, nbytes=budget, moments=curved | {"a/kernel": few})
    curved["a/kernel"] = moments
    jc.planning.plan_bits(params, nbytes=budget, moments=curved, sensitivities=given)
    with pytest.raises(ValueError, match="a/kernel: no curvatures, and others"):
        jc.planning.plan_bits(
            params, nbytes=budget, candidates=candidates, moments=curved
        )


def test_bad_weights_losses_and_traces_are_refused(params):
    bad = {"a": {"kernel": params["a"]["kernel"].at[0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"^a/kernel: 1 of 8192 weights are NaN"):
        jc.planning.plan_bits(bad, fraction=0.5, candidates=CANDIDATES[:1])
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"^a/kernel: the loss is .* nan"):
        jc.measure_sensitivities(
            lambda tree: jnp.log(-(tree["a"]["kernel"][0, 0] ** 2)),
            params,
            where="a/kernel",
            key=key,
        )
    with pytest.raises(ValueError, match="sizes of noise above 0"):
        jc.measure_sensitivities(lambda tree: 0.0, params, sizes=(0,), key=key)
    with pytest.raises(TypeError, match="plan_bits reads values on the host"):
        jax.jit(lambda p: jc.planning.plan_bits(p, fraction=0.5))(params)

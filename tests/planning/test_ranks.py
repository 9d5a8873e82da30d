"""Plans of ranks: within their budget, and nearly the best there are."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices_for_tests import correlated, moments_of, output_loss, random, squared

import jaxcompress as jc
from jaxcompress.planning.ranks import plan_ranks


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
    small = jc.compress(params, recipe, layouts=LAYOUT)
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
    recipe = plan_ranks(params, fraction=budget, layouts=LAYOUT, relative=False)
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
        params, nbytes=int(limit), layouts=LAYOUT, relative=False
    )


def test_a_plan_by_curvatures():
    """What does the model more harm keeps more ranks; all must have them, or none."""
    params = {n: {"kernel": random(64, 96, seed=i)} for i, n in enumerate("ab")}
    moments = {
        f"{n}/kernel": dataclasses.replace(
            moments_of(correlated(64)), curvatures=jnp.full(96, size)
        )
        for n, size in (("a", 1.0), ("b", 30.0))
    }
    ranks = []
    for known in (moments, {k: without(x) for k, x in moments.items()}):
        plan = dict(plan_ranks(params, fraction=0.6, moments=known))
        ranks.append([int(re.search(r"rank=(\d+)", x)[1]) for x in plan.values()])
    assert ranks[0][1] > 2 * ranks[0][0]
    assert abs(ranks[1][1] - ranks[1][0]) < 4
    moments["a/kernel"] = without(moments["a/kernel"])
    with pytest.raises(ValueError, match="a/kernel: no curvatures, and others"):
        plan_ranks(params, fraction=0.6, moments=moments)


def without(moments):
    return dataclasses.replace(moments, curvatures=None)


def test_a_plan_by_loss():
    params = {n: tree()[n] for n in ("a", "b")}
    rows = {"a/kernel": 0.1 * correlated(64), "b/kernel": correlated(64, seed=4)}
    moments = {name: moments_of(r) for name, r in rows.items()}
    recipes = [
        plan_ranks(params, fraction=0.4, moments=moments),
        plan_ranks(params, fraction=0.4),
        "svd(fraction=0.4)",
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
    recipe = plan_ranks(params, fraction=budget, where=".*", relative=False)
    small = jc.compress(params, recipe)
    loss = sum(squared(x, small[name]) for name, x in params.items())
    total = sum(x.size for x in params.values())
    assert jc.nbytes(small) <= 4 * budget * total
    best = brute_force(params.values(), budget * total)
    every = sum(squared(x, np.zeros_like(x)) for x in params.values())
    assert best <= (1 + 1e-6) * loss and loss <= best + 0.05 * every


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fraction": 0}, "fraction of the bytes now"),
        ({"fraction": 1.5}, "at most 1"),
        ({"fraction": True}, "fraction of the bytes now"),
        ({"fraction": 0.001}, "below the .* that the smallest ranks take"),
        ({"fraction": 0.5, "where": "nothing"}, "matches no leaf"),
        ({"fraction": 0.5, "where": "norm/scale"}, "norm/scale needs a matrix"),
        ({"fraction": 0.5, "layouts": None}, r"c\.d/kernel: shape .* pass layout"),
        ({"fraction": 0.5, "moments": {}}, "a/kernel: no second moment"),
    ],
)
def test_plans_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        plan_ranks(tree(), **{"layouts": LAYOUT, **options})


def test_plans_refuse_tracers_and_trees_without_kernels():
    with pytest.raises(TypeError, match="plan_ranks reads values on the host"):
        jax.jit(lambda p: plan_ranks(p, fraction=0.5))(tree())
    with pytest.raises(ValueError, match="takes no leaf of this tree"):
        plan_ranks({"scale": random(64)}, fraction=0.5)

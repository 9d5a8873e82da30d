"""Containers of parameters: `FrozenDict`, training states, numbers, shared arrays."""

import os
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

import jaxcompress as jc
from jaxcompress.tree import containers

MODEL, X = nn.Dense(64, name="layer"), jnp.ones((4, 64))
KERNEL = jax.random.normal(jax.random.key(0), (64, 64))
PARAMS = {"kernel": KERNEL, "bias": jnp.zeros(64)}
STATE = TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.adam(1e-3))
AS_DICT = {"params": PARAMS, "opt_state": STATE.opt_state, "step": 0}

DOORS = {
    "compress": lambda tree, to: jc.compress(tree, "symmetric(bits=8)"),
    "find_layouts": lambda tree, to: jc.find_layouts(MODEL, tree, X),
    "collect_moments": lambda tree, to: jc.collect_moments(MODEL, tree, [X]),
    "blockwise": lambda tree, to: jc.compress_blockwise(
        MODEL, tree, "symmetric(bits=8)", [X], blocks=""
    ),
    "check": lambda tree, to: jc.check(MODEL, tree, X),
    "explain": lambda tree, to: jc.explain(tree, "symmetric(bits=8)"),
    "report": lambda tree, to: jc.report(tree, tree),
    "plan": lambda tree, to: jc.planning.plan_bits(tree, bits_per_weight=4.0),
    "partition": lambda tree, to: jc.partition(tree),
    "qat": lambda tree, to: jc.qat.prepare("symmetric(bits=4)")(tree),
    "save": lambda tree, to: jc.save(to, tree),
    "save_orbax": lambda tree, to: jc.save_orbax(to, tree),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_state_of_training_is_sent_back_for_its_params(door, tmp_path):
    with pytest.raises(TypeError, match=r"Pass state\.params.*replace\(params"):
        DOORS[door](STATE, tmp_path / "a")
    with pytest.raises(TypeError, match=r'Pass state\["params"\]'):
        DOORS[door](AS_DICT, tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_other_trees_with_params_are_trees():
    containers.check_tree({"params": PARAMS, "batch_stats": {}})
    containers.check_tree({"optimizer": PARAMS})
    containers.check_tree(SimpleNamespace(params=1))


NESTED = {"a": freeze({"b": {"c": KERNEL}}), "d": [{"e": 1}, (freeze({}), 2)]}


def test_paths_of_frozen_dicts_leave_out_dicts_in_them():
    paths = containers.frozen_paths(NESTED)
    assert paths == [("a",), ("d", 1, 0)]
    assert containers.frozen_paths(freeze(NESTED)) == [(), ("d", 1, 0)]
    assert containers.frozen_paths({"a": {}, "b": [jnp.ones(1)]}) == []
    plain = {"a": {"b": {"c": KERNEL}}, "d": [{"e": 1}, ({}, 2)]}
    back = containers.freeze_at(plain, paths)
    assert jax.tree.structure(back) == jax.tree.structure(NESTED)
    assert type(plain["a"]) is dict and type(plain["d"][1][0]) is dict
    with pytest.raises(LookupError):
        containers.freeze_at(plain, [("z",)])


@pytest.mark.slow
def test_a_frozen_dict_stays_one_in_every_operation():
    params = freeze({"layer": {"kernel": KERNEL}})
    small = jc.compress(params, "symmetric(bits=8)")
    trees = [
        small,
        jc.materialize(small),
        *jc.partition(small),
        jc.combine(*jc.partition(small)),
        jc.tree.average([small, params]),
        jc.qat.convert(jc.qat.prepare("symmetric(bits=8)")(params)),
    ]
    assert all(isinstance(tree["layer"], FrozenDict) for tree in trees)


def test_numbers_in_the_tree_are_no_weights():
    params = {"layer": {"kernel": KERNEL}, "temperature": 1.5}

    def model(params, x):
        return x @ params["layer"]["kernel"] * params["temperature"]

    moments = jc.collect_moments(model, params, [X])
    assert list(moments) == ["layer/kernel"]
    small = jc.compress_blockwise(
        model, params, "symmetric(bits=8)", [X], blocks="layer"
    )
    assert small["temperature"] == 1.5
    assert isinstance(small["layer"]["kernel"], jc.Quantized)
    assert "layer/kernel" in str(jc.explain(params, "symmetric(bits=8)"))


def test_one_array_under_two_names_stays_one(tmp_path):
    params = {"a": {"kernel": KERNEL}, "b": {"kernel": KERNEL}}
    recipe = jc.chain("svd(rank=8)", [(".*(left|right)", "symmetric(bits=8)")])
    small = jc.compress(params, recipe)
    assert small["a"]["kernel"] is small["b"]["kernel"]
    dense = jc.materialize(small)
    assert dense["a"]["kernel"] is dense["b"]["kernel"]
    alone = jc.compress({"a": params["a"]}, recipe)
    assert jc.nbytes(small) == jc.nbytes(alone)
    jc.save(tmp_path / "two", small)
    jc.save(tmp_path / "one", alone)
    assert os.path.getsize(tmp_path / "two") < os.path.getsize(tmp_path / "one") + 200
    back = jc.load(tmp_path / "two")
    assert back["a"]["kernel"] is back["b"]["kernel"]


def test_one_array_with_two_results_is_two():
    params = {"a": {"kernel": KERNEL}, "b": {"kernel": KERNEL}}
    rules = [("a/kernel", "symmetric(bits=8)"), ("b/kernel", "symmetric(bits=4)")]
    small = jc.compress(params, rules)
    np.testing.assert_allclose(small["a"]["kernel"], KERNEL, atol=0.05)
    assert small["b"]["kernel"].bits == 4
    copies = {"a": {"kernel": KERNEL}, "b": {"kernel": KERNEL + 0}}
    small = jc.compress(copies, "symmetric(bits=8)")
    assert small["a"]["kernel"] is not small["b"]["kernel"]


TWICE = {"a/b": {"kernel": KERNEL}, "a": {"b": {"kernel": KERNEL}}}


@pytest.mark.parametrize("door", ["compress", "find_layouts", "blockwise", "report"])
def test_two_leaves_of_one_name_are_refused(door, tmp_path):
    with pytest.raises(ValueError, match=r"a/b/kernel.*rename the keys"):
        DOORS[door](TWICE, tmp_path / "a")

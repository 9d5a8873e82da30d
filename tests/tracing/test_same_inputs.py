"""Weights that meet the same rows share one array of moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

KEY = jax.random.key(3)
WEIGHTS = {name: jax.random.normal(KEY, (16, 8)) for name in "abcd"}
BATCHES = [{"x": jax.random.normal(jax.random.key(i), (32, 16))} for i in range(2)]
ALL = {"where": ".*"}


def shares(a, b):
    return a.second is b.second


def test_weights_share_where_they_meet_the_same_rows_and_only_there():
    def model(w, batch):
        x, scaled = batch["x"], 2 * batch["x"]
        return (
            x @ w["a"] + x @ w["b"] + scaled @ w["c"] + (x @ w["d"] + x[::-1] @ w["d"])
        )

    found = jc.collect_moments(model, WEIGHTS, BATCHES, **ALL)
    assert shares(found["a"], found["b"])
    assert not any(shares(found["a"], found[name]) for name in "cd")
    x = np.concatenate([each["x"] for each in BATCHES]).astype(np.float64)
    second = x.T @ x / len(x)
    for name, factor in {"a": 1, "b": 1, "c": 4, "d": 1}.items():
        np.testing.assert_allclose(found[name].second, factor * second, atol=2e-5)
    assert int(found["d"].count) == 2 * int(found["a"].count)


def test_columns_that_are_stored_transposed_keep_their_own_layout():
    def model(w, batch):
        return batch["x"] @ w["a"] + batch["x"] @ w["b"].T

    weights = {"a": WEIGHTS["a"], "b": WEIGHTS["b"].T}
    found = jc.collect_moments(model, weights, BATCHES, **ALL)
    assert shares(found["a"], found["b"])
    assert found["a"].layout != found["b"].layout
    small = jc.compress(weights, [(".*", "gptq(bits=4)")], found)
    assert jc.materialize(small)["b"].shape == (8, 16)


def test_a_batch_that_takes_another_way_is_told():
    def model(w, batch):
        x = batch["x"]
        return x @ w["a"] + (x if len(x) == 32 else 2 * x) @ w["b"]

    other = {"x": jnp.ones((8, 16))}
    with pytest.raises(ValueError, match=r"b: other inputs .* batches of one shape"):
        jc.collect_moments(model, WEIGHTS, [BATCHES[0], other], where="a|b")


@pytest.mark.filterwarnings("ignore:too few")
@pytest.mark.slow
@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_queries_keys_and_values_share(scan, tmp_path):
    model = jc.models.Transformer(
        vocab_size=32,
        width=32,
        layers=2,
        heads=2,
        kv_heads=2,
        head_size=16,
        mlp_width=48,
        scan=scan,
    )
    tokens = jax.random.randint(KEY, (3, 8), 0, 32)
    params = jax.jit(model.init)(KEY, tokens)["params"]
    batches = [{"tokens": tokens}]
    where = ".*kernel"
    found = jc.collect_moments(model, params, batches, where=where)
    alike = {}
    for name, moments in found.items():
        alike.setdefault(id(moments.second), set()).add(name.split("/")[-2])
        alone = jc.collect_moments(model, params, batches, where=name)[name]
        np.testing.assert_array_equal(moments.second, alone.second, err_msg=name)
    groups = sorted(sorted(names) for names in alike.values())
    wanted = [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
    ]
    assert groups == sorted(wanted * (1 if scan else 2)), groups
    by_block = jc.measure_curvatures_blockwise(
        model, params, batches, where=where, key=KEY, store=tmp_path
    )
    assert len({x.second.filename for x in by_block.values()}) == len(groups)
    plain = jc.measure_curvatures(
        jc.evaluation.Apply(model), params, batches, found, where=where, key=KEY
    )
    for name, moments in plain.items():
        close = {"rtol": 1e-4, "atol": 1e-5 * float(moments.curvatures.max())}
        np.testing.assert_allclose(
            by_block[name].curvatures, moments.curvatures, err_msg=name, **close
        )

"""Weights that a model slices, joins, scales or picks: layouts, moments by NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxcompress as jc

N, INS, OUTS = 12, 8, 6
X = np.asarray(jax.random.normal(jax.random.key(0), (N, INS)))
STACK = np.asarray(jax.random.normal(jax.random.key(1), (3, INS, OUTS)))
SQUARES = np.asarray(jax.random.normal(jax.random.key(2), (3, INS, INS)))
CHOICE = np.asarray([0, 2, 2, 0, 0, 2, 0, 2, 0, 0, 2, 2])  # the second slice rests
PLAIN, THREE = jc.Layout((), (0,), (1,)), jc.Layout((0,), (1,), (2,))


def second(*rows):
    """Mean of the outer products of rows, float64."""
    rows = np.concatenate([np.asarray(r, np.float64) for r in rows])
    return rows.T @ rows / max(1, len(rows))


def of_slices(*rows):
    return np.stack([second(r) for r in rows])


def loop(p, x):
    def turn(i, x):
        w = jax.lax.dynamic_index_in_dim(p["w"], i, keepdims=False)
        return jnp.tanh(x @ w)

    return jax.lax.fori_loop(0, 3, turn, x)


def looped_inputs():
    xs = [X]
    for w in SQUARES[:2]:
        xs.append(np.tanh(xs[-1] @ w))
    return xs


def sharded(p, x):
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((1,), ("d",), axis_types=(kind,))
    spec = PartitionSpec("d")
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    return product(x, p["w"])


def hot(choice, x):
    """One-hot vectors of indices that the trace takes for the batch's."""
    return jax.nn.one_hot(jnp.asarray(choice) + jnp.int32(0 * x[0, 0]), 3)


W = {"w": STACK[0]}
ORDER = np.asarray([3, 0, 7, 1, 5, 2, 6, 4])
CASES = {
    "static slices, one at rest": (
        lambda p, x: x @ p["w"][0] + (2 * x) @ p["w"][-1],
        {"w": STACK},
        {"w": (THREE, of_slices(X, np.zeros((1, INS)), 2 * X))},
    ),
    "a slice within another": (
        lambda p, x: x @ p["w"][1][0],
        {"w": np.stack([STACK, STACK])},
        {"w": (jc.Layout((0, 1), (2,), (3,)), None)},
    ),
    "a slice along the last axis": (
        lambda p, x: x @ p["w"][..., 1],
        {"w": STACK.transpose(1, 2, 0)},
        {"w": (jc.Layout((2,), (0,), (1,)), of_slices(0 * X, X, 0 * X))},
    ),
    "outputs in two parts": (
        lambda p, x: (x @ p["w"][:, :2]).sum() + (x @ p["w"][:, 2:]).sum(),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "outputs split": (
        lambda p, x: sum((x @ part).sum() for part in jnp.split(p["w"], 3, axis=-1)),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "inputs in two parts": (
        lambda p, x: x[:, :3] @ p["w"][:3] + x[:, 3:] @ p["w"][3:],
        W,
        {
            "w": (
                PLAIN,
                second(X)
                * (np.arange(INS) < 3)
                .astype(float)
                .__eq__((np.arange(INS) < 3).astype(float)[:, None]),
            )
        },
    ),
    "a loop over an index": (
        loop,
        {"w": SQUARES},
        {"w": (THREE, of_slices(*looped_inputs()))},
    ),
    "concatenated outputs": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], -1),
        {"a": STACK[0], "b": STACK[1]},
        {"a": (PLAIN, second(X)), "b": (PLAIN, second(X))},
    ),
    "concatenated inputs": (
        lambda p, x: (
            jnp.concatenate([x, 3 * x], -1) @ jnp.concatenate([p["a"], p["b"]])
        ),
        {"a": STACK[0], "b": STACK[1]},
        {"a": (PLAIN, second(X)), "b": (PLAIN, second(3 * X))},
    ),
    "stacked and batched": (
        lambda p, x: jnp.einsum(
            "bti,bio->bto", jnp.stack([x, 2 * x]), jnp.stack([p["a"], p["b"]])
        ),
        {"a": STACK[0], "b": STACK[1]},
        {"a": (PLAIN, second(X)), "b": (PLAIN, second(2 * X))},
    ),
    "unstacked": (
        lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.unstack(p["w"])),
        {"w": STACK},
        {"w": (THREE, of_slices(X, X, X))},
    ),
    "joined, then transposed and sliced": (
        lambda p, x: x @ jnp.concatenate([p["a"].T, p["b"].T])[OUTS:].T,
        {"a": STACK[0], "b": STACK[1]},
        {"b": (PLAIN, second(X))},
    ),
    "reversed inputs": (
        lambda p, x: x @ p["w"][::-1],
        W,
        {"w": (PLAIN, second(X[:, ::-1]))},
    ),
    "scaled": (lambda p, x: x @ (p["w"] * 0.5), W, {"w": (PLAIN, second(X))}),
    "normalized": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "masked by constants": (
        lambda p, x: x @ jnp.where(np.tri(INS, OUTS) > 0, p["w"], 0.0),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "with an entry set": (
        lambda p, x: x @ p["w"].at[0].set(0.0),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "an exponential": (
        lambda p, x: x @ jax.nn.softmax(p["w"], -1),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "multiplied and summed": (
        lambda p, x: (x[..., None] * p["w"][None]).sum(-2),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "multiplied and averaged row by row": (
        lambda p, x: jax.vmap(lambda x: (p["w"].T * x[None]).mean(-1))(x),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "multiplied and summed with a stack": (
        lambda p, x: (jnp.stack([x, 2 * x, 3 * x])[..., None] * p["w"][:, None]).sum(2),
        {"w": STACK},
        {"w": (THREE, of_slices(X, 2 * X, 3 * X))},
    ),
    "inputs in a constant order": (
        lambda p, x: x @ p["w"][ORDER],
        W,
        {"w": (PLAIN, second(X[:, np.argsort(ORDER)]))},
    ),
    "outputs in a constant order": (
        lambda p, x: x @ jnp.take(p["w"], ORDER[:5], axis=1),
        {"w": SQUARES[0]},
        {"w": (PLAIN, second(X))},
    ),
    "with a low-rank update": (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        {**W, "a": np.ones((INS, 2)), "b": np.ones((2, OUTS))},
        {"w": (PLAIN, second(X))},
    ),
    "a sum of weights": (
        lambda p, x: x @ (p["a"] + p["b"]),
        {"a": STACK[0], "b": STACK[1]},
        {"a": (PLAIN, second(X)), "b": (PLAIN, second(X))},
    ),
    "experts picked for each row": (
        lambda p, x: jnp.einsum("ti,tio->to", x, p["w"][CHOICE + (x[:, 0] > 99)]),
        {"w": STACK},
        {"w": (THREE, of_slices(X[CHOICE == 0], 0 * X, X[CHOICE == 2]))},
    ),
    "two experts for each row": (
        lambda p, x: jnp.einsum(
            "ti,tkio->tko", x, jnp.take(p["w"], np.stack([CHOICE, 0 * CHOICE], 1), 0)
        ),
        {"w": STACK},
        {
            "w": (
                THREE,
                of_slices(np.concatenate([X[CHOICE == 0], X]), 0 * X, X[CHOICE == 2]),
            )
        },
    ),
    "experts picked by one-hot vectors": (
        lambda p, x: jnp.einsum(
            "ti,tio->to", x, jnp.einsum("te,eio->tio", hot(CHOICE, x), p["w"])
        ),
        {"w": STACK},
        {"w": (THREE, of_slices(X[CHOICE == 0], 0 * X, X[CHOICE == 2]))},
    ),
    "two experts picked by one-hot vectors": (
        lambda p, x: jnp.einsum(
            "ti,iokt->tko",
            x,
            jnp.einsum(
                "eio,tke->iokt", p["w"], hot(np.stack([CHOICE, 0 * CHOICE], 1), x)
            ),
        ),
        {"w": STACK},
        {
            "w": (
                THREE,
                of_slices(np.concatenate([X[CHOICE == 0], X]), 0 * X, X[CHOICE == 2]),
            )
        },
    ),
    "padded outputs": (
        lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "padded inputs": (
        lambda p, x: jnp.pad(x, ((0, 0), (3, 1))) @ jnp.pad(p["w"], ((3, 1), (0, 0))),
        W,
        {"w": (PLAIN, second(X))},
    ),
    "rows sorted by experts": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([5, 0, 7])),
        {"w": STACK},
        {"w": (THREE, of_slices(X[:5], 0 * X, X[5:]))},
    ),
    "mapped over shared inputs": (
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
        {"w": STACK},
        {"w": (THREE, of_slices(X, X, X))},
    ),
    "heads before inputs, not mapped": (
        lambda p, x: jnp.einsum("ti,hio->tho", x, p["w"]),
        {"w": STACK},
        {"w": (jc.Layout((), (1,), (0, 2)), second(X))},
    ),
    "inside shard_map": (sharded, W, {"w": (PLAIN, second(X))}),
    "one-hot rows of a tied table": (
        lambda p, x: jax.nn.one_hot(jnp.argmax(x, -1), INS) @ p["w"] @ p["w"].T,
        W,
        {"w": (jc.Layout((), (1,), (0,)), None)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layouts_and_moments_of_changed_weights(name):
    model, params, wanted = CASES[name]
    layouts = jc.find_layouts(model, params, X)
    for leaf, (layout, _) in wanted.items():
        assert layouts[leaf] == layout, leaf
    moments = jc.collect_moments(model, params, [X, X], where="|".join(wanted))
    for leaf, (_, square) in wanted.items():
        if square is not None:
            got = np.asarray(moments[leaf].second)
            np.testing.assert_allclose(got, square, rtol=1e-4, atol=1e-5)


def test_one_hot_rows_are_counted():
    model, params, _ = CASES["one-hot rows of a tied table"]
    moments = jc.collect_moments(model, params, [X], where="w")["w"]
    want = np.bincount(X.argmax(-1), minlength=INS)
    np.testing.assert_array_equal(moments.tokens, want)


def test_parts_of_the_inputs_count_each_row_once():
    model, params, _ = CASES["inputs in two parts"]
    moments = jc.collect_moments(model, params, [X], where="w")["w"]
    np.testing.assert_allclose(moments.count, N)
    np.testing.assert_allclose(moments.mean, X.mean(0), rtol=1e-5, atol=1e-6)


def test_a_table_of_more_axes_is_no_stack_of_experts():
    params = {"table": jnp.ones((10, 4, 3)), "w": jnp.ones((12, OUTS))}

    def model(p, tokens):
        return p["table"][tokens].reshape(-1, 12) @ p["w"]

    layouts = jc.find_layouts(model, params, jnp.arange(5))
    assert layouts == {"table": jc.Layout((), (1, 2), (0,)), "w": PLAIN}


def test_rows_of_a_table_by_two_indices_are_counted():
    params = {"table": jnp.arange(60.0).reshape(3, 4, 5)}
    rows, columns = jnp.asarray([0, 2, 2, 9]), jnp.asarray([3, 1, 1, 0])

    def model(p, batch):
        return p["table"].at[batch[0], batch[1]].get(mode="fill")

    moments = jc.collect_moments(model, params, [(rows, columns)], where="table")
    want = np.zeros((3, 4))
    want[0, 3], want[2, 1] = 1, 2  # row 9 is outside
    np.testing.assert_array_equal(moments["table"].tokens, want.ravel())
    assert moments["table"].layout == jc.Layout((), (-1,), (-3, -2))


def test_matrices_picked_by_two_indices_are_no_table():
    params = {"w": jnp.ones((2, 2, 64, 64))}

    def model(p, x):
        chosen = (x[:, 0] > 0).astype(int)
        return jnp.einsum("ti,tio->to", x, p["w"][chosen, 1 - chosen])

    with pytest.warns(UserWarning, match=r"does not see.* w\."):
        assert jc.find_layouts(model, params, jnp.ones((4, 64))) == {}


def test_positions_in_a_constant_order_are_rows_of_a_table():
    params = {"table": STACK[0].T}  # [6, 8]

    def model(p, x):
        return x[:6] + p["table"][np.asarray([0, 2, 4, 1, 3, 0])]

    moments = jc.collect_moments(model, params, [X], where="table")["table"]
    np.testing.assert_array_equal(moments.tokens, [2, 1, 1, 1, 1, 0])
    assert moments.layout == jc.Layout((), (-1,), (-2,))


def test_a_bias_of_several_heads_has_no_inputs_and_stops_nothing():
    params = {"q": {"kernel": STACK.transpose(1, 0, 2), "bias": np.ones((3, OUTS))}}

    def model(p, x):
        heads = jnp.einsum("ti,iho->tho", x, p["q"]["kernel"])
        return heads + p["q"]["bias"][None]

    moments = jc.collect_moments(model, params, [X], where=".*")
    assert list(moments) == ["q/kernel"]
    with pytest.raises(ValueError, match="the inputs of q/bias were never seen"):
        jc.collect_moments(model, params, [X], where=".*bias")


def test_two_uses_warn_and_the_rest_goes_on():
    params = {"w": SQUARES[0], "v": STACK[0]}

    def model(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T @ p["v"]

    with pytest.warns(UserWarning, match=r"w: one use .*the first counts.*jc\.Layout"):
        layouts = jc.find_layouts(model, params, X)
    assert layouts == {"w": PLAIN, "v": PLAIN}
    with pytest.warns(UserWarning, match="the first counts"):
        moments = jc.collect_moments(model, params, [X], where=".*")
    np.testing.assert_allclose(moments["w"].second, second(X), rtol=1e-4, atol=1e-5)


def test_what_is_not_followed_is_named_with_the_layout_to_write():
    params = {"w": jnp.ones((64, 64)), "odd": jnp.ones((2, 64, 64))}

    def model(p, x):
        return x @ p["w"] + x @ jnp.linalg.inv(p["odd"][0] + jnp.eye(64))

    with pytest.warns(UserWarning, match=r"67%.* odd.*'odd': jc\.Layout\(stack=\(0,\)"):
        layouts = jc.find_layouts(model, params, jnp.ones((4, 64)))
    assert layouts == {"w": PLAIN}


def test_a_stack_cut_into_groups_is_named():
    params = {"w": jnp.ones((4, 64, 64))}

    def inner(x, w):
        return jnp.tanh(x @ w), None

    def group(x, w):
        return jax.lax.scan(inner, x, w)

    def model(p, x):
        return jax.lax.scan(group, x, p["w"].reshape(2, 2, 64, 64))[0]

    with pytest.warns(UserWarning, match=r"'w': jc\.Layout\(stack=\(0,\)"):
        assert jc.find_layouts(model, params, jnp.ones((4, 64))) == {}
    layouts = {"w": jc.Layout((0,), (1,), (2,))}
    small = jc.compress(params, "symmetric(bits=8)", layouts=layouts)
    want = model(jc.materialize(small), jnp.ones((4, 64)))
    np.testing.assert_allclose(model(small, jnp.ones((4, 64))), want, rtol=1e-5)


def test_where_leaves_weights_out():
    params = {"a": STACK[0], "b": STACK[1]}

    def model(p, x):
        return x @ p["a"] + x @ p["b"]

    assert list(jc.find_layouts(model, params, X, where="b")) == ["b"]
    with pytest.raises(ValueError, match=r"where='c'.*nearest"):
        jc.find_layouts(model, params, X, where="c")


class Mapped(nn.Module):
    """Two layers mapped along an axis of their weights, over one shared input."""

    axis: int

    @nn.compact
    def __call__(self, x):
        layers = nn.vmap(
            nn.Dense,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return layers(5, use_bias=False, name="layers")(x)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_layers_mapped_along_any_axis_are_a_stack(axis):
    model = Mapped(axis)
    params = model.init(jax.random.key(0), X)["params"]
    at = axis % 3
    others = [a for a in range(3) if a != at]
    layout = jc.Layout((at,), (others[0],), (others[1],))
    assert jc.find_layouts(model, params, X) == {"layers/kernel": layout}
    moments = jc.collect_moments(model, params, [X], where=".*")
    np.testing.assert_allclose(
        moments["layers/kernel"].second, of_slices(X, X), rtol=1e-4, atol=1e-5
    )
    small = jc.compress(params, [(".*", "symmetric(bits=8)")], moments)
    jc.check(model, small, X)
    got, want = (model.apply({"params": p}, X) for p in (small, jc.materialize(small)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


class Pairs(nn.Module):
    """Layers in a scan along axis 1, and two such models mapped along axis 1."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(INS, use_bias=False)(x), None

        class Layers(nn.Module):
            @nn.compact
            def __call__(self, x):
                stack = nn.scan(
                    Step,
                    variable_axes={"params": 1},
                    split_rngs={"params": True},
                    length=3,
                )
                return stack(name="steps")(x, None)[0]

        pair = nn.vmap(
            Layers,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            axis_size=2,
        )
        return pair(name="pair")(x.reshape(2, -1, INS))


@pytest.mark.slow
def test_two_stack_axes_that_do_not_lead():
    model = Pairs()
    params = model.init(jax.random.key(0), X)["params"]
    layouts = jc.find_layouts(model, params, X)
    layout = jc.Layout((2, 1), (0,), (3,))
    assert layouts == {"pair/steps/Dense_0/kernel": layout}
    small = jc.compress(params, [(".*", "symmetric(bits=8)")], layouts=layouts)
    got, want = (model.apply({"params": p}, X) for p in (small, jc.materialize(small)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_a_last_stack_axis_beyond_those_of_the_parts():
    model = Mapped(2)
    params = model.init(jax.random.key(0), X)["params"]
    layouts = jc.find_layouts(model, params, X)
    small = jc.compress(params, [(".*", "rate_distortion(rate=8)")], layouts=layouts)
    parts = jax.tree.leaves(small["layers"]["kernel"].inner)
    assert min(x.ndim for x in parts) < 3
    got, want = (model.apply({"params": p}, X) for p in (small, jc.materialize(small)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_lossless_leaves_along_another_axis_are_decoded_before_the_scan():
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), SCANNED)
    small = jc.compress(rounded, "code_floats()")
    assert isinstance(small["layers"]["Dense_0"]["bias"], jc.CodedFloats)
    got, want = (Scanned().apply({"params": p}, ROWS) for p in (small, rounded))
    np.testing.assert_array_equal(got, want)


class Block(nn.Module):
    """A block of a model that is scanned along axis 1."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(64)(jnp.tanh(x)), None


class Scanned(nn.Module):
    """Layers stacked along axis 1, as T5X and MaxText do by default."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3
        )
        return stack(name="layers")(x, None)[0]


ROWS = jax.random.normal(jax.random.key(5), (40, 64))
SCANNED = Scanned().init(jax.random.key(6), ROWS)["params"]
NAME = "layers/Dense_0/kernel"
METHODS = {
    "symmetric": "symmetric(bits=8, block=16)",
    "svd": "svd(rank=16)",
    "magnitude": "magnitude(sparsity=0.5)",
    "gptq": "gptq(bits=4)",
    "coded": jc.chain("symmetric(bits=3)", "entropy_code()"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_stack_along_axis_1_runs_compressed(name):
    layouts = jc.find_layouts(Scanned(), SCANNED, ROWS)
    assert layouts == {NAME: jc.Layout((1,), (0,), (2,))}
    moments = jc.collect_moments(Scanned(), SCANNED, [ROWS])
    small = jc.compress(SCANNED, METHODS[name], moments)
    kernel = small["layers"]["Dense_0"]["kernel"]
    assert kernel.shape == (64, 3, 64) and isinstance(kernel, jc.Leaf)
    got = Scanned().apply({"params": small}, ROWS)
    want = Scanned().apply({"params": jc.materialize(small)}, ROWS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_stack_along_axis_1_is_each_slice_by_itself():
    layouts = jc.find_layouts(Scanned(), SCANNED, ROWS)
    small = jc.compress(SCANNED, "symmetric(bits=4, block=32)", layouts=layouts)
    dense = SCANNED["layers"]["Dense_0"]["kernel"]
    for i in range(3):
        one = jc.compress({"kernel": dense[:, i]}, "symmetric(bits=4, block=32)")
        np.testing.assert_array_equal(
            small["layers"]["Dense_0"]["kernel"][:, i], one["kernel"].materialize()
        )


def test_a_stack_along_axis_1_is_saved_trained_and_moments_agree(tmp_path):
    moments = jc.collect_moments(Scanned(), SCANNED, [ROWS])
    x = np.asarray(ROWS, np.float64)
    np.testing.assert_allclose(
        moments[NAME].second[0], second(np.tanh(x)), rtol=1e-4, atol=1e-5
    )
    small = jc.compress(SCANNED, "symmetric(bits=4)", moments)
    jc.save(tmp_path / "a.safetensors", small)
    again = jc.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(
        Scanned().apply({"params": again}, ROWS),
        Scanned().apply({"params": small}, ROWS),
    )
    tree = jc.qat.prepare(
        "symmetric(bits=4)", layouts={NAME: jc.Layout((1,), (0,), (2,))}
    )(SCANNED)
    np.testing.assert_array_equal(
        Scanned().apply({"params": tree}, ROWS),
        Scanned().apply({"params": small}, ROWS),
    )
    with pytest.raises(ValueError, match=r"sliced along axis 1.*find_layouts"):
        wrong = {NAME: jc.Layout((0,), (1,), (2,))}
        bad = jc.compress(SCANNED, "symmetric(bits=4)", layouts=wrong)
        Scanned().apply({"params": bad}, ROWS)

"""Moments, and collecting them: against NumPy float64 on inputs seen another way."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from models_for_tests import Language, rounded
from tracing.test_layouts import Kinds, Tied

from jaxcompress import progress
from jaxcompress.calibration.collect import collect_moments
from jaxcompress.calibration.moments import (
    Moments,
    empty_moments,
    moments_from_covariance,
    require,
)
from jaxcompress.tracing.layouts import find_layouts
from jaxcompress.tree.layouts import matricize

KEY = jax.random.key(0)
ALL = ".*(kernel|embedding)"


def make_params(model, *inputs):
    """Random parameters, without compiling an initializer."""
    shapes = jax.eval_shape(model.init, KEY, *inputs)["params"]
    rng = np.random.default_rng(7)

    def draw(s):
        fan_in = max(1, np.prod(s.shape[:-1]))
        return jnp.asarray(rng.normal(size=s.shape) / fan_in**0.5, s.dtype)

    return jax.tree.map(draw, shapes)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check(moments, rows, rtol=2e-5):
    """`rows` are all inputs, one per line: the definition, in float64."""
    rows = np.asarray(rows, np.float64)
    rows = rows.reshape(-1, rows.shape[-1])
    assert float(moments.count) == len(rows)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows:
        total += np.outer(row, row)
    scale = np.abs(total).max() / len(rows)
    np.testing.assert_allclose(moments.second, total / len(rows), atol=rtol * scale)
    mean = sum(rows) / len(rows)
    np.testing.assert_allclose(moments.mean, mean, atol=rtol * scale**0.5)


def all_outputs(model, params, *inputs):
    """What each module returns, as a tree."""
    call = lambda params, *inputs: model.apply(  # noqa: E731
        {"params": params}, *inputs, capture_intermediates=True, mutable=True
    )[1]["intermediates"]
    return jax.jit(call)(params, *inputs)


def dense_inputs(model, params, *inputs):
    """What each Dense or DenseGeneral is called with, by kernel name."""

    @jax.jit
    def run(params, *inputs):
        seen = {}

        def listen(call, args, kwargs, context):
            if isinstance(context.module, nn.Dense | nn.DenseGeneral):
                seen["/".join((*context.module.path, "kernel"))] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(listen):
            model.apply({"params": params}, *inputs)
        return seen

    return run(params, *inputs)


def of_rows(rows, tokens=None):
    rows = jnp.asarray(rows)
    count = jnp.float32(len(rows))
    second = rows.T @ rows / len(rows)
    return Moments(count, rows.mean(0), second, second * 2, second * 3, tokens)


def assert_same(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = float(jnp.abs(y).max()) or 1.0
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale)


# The type.


def test_moments_are_a_commutative_monoid():
    parts = [random(n, 3, seed=n) + n for n in (1, 5, 40)]
    a, b, c = (of_rows(x, jnp.arange(4.0) * len(x)) for x in parts)
    whole = of_rows(np.concatenate(parts), jnp.arange(4.0) * 46)
    assert_same((a + b) + c, whole)
    assert_same(a + (b + c), whole)
    assert_same(c + a + b, whole)
    plain = Moments(a.count, a.mean, a.second)
    zero = empty_moments(3)
    assert_same(plain + zero, plain, 0)
    assert_same(zero + plain, plain, 0)
    assert_same(zero + zero, zero, 0)


def test_moments_of_a_stack_are_added_layer_by_layer():
    rows = [[random(n, 3, seed=n + layer) for layer in (0, 1)] for n in (4, 9)]
    stacked = [
        jax.tree.map(lambda *x: jnp.stack(x), *map(of_rows, pair)) for pair in rows
    ]
    total = stacked[0] + stacked[1]
    for layer in (0, 1):
        one = jax.tree.map(lambda x, layer=layer: x[layer], total)
        assert_same(one, of_rows(np.concatenate([pair[layer] for pair in rows])))


def test_moments_sum_over_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = random(10, 3) + 1
    ones = jnp.ones(4)
    whole = of_rows(rows, 2 * ones)
    halves = [of_rows(rows[:3], ones), of_rows(rows[3:], ones)]
    for pair in (halves, [whole, jax.tree.map(jnp.zeros_like, whole)]):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *pair)
        total = jax.jit(
            jax.shard_map(
                lambda m: jax.tree.map(lambda x: x[0], m).psum("data"),
                mesh=mesh,
                in_specs=PartitionSpec("data"),
                out_specs=PartitionSpec(),
            )
        )(stacked)
        assert_same(total, whole)


def test_derived_quantities():
    rows, weight = random(50, 4) + 2, random(4, 3, seed=1)
    moments = of_rows(rows)
    covariance = np.cov(rows.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(moments.covariance, covariance, atol=1e-4)
    norms = np.sqrt((rows.astype(np.float64) ** 2).mean(0))
    np.testing.assert_allclose(moments.norms, norms, rtol=1e-5)
    assert_same(moments.project(jnp.asarray(weight)), of_rows(rows @ weight))


def test_adding_unlike_moments_is_an_error():
    a = empty_moments(3)
    with pytest.raises(ValueError, match=r"only one side .*'second'.*same way"):
        a + Moments(a.count, a.mean)
    with pytest.raises(ValueError, match=r"'mean' has shape \(3,\) and \(4,\)"):
        a + empty_moments(4)


def test_moments_from_covariance():
    moments = moments_from_covariance(np.diag([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(moments.covariance, np.diag([1, 2, 3]))
    assert moments.second.dtype == jnp.float32 and moments.mean.shape == (3,)
    with pytest.raises(ValueError, match=r"\[\.\.\., inputs, inputs\].*\(3, 2\)"):
        moments_from_covariance(np.ones((3, 2)))
    with pytest.raises(ValueError, match="not symmetric: entries differ by 1 "):
        moments_from_covariance(np.array([[1.0, 1], [0, 1]]))
    with pytest.raises(ValueError, match="NaN"):
        moments_from_covariance(np.full((2, 2), np.nan))


def test_require():
    x, moments = jnp.ones((3, 5)), of_rows(np.eye(3, dtype=np.float32))
    moments = dataclasses.replace(moments, drifted=None, cross=None)
    assert require(moments, x, "gptq", fields=("mean", "second")) is moments
    with pytest.raises(ValueError, match=r"gptq needs moments .*collect_moments"):
        require(None, x, "gptq")
    with pytest.raises(ValueError, match="this is a ndarray"):
        require(np.eye(3), x, "gptq")
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(3, 5\) needs \(3, 3\)"):
        require(empty_moments(4), x, "gptq")
    with pytest.raises(ValueError, match=r"\(3, 3\).* needs \(2, 3, 3\)"):
        require(moments, jnp.ones((2, 3, 5)), "gptq")
    with pytest.raises(ValueError, match=r"'second': an embedding .*looked up"):
        require(Moments(moments.count), x, "gptq")
    with pytest.raises(ValueError, match=r"'cross': .*compress_blockwise"):
        require(moments, x, "gptq", fields=("cross",))


# Collecting.


def test_every_kind_of_layer():
    """Second moments through the kernel are those of the layer's outputs."""
    model, batches = Kinds(), [random(1, 4, 4, 3), random(1, 4, 4, 3, seed=1)]
    params = make_params(model, batches[0])
    moments = collect_moments(model, params, batches, where=ALL)
    layouts = find_layouts(model, params, batches[0])
    assert moments.keys() == layouts.keys() and list(moments) == list(layouts)
    outputs: dict[str, list] = {}
    for batch in batches:
        seen = all_outputs(model, params, batch)
        for name in moments:
            node = seen
            for part in name.split("/")[:-1]:
                node = node[part]
            outputs.setdefault(name, []).append(np.asarray(node["__call__"][0]))
    for name, kind in layouts.items():
        kernel = params
        for part in name.split("/"):
            kernel = kernel[part]
        if name == "grouped/kernel":
            continue  # its groups meet different inputs: below
        through = moments[name].project(matricize(kernel, kind))
        if kind.stack:
            for layer, rows in enumerate(np.concatenate(outputs[name], 1)):
                check(jax.tree.map(lambda x, i=layer: x[i], through), rows)
            continue
        width = np.prod([kernel.shape[axis] for axis in kind.outputs])
        rows = np.concatenate([y.reshape(-1, width) for y in outputs[name]])
        check(through, rows)


def test_dense_inputs_are_those_the_layers_get():
    model, tokens = Language(layers=1), np.arange(12).reshape(2, 6) % 7
    params = make_params(model, tokens)
    moments = collect_moments(model, params, [tokens, tokens + 1], where=ALL)
    first = dense_inputs(model, params, tokens)
    second = dense_inputs(model, params, tokens + 1)
    assert len(first) == 6 + 2  # query, key, value, out, up, down; split, join
    for name in first:
        rows = np.concatenate([first[name], second[name]])
        width = moments[name].mean.shape[-1]
        check(moments[name], rows.reshape(-1, width))


def test_windows_of_a_convolution():
    class Strange(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(
                4, (2, 3), (2, 1), "VALID", kernel_dilation=(1, 2),
                feature_group_count=2, name="conv",
            )(x)  # fmt: skip

    x = random(2, 5, 7, 4)
    moments = collect_moments(Strange(), make_params(Strange(), x), [x], where=ALL)
    rows = []
    for image in x:
        for top in range(0, 4, 2):
            for left in range(3):
                for group in range(2):
                    window = image[top : top + 2, left : left + 5 : 2]
                    rows.append(window[..., 2 * group : 2 * group + 2].ravel())
    check(moments["conv/kernel"], np.stack(rows))


def test_windows_at_padding_do_not_count():
    conv = nn.Conv(8, (3,), feature_group_count=4, name="conv")  # as many as tokens
    x, mask = random(2, 4, 8), np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"x": x, "mask": mask}
    found = collect_moments(conv, make_params(conv, x), [batch], where=ALL)["kernel"]
    wide = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    rows = [
        wide[b, t : t + 3, 2 * group : 2 * group + 2].ravel()
        for b, t in np.argwhere(mask)
        for group in range(4)
    ]
    check(found, np.stack(rows))


def test_axes_are_put_in_the_order_of_the_kernel():
    """Transposed, merged and split on its way, the kernel's own order counts."""

    def model(params, x):
        y = x @ params["w"].transpose(1, 0, 2).reshape(6, 4)  # x holds (axis 1, axis 0)
        return jnp.einsum("bji,ijo->bo", x.reshape(5, 3, 2), params["v"]) + y

    x = random(5, 6)
    params = {"w": jnp.ones((2, 3, 4)), "v": jnp.ones((2, 3, 4))}
    moments = collect_moments(model, params, [x], where=".*")
    rows = np.stack([row.reshape(3, 2).T.ravel() for row in x])
    check(moments["w"], rows)
    check(moments["v"], rows)


def test_a_weight_repeated_over_the_batch_has_one_set_of_moments():
    def model(params, x):
        each = jnp.broadcast_to(params["w"], (5, 4, 6))
        return jnp.einsum("bti,bio->bto", x, each)

    x = random(5, 2, 4)
    params = {"w": jnp.ones((4, 6))}
    check(collect_moments(model, params, [x], where="w")["w"], x)


def test_embeddings_count_rows():
    tokens = np.array([[0, 3, 3], [10, 3, 0]])
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    counts = [1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1]
    embed = nn.Embed(11, 4)
    params = make_params(embed, tokens)
    found = collect_moments(
        embed, params, [{"tokens": tokens, "mask": mask}], where=ALL
    )["embedding"]
    np.testing.assert_array_equal(found.tokens, counts)
    assert float(found.count) == 4 and found.second is None
    params = make_params(Tied(), tokens)
    found = collect_moments(
        Tied(), params, [{"tokens": tokens, "mask": mask}] * 2, where=ALL
    )["embed/embedding"]
    np.testing.assert_array_equal(found.tokens, 2 * np.array(counts))
    assert float(found.count) == 8 and found.second.shape == (4, 4)
    seen = all_outputs(Tied(), params, tokens)
    head = np.asarray(seen["dense"]["__call__"][0])[mask == 1]
    head = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float64)  # as attend rounds
    check(found, np.concatenate([head, head]))


def test_rows_outside_the_table():
    ids, params = np.array([0, -1, 2, 3, -5]), {"w": jnp.ones((3, 4))}

    def counts(mode):
        model = lambda p, ids: jnp.take(p["w"], ids, axis=0, mode=mode)  # noqa: E731
        return collect_moments(model, params, [ids], where="w")["w"].tokens

    np.testing.assert_array_equal(counts("fill"), [1, 0, 2])  # -1 is the last
    np.testing.assert_array_equal(counts("clip"), [3, 0, 2])


def test_a_stack_of_embeddings_counts_rows():
    def model(params, batch):
        return jax.vmap(lambda table, ids: table[ids])(params["w"], batch)

    ids = np.array([[[0, 1], [1, 1]], [[2, 2], [2, 0]]])
    found = collect_moments(model, {"w": jnp.ones((2, 3, 4))}, [ids], where="w")["w"]
    np.testing.assert_array_equal(found.tokens, [[1, 3, 0], [1, 0, 3]])


def stacked(tree):
    blocks = [tree[f"block_{i}"] for i in range(2)]
    rest = {k: v for k, v in tree.items() if not k.startswith("block_")}
    return {**rest, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}


def test_scanned_and_remat_equal_looped():
    tokens = np.arange(12).reshape(2, 6) % 7
    params = make_params(Language("loop"), tokens)
    looped = collect_moments(Language("loop"), params, [tokens], where=ALL)
    model = Language("scan_remat")
    found = collect_moments(model, stacked(params), [tokens], where=ALL)
    assert len(found) == len(looped) - 7  # seven kernels a block
    for name, moments in looped.items():
        head, _, rest = name.partition("/")
        if head.startswith("block_"):
            layer = int(head[-1])
            scanned = jax.tree.map(lambda x, i=layer: x[i], found[f"blocks/{rest}"])
        else:
            scanned = found[name]
        assert_same(scanned, moments)


def test_padding_does_not_count():
    tokens = np.arange(18).reshape(3, 6) % 7
    model = Language(layers=1)
    params = make_params(model, tokens)
    select = r"block_0/attention/(query|key|value)/kernel|block_0/mix/kernel"
    mask = np.ones((3, 6), bool)
    mask[1, 4:] = mask[2] = False
    batch = {"tokens": tokens, "mask": mask}
    found = collect_moments(model, params, [batch], where=select)
    inputs = dense_inputs(model, params, tokens)
    name = "block_0/attention/query/kernel"
    check(found[name], inputs[name][mask])
    assert float(found["block_0/mix/kernel"].count) == mask.sum()
    # A batch of padding alone adds nothing.
    nothing = {"tokens": tokens, "mask": np.zeros_like(mask)}
    again = collect_moments(model, params, [nothing, batch], where=select)
    assert_same(again, found)


def test_where_the_mask_goes():
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    x = random(2, 3, 4)
    x[mask == 0] = np.nan  # padding may hold anything

    def count(function):
        call = lambda params, batch: function(params["w"], batch["x"])  # noqa: E731
        batch = {"x": x, "mask": mask}
        return collect_moments(call, {"w": jnp.ones((4, 5))}, [batch], where="w")["w"]

    check(count(lambda w, x: x @ w), x[mask == 1])
    check(count(lambda w, x: x.reshape(6, 4) @ w), x[mask == 1])
    heads = lambda w, x: x[:, None].repeat(2, 1) @ w  # noqa: E731
    check(count(heads), np.repeat(x[mask == 1], 2, 0))  # [batch, heads, tokens]
    check(count(lambda w, x: x[:, 0] @ w), x[:, 0])  # whole examples
    with pytest.raises(ValueError, match=r"^w: its inputs have axes \(3, 2\).*mask"):
        count(lambda w, x: x.swapaxes(0, 1) @ w)
    with pytest.raises(ValueError, match=r"^w: its inputs have axes \(\).*mask"):
        count(lambda w, x: x[0, 0] @ w)
    examples = {"x": random(3, 4), "mask": np.array([1, 0, 1])}
    call = lambda params, batch: batch["x"] @ params["w"]  # noqa: E731
    found = collect_moments(call, {"w": jnp.ones((4, 5))}, [examples], where="w")
    check(found["w"], examples["x"][[0, 2]])


def test_loops_and_branches_count_what_runs():
    x = random(3, 4)
    params = {name: jnp.eye(4) for name in "abcd"}

    def model(params, x):
        y = jax.lax.fori_loop(0, 3, lambda i, x: x @ params["a"], x)
        y, _ = jax.lax.scan(lambda y, _: (y @ params["b"], None), y, length=2)
        y = jax.lax.while_loop(
            lambda s: s[0] < 4, lambda s: (s[0] + 1, s[1] @ params["c"]), (0, y)
        )[1]
        return jax.lax.cond(
            x[0, 0] > 0, lambda y: y @ params["d"], lambda y: y @ params["a"], y
        )

    positive = np.abs(x)
    found = collect_moments(model, params, [positive, -positive], where=".*")
    counts = {name: float(moments.count) for name, moments in found.items()}
    assert counts == {"a": 2 * 9 + 3, "b": 2 * 6, "c": 2 * 12, "d": 3}
    check(found["d"], positive)


def test_an_nnx_model_through_a_function():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    x = random(5, 4)
    found = collect_moments(
        lambda params, batch: nnx.merge(graph, params)(batch["x"]),
        params,
        [{"x": x, "mask": np.array([1, 1, 1, 0, 0])}],
        where=r"kernel.*",
    )
    (moments,) = found.values()
    check(moments, x[:3])


def test_compressed_weights_keep_the_kernels_names():
    model, x = nn.Dense(6), random(5, 4)
    params = make_params(model, x)
    small = {**params, "kernel": rounded(params["kernel"])}
    found = collect_moments(model, small, [x], where="kernel")
    check(found["kernel"], x)


def test_a_batch_sharded_over_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    tokens = np.arange(24).reshape(4, 6) % 7
    params = make_params(Tied(), tokens)
    spread = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    one = collect_moments(Tied(), params, [tokens], where=ALL)
    assert_same(collect_moments(Tied(), params, [spread], where=ALL), one)


def test_sums_are_float32_for_bfloat16_inputs():
    x = jnp.full((5000, 1), 1.0078125, jnp.bfloat16)  # whose sum is no bfloat16
    model = nn.Dense(2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    found = collect_moments(model, make_params(model, x), [x], where=ALL)["kernel"]
    assert found.second.dtype == found.mean.dtype == jnp.float32
    np.testing.assert_allclose(found.mean, [1.0078125], rtol=1e-6)
    np.testing.assert_allclose(found.second, [[1.0078125**2]], rtol=2e-4)


def test_one_compilation_for_batches_of_one_shape():
    traces = []

    def model(params, batch):
        traces.append(batch.shape)
        return batch @ params["w"]

    batches = [random(3, 4, seed=i) for i in range(4)] + [random(2, 4)]
    found = collect_moments(model, {"w": jnp.ones((4, 4))}, batches, where="w")
    check(found["w"], np.concatenate(batches))
    assert len(traces) == 3  # once for the shapes, once a shape


def test_default_selection_and_its_errors():
    params = {
        "big": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones((64, 64))},
        "small": {"kernel": jnp.ones((64, 2))},
    }
    x = random(3, 64)

    def model(params, x):
        y = x @ params["big"]["kernel"] @ params["big"]["bias"]
        return y @ jnp.round(params["small"]["kernel"]).astype(int)

    assert list(collect_moments(model, params, [x])) == ["big/kernel", "big/bias"]
    chosen = collect_moments(model, params, [x], where=lambda name: "big" in name)
    assert list(chosen) == ["big/kernel", "big/bias"]
    with pytest.raises(ValueError, match="inputs of small/kernel were never seen"):
        collect_moments(model, params, [x], where=".*kernel")
    with pytest.raises(ValueError, match=r"no weight .*'big/kernl'.*big/kernel"):
        collect_moments(model, params, [x], where="big/kernl")
    with pytest.raises(ValueError, match="no batches"):
        collect_moments(model, params, [])
    with pytest.raises(TypeError, match=r"one dict.*\[batch\]"):
        collect_moments(model, params, {"x": x})


def test_nan_names_the_first_kernel_of_the_model():
    params = {"b": jnp.full((4, 4), np.nan), "c": jnp.eye(4), "a": jnp.eye(4)}
    model = lambda p, x: ((x @ p["b"]) @ p["c"]) @ p["a"]  # noqa: E731
    with pytest.raises(ValueError, match=r"^c: its inputs are NaN"):
        collect_moments(model, params, [np.ones((2, 4))], where=".*")


def test_a_stack_axis_other_than_0():
    def model(params, x):
        w = jnp.moveaxis(params["w"], 1, 0)
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)

    x = np.arange(12.0).reshape(3, 4)
    w = collect_moments(model, {"w": jnp.ones((4, 2, 4))}, [x], where="w")["w"]
    inputs = [x, x @ np.ones((4, 4))]
    want = np.stack([x.T @ x / 3 for x in inputs])
    np.testing.assert_allclose(w.second, want, rtol=1e-6)


def test_progress_is_shown_when_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET", 0.0)
    model = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": jnp.ones((4, 4))}
    collect_moments(model, params, [np.ones((2, 4))], where="w")
    assert capsys.readouterr() == ("", "")
    collect_moments(model, params, [np.ones((2, 4))], where="w", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("calibrating: 1/1")

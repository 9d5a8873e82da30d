"""Moments carry the layout under which they were collected, and `compress` uses it."""

import dataclasses
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.calibration.moment_files import moments_from_arrays, moments_to_arrays
from jaxcompress.calibration.moments import Moments, empty_moments
from jaxcompress.pruning.masks import wanda_scores
from jaxcompress.tree.layouts import DENSE, ROWS, Layout, leading, trailing

SIZE = 64
TRANSPOSED = Layout((), (1,), (0,))
BACKWARDS = Layout((), (-1,), (-2,))


class Projection(nn.Module):
    """Stores `[outputs, inputs]`, as torch does."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(1.0)
        return x @ self.param("kernel", init, (SIZE, SIZE)).T


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return Projection(name="inner")(x), None

        stack = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return stack(self, x, None)[0]


X = jnp.asarray(
    np.random.default_rng(0).normal(size=(512, SIZE)) * np.logspace(0, 1.5, SIZE),
    jnp.float32,
)
MODEL = Projection()
PARAMS = MODEL.init(jax.random.key(1), X)["params"]


@pytest.fixture(scope="module")
def moments():
    return jc.collect_moments(MODEL, PARAMS, [X])


def output_error(params):
    """Against the product in NumPy, float64."""
    x = np.asarray(X, np.float64)
    old, new = (np.asarray(jc.materialize(p)["kernel"]) for p in (PARAMS, params))
    return np.linalg.norm(x @ (new - old).T) / np.linalg.norm(x @ old.T)


@pytest.mark.parametrize(
    "recipe", ["wanda(sparsity=0.5)", "gptq(bits=3)", "awq(bits=3, block=32)"]
)
def test_a_square_kernel_is_compressed_along_the_axes_of_its_moments(moments, recipe):
    assert moments["kernel"].layout == BACKWARDS
    wrong = {"kernel": dataclasses.replace(moments["kernel"], layout=None)}
    told = jc.compress(PARAMS, recipe, wrong, layouts={"kernel": TRANSPOSED})
    seen = jc.compress(PARAMS, recipe, moments)
    np.testing.assert_array_equal(
        jc.materialize(told)["kernel"], jc.materialize(seen)["kernel"]
    )
    guessed = jc.compress(PARAMS, recipe, wrong)
    assert output_error(seen) < 0.95 * output_error(guessed)


def test_a_layout_that_contradicts_the_moments_is_refused(moments):
    with pytest.raises(ValueError, match=r"kernel: the layout given is .*\(0,\).*\(1,"):
        jc.compress(PARAMS, "wanda(sparsity=0.5)", moments, layouts={"kernel": DENSE})
    jc.compress(PARAMS, "wanda(sparsity=0.5)", moments, layouts={"kernel": TRANSPOSED})


def test_a_leaf_compressed_along_other_axes_is_refused(moments):
    both = [("kernel/.*", "gptq(bits=8)")]
    along = jc.compress(PARAMS, "svd(rank=60)", moments)
    jc.compress(along, both, moments)
    across = jc.compress(PARAMS, "svd(rank=60)")
    for part in ("left", "right"):
        with pytest.raises(ValueError, match=f"kernel/{part}: kernel was compressed"):
            jc.compress(across, [(f"kernel/{part}", "gptq(bits=8)")], moments)
    jc.compress(across, [("kernel/.*", "symmetric(bits=8)")])


def test_scores_and_plans_go_by_the_moments(moments):
    scores = wanda_scores(PARAMS, moments)["kernel"]
    norms = np.sqrt(np.mean(np.square(np.asarray(X, np.float64)), axis=0))
    np.testing.assert_allclose(
        scores, np.abs(PARAMS["kernel"]) * norms[None, :], rtol=1e-4
    )
    plain = {"kernel": dataclasses.replace(moments["kernel"], layout=None)}
    for plan in (
        lambda m, **o: jc.planning.plan_ranks(PARAMS, fraction=0.5, moments=m, **o),
        lambda m, **o: jc.planning.plan_rates(PARAMS, m, bits_per_weight=3.0, **o),
    ):
        assert plan(moments) == plan(plain, layouts={"kernel": TRANSPOSED})
        with pytest.raises(ValueError, match="kernel: the layout given"):
            plan(moments, layouts={"kernel": DENSE})


def test_layouts_survive_what_moments_go_through(moments):
    known = moments["kernel"]
    assert (known + known).layout == BACKWARDS
    assert (known + empty_moments(SIZE)).layout == BACKWARDS
    assert (empty_moments(SIZE) + known).layout == BACKWARDS
    assert jax.jit(lambda a: a + a)(known).layout == BACKWARDS
    assert jax.tree.map(np.asarray, known).layout == BACKWARDS
    assert pickle.loads(pickle.dumps(known)).layout == BACKWARDS
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), known)
    summed = jax.vmap(lambda a: a.psum("i"), axis_name="i")(pair)
    assert summed.layout == BACKWARDS
    assert jax.tree.map(lambda x: x[0], summed).layout == BACKWARDS
    assert known.stretch(jnp.ones(SIZE)).layout == BACKWARDS
    assert known.project(jnp.ones((SIZE, 2))).layout is None
    other = dataclasses.replace(known, layout=trailing(DENSE))
    with pytest.raises(ValueError, match="two layouts"):
        known + other
    # Written with other axes, the same layout.
    assert (known + dataclasses.replace(known, layout=TRANSPOSED)).count == 1024


def test_moments_are_written_and_read_with_their_layout(tmp_path, moments):
    arrays = {name: moments_to_arrays(m) for name, m in moments.items()}
    jc.save(tmp_path / "m", arrays)
    back = {name: moments_from_arrays(x) for name, x in jc.load(tmp_path / "m").items()}
    assert back["kernel"].layout == BACKWARDS
    assert jax.tree.structure(back) == jax.tree.structure(moments)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(moments), strict=True):
        np.testing.assert_array_equal(a, b)
    plain = Moments(jnp.ones(()))
    assert moments_from_arrays(moments_to_arrays(plain)).layout is None


def test_a_stack_needs_no_layout_and_its_slices_keep_it():
    model = Scanned()
    params = model.init(jax.random.key(1), X)["params"]
    known = jc.collect_moments(model, params, [X])
    (name,) = known
    assert known[name].layout == BACKWARDS and known[name].count.shape == (2,)
    small = jc.compress(params, "wanda(sparsity=0.5)", known)
    layout = jc.find_layouts(model, params, X)
    assert leading(known[name].layout, 3) == layout[name]
    again = jc.compress(params, "wanda(sparsity=0.5)", known, layouts=layout)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    one = {"kernel": jax.tree.map(lambda x: x[1], known[name])}
    alone = {"kernel": jax.tree.leaves(params)[0][1]}
    part = jc.compress(alone, "wanda(sparsity=0.5)", one)["kernel"]
    whole = jax.tree.leaves(jc.materialize(small))[0][1]
    np.testing.assert_array_equal(jc.materialize(part), whole)


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + Projection(name=f"block_{i}")(x)
        return x


def test_blockwise_compression_goes_by_the_trace_and_checks_moments_given():
    model = Blocks()
    params = model.init(jax.random.key(1), X)["params"]
    known = jc.collect_moments(model, params, [X])
    known = {
        name: dataclasses.replace(m, curvatures=jnp.ones(SIZE))
        for name, m in known.items()
    }
    recipe = "wanda(sparsity=0.5)"
    small = jc.compress_blockwise(model, params, recipe, [X], moments=known)
    first = jc.compress(params, recipe, known)
    name = "block_0"
    np.testing.assert_array_equal(
        jc.materialize(small)[name]["kernel"], jc.materialize(first)[name]["kernel"]
    )
    wrong = {n: dataclasses.replace(m, layout=DENSE) for n, m in known.items()}
    with pytest.raises(ValueError, match="block_0/kernel: the layout given"):
        jc.compress_blockwise(model, params, recipe, [X], moments=wrong)


@pytest.mark.parametrize(
    "layout", [DENSE, ROWS, Layout((0,), (1,), (2, 3)), Layout((0, 1), (4, 2), (3,))]
)
def test_trailing_and_leading_are_inverse(layout):
    axes = len(layout.stack + layout.inputs + layout.outputs)
    assert leading(trailing(layout), axes) == layout
    assert trailing(trailing(layout)) == trailing(layout)
    assert len(leading(layout, axes + 1).stack) == len(layout.stack) + 1

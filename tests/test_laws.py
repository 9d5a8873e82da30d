"""What every method owes, whatever it does: one joins by a line in `laws.py`."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from laws import (
    CHOOSING,
    FEATURES,
    HIDDEN,
    LAYERS,
    SEQUENTIAL,
    TOKENS,
    Model,
    all_moments,
    apply,
    compressed,
    driven_by_data,
    every,
    moments_for,
    parameters,
    stages,
    traceable,
)

import jaxcompress as jc
from jaxcompress.calibration.masked import Masked, fill
from jaxcompress.storage import load, save
from jaxcompress.tree.leaf import dense as dense_of
from jaxcompress.tree.methods import parse
from jaxcompress.tree.paths import entries, is_float, map_entries

KERNEL = "layer_0/up/kernel"


@functools.cache
def dense(method, scanned=False, dtype="float32"):
    return materialize(compressed(method, scanned, dtype))


materialize = jax.jit(jc.materialize)
run = {scanned: jax.jit(Model(scanned).apply) for scanned in (False, True)}


def contents(tree):
    """Structure, dtypes, shapes and bytes of all arrays."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(x) for x in leaves]
    return structure, [(x.dtype, x.shape, x.tobytes()) for x in arrays]


def of_one_matrix(method, name=KERNEL, scanned=False):
    """The method as a function of a matrix, or of a stack of them."""
    known = moments_for(method, scanned)
    known = known and dataclasses.replace(known[name], layout=None)
    (stage,) = stages(method)
    return lambda x: parse(stage)(x, known)


def seconds_for(method, part=""):
    """What a second-order method's results are compared in; None for other methods."""
    if not method.endswith("| moments") or not method.startswith(SEQUENTIAL):
        return None
    named = jax.tree_util.tree_leaves_with_path(parameters())
    names = ["/".join(key.key for key in path) for path, _ in named]
    known = all_moments()
    return [
        known[name].second if name in known else None
        for name in names
        if name.startswith(part) and (name in known or not part)
    ]


def output_loss(change, second):
    change = change.reshape(-1, change.shape[-1])
    if second is None:
        return np.sum(change**2)
    if len(change) != len(second):
        change = change.T  # an embedding: its features are the inputs of the head
    return np.sum(change * (np.asarray(second, np.float64) @ change))


def check_same(a, b, original, seconds=None):
    """Equal, but for weights within 1e-5 of a step from a tie of nearest rounding.

    With second moments their objective is: another tie changes all that follows it.
    """
    flat = [jax.tree.leaves(tree) for tree in (a, b, original)]
    seconds = [None] * len(flat[0]) if seconds is None else seconds
    by_objective = any(second is not None for second in seconds)
    for x, y, weight, second in zip(*flat, seconds, strict=True):
        x, y, weight = (np.asarray(v, np.float64) for v in (x, y, weight))
        if by_objective:
            losses = [output_loss(v - weight, second) for v in (x, y)]
            np.testing.assert_allclose(*losses, rtol=0.02, atol=1e-9)
            continue
        noise = 1e-6 * np.abs(weight).max()
        other = np.abs(x - y) > noise
        tie = np.abs(np.abs(x - weight) - np.abs(y - weight))
        wrong = other & (tie > 2e-5 * np.abs(x - y) + noise)
        if wrong.any() or other.mean() >= 0.01:
            at = np.unravel_index(np.argmax(np.where(wrong, tie, 0)), tie.shape)
            raise AssertionError(
                f"{other.sum()} of {other.size} weights differ, {wrong.sum()} by more "
                f"than a tie; worst at {at}: {x[at]} and {y[at]} for {weight[at]}"
            )


@traceable
def test_jit_equals_eager(method):
    params = parameters()
    f, weight = of_one_matrix(method), params["layer_0"]["up"]["kernel"]
    inside = jax.jit(lambda x: f(x).materialize())(weight)
    # Before jax 0.8 disable_jit mixes up executables of float64 and float32.
    old = not hasattr(jax, "enable_x64")
    with contextlib.nullcontext() if old else jax.disable_jit():
        outside = f(jnp.asarray(weight)).materialize()
    check = functools.partial(check_same, b=outside, original=weight)
    check(inside, seconds=seconds_for(method, "layer_0"))
    check(
        dense(method)["layer_0"]["up"]["kernel"], seconds=seconds_for(method, "layer_0")
    )


@traceable
def test_eval_shape_equals_the_result(method):
    result = compressed(method)  # first: moments are made where nothing is traced
    abstract = jax.eval_shape(lambda params: apply(method, params), parameters())
    assert jax.tree.structure(abstract) == jax.tree.structure(result)
    for a, b in zip(*map(jax.tree.leaves, (abstract, result)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert jc.nbytes(abstract) == jc.nbytes(result)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_materialize_restores_structure_shapes_and_dtypes(method, dtype):
    params, back = parameters(dtype=dtype), dense(method, dtype=dtype)
    assert jax.tree.structure(params) == jax.tree.structure(back)
    is_leaf = lambda x: isinstance(x, jc.Leaf)  # noqa: E731
    leaves = jax.tree.leaves(compressed(method, dtype=dtype), is_leaf=is_leaf)
    assert any(map(is_leaf, leaves))
    pairs = zip(*map(jax.tree.leaves, (params, back)), leaves, strict=True)
    for weight, restored, leaf in pairs:
        assert weight.shape == restored.shape == leaf.shape
        assert weight.dtype == restored.dtype == leaf.dtype
        wide = np.asarray(weight, np.float32)
        error = np.linalg.norm(np.asarray(restored, np.float32) - wide)
        assert error <= 0.8 * np.linalg.norm(wide)


@every
def test_the_input_is_untouched_and_the_rest_identical(method):
    params = jax.tree.map(np.copy, parameters())
    small = apply(method, params)
    for old, before in zip(*map(jax.tree.leaves, (params, parameters())), strict=True):
        np.testing.assert_array_equal(old, before)
    rules = [(KERNEL, stages(method)[0])]
    first = jc.compress(params, rules, moments_for(method))
    for name in ("embed", "layer_1"):
        assert all(
            new is old
            for new, old in zip(
                *map(jax.tree.leaves, (first[name], params[name])), strict=True
            )
        )
    assert isinstance(small["layer_0"]["up"]["kernel"], jc.Leaf)
    assert isinstance(first["layer_0"]["up"]["kernel"], jc.Leaf)


@traceable
def test_traced_once_for_equal_shapes(method):
    shapes = []
    (stage,) = stages(method)
    partial = parse(stage)

    def counted(x, moments=None, **options):
        shapes.append(x.shape)
        return partial.func(x, moments, **options)

    counted.traits = partial.func.traits
    params = parameters()
    for _ in range(2):
        recipe = functools.partial(counted, **partial.keywords)
        jc.compress(params, recipe, moments_for(method))
    # Of two kernels and the embedding, twice; its moments also count the rows read.
    most = 1 if moments_for(method) is None else 2
    assert shapes == [(FEATURES, HIDDEN)] * most


@traceable
def test_a_stack_equals_its_slices_one_by_one(method):
    (stage,), name = stages(method), "layers/up/kernel"
    f = parse(stage)
    stack = parameters(scanned=True)["layers"]["up"]["kernel"]
    known = moments_for(method, scanned=True)
    known = known and dataclasses.replace(known[name], layout=None)
    slices = [jax.tree.map(lambda x, i=i: x[i], known) for i in range(LAYERS)]
    pairs = zip(stack, slices, strict=True)
    single = [materialize(f(jnp.asarray(matrix), m)) for matrix, m in pairs]
    vmapped = jax.jit(jax.vmap(f))(stack, known)
    whole = f(jnp.asarray(stack), known)
    assert jax.tree.structure(vmapped) == jax.tree.structure(whole)
    for a, b in zip(*map(jax.tree.leaves, (vmapped, whole)), strict=True):
        assert a.shape == b.shape and a.shape[0] == LAYERS
    one = jax.tree.map(lambda x: x[1], whole)
    assert one.shape == stack.shape[1:]
    seconds = None
    if seconds_for(method) is not None:
        seconds = [m.second for m in slices]
    check_same(materialize(one), single[1], stack[1], seconds and seconds[1:])
    check_same(list(materialize(vmapped)), single, list(stack), seconds)
    check_same(list(materialize(whole)), single, list(stack), seconds)


@every
def test_the_same_bytes_twice(method):
    assert contents(apply(method, parameters())) == contents(compressed(method))


@pytest.mark.slow
@every
def test_a_constant_of_a_jitted_function_gives_the_same(method):
    """As frozen parts do that a loss closes over, alone and in a slice of a stack."""
    scanned = compressed(method, scanned=True)["layers"]["up"]["kernel"]
    looped = compressed(method)["layer_0"]["up"]["kernel"]
    for leaf in (looped, scanned):
        inside = jax.jit(lambda leaf=leaf: dense_of(leaf) + 0)()
        check_same(inside, dense_of(leaf), dense_of(leaf))


@every
@pytest.mark.parametrize("scanned", [False, True])
def test_saved_and_loaded_bit_for_bit(method, scanned, tmp_path):
    small = compressed(method, scanned)
    save(tmp_path / "small.safetensors", small)
    assert contents(load(tmp_path / "small.safetensors")) == contents(small)


@every
@pytest.mark.parametrize("scanned", [False, True])
def test_an_unmodified_model_runs_on_it(method, scanned):
    small = run[scanned]({"params": compressed(method, scanned)}, TOKENS)
    expected = run[scanned]({"params": dense(method, scanned)}, TOKENS)
    np.testing.assert_allclose(small, expected, rtol=1e-5, atol=1e-5)


@every
def test_a_parameter_sharded_over_two_devices_gives_the_same(method):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    params = parameters()
    sharded = jax.tree.map(jnp.asarray, params)
    for layer, axes in enumerate([(None, "d"), ("d", None)]):
        part = sharded[f"layer_{layer}"]["up"]
        where = NamedSharding(mesh, PartitionSpec(*axes))
        part["kernel"] = jax.device_put(part["kernel"], where)
        assert len(part["kernel"].sharding.device_set) == 2
    small = apply(method, sharded)
    plain = compressed(method)
    for a, b in zip(*map(jax.tree.leaves, (small, plain)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    check_same(materialize(small), dense(method), params, seconds_for(method))


def test_lossless_stages_change_no_bit():
    assert contents(dense("code_floats()")) == contents(parameters())
    coded = contents(dense("sign_split(bits=(3, 3)) > entropy_code()"))
    assert coded == contents(dense("sign_split(bits=(3, 3))"))


# What a compressed prefix makes of the inputs of one layer: other tokens' inputs.
@functools.cache
def drifted_moments():
    rng = np.random.default_rng(5)
    old = rng.normal(size=(400, FEATURES)) * np.geomspace(1, 8, FEATURES)
    new = old + 0.5 * rng.normal(size=old.shape) @ rng.normal(size=(FEATURES,) * 2)
    mean = lambda a, b: jnp.asarray(a.T @ b / len(a), jnp.float32)  # noqa: E731
    still = jc.Moments(jnp.ones(()), second=mean(old, old))
    cross, drifted = mean(old, new), mean(new, new)
    return still, dataclasses.replace(still, drifted=drifted, cross=cross)


@driven_by_data
def test_drift_changes_what_every_method_driven_by_data_sees(method):
    """And for the better: the outputs on the inputs that the layer will have."""
    weight = parameters()["layer_0"]["up"]["kernel"]
    still, drifted = drifted_moments()

    def result(moments):
        rules = [(KERNEL, stages(method)[0])]
        small = jc.compress(parameters(), rules, {KERNEL: moments})
        leaf = small["layer_0"]["up"]["kernel"]
        if method.startswith("outliers"):  # all terms together are the weight again
            leaf = leaf.terms[0]
        return np.asarray(materialize(leaf), np.float64)

    without, along = result(still), result(drifted)
    assert np.linalg.norm(along - without) > 0.01 * np.linalg.norm(weight)
    if method.startswith("outliers"):
        return
    wide = np.asarray(weight, np.float64)
    second, seen, cross = (
        np.asarray(x, np.float64)
        for x in (drifted.second, drifted.drifted, drifted.cross)
    )

    if method.startswith(CHOOSING):
        second = cross = seen

    def loss(value):  # E |x W - x' V|^2, with x' in both places for those that choose
        return (
            np.sum(wide * (second @ wide))
            - 2 * np.sum(wide * (cross @ value))
            + np.sum(value * (seen @ value))
        )

    assert loss(along) < loss(without)


# First stage, and the fields inside it which inputs of the layer still reach.
FOLLOW = {
    "svd(rank=40)": {"left", "right"},
    "svd(rank=48) > svd(rank=44)": {
        "left/left",
        "left/right",
        "right/left",
        "right/right",
    },
    "corrected(base='symmetric(bits=3, block=16)', rank=8)": {
        "terms/1/left",
        "terms/1/right",
    },
    "outliers(fraction=0.02)": {"terms/0", "terms/1/values"},
    "mixed_channels(bits=3, channels=8, axis='outputs')": {"kept"},
    "wanda(sparsity=0.5)": {"values"},
    "cp(rank=64, sizes=(64, 8, 12), sweeps=2)": set(),
    "tucker(ranks=(48, 8, 10), sizes=(64, 8, 12), sweeps=2)": set(),
}


def effect_of(inner, change, tree):
    """What the whole kernel gains where an inner weight, of zeros, gains `change`."""

    def whole(new):
        put = lambda entry: new if entry.name == inner.name else entry.value  # noqa: E731
        return dense_of(map_entries(put, tree)["layer_0"]["up"]["kernel"])

    change = jnp.asarray(change, jnp.float32)
    return np.asarray(whole(change) - whole(0 * change), np.float64)


@pytest.mark.parametrize("first", FOLLOW)
def test_moments_follow_every_chain_or_the_error_says_that_they_cannot(first):
    """An error of an inner weight costs, by its moments, what it costs the outputs."""
    known = {KERNEL: all_moments()[KERNEL]}
    small = {"layer_0": {"up": {"kernel": parameters()["layer_0"]["up"]["kernel"]}}}
    for stage in stages(first):
        small = jc.compress(small, [(f"{KERNEL}.*", stage)], known)
    second = np.asarray(known[KERNEL].second, np.float64)
    rng = np.random.default_rng(3)
    followed = set()
    for inner in entries(small, known):
        if not inner.weight or not is_float(inner.value):
            continue
        if inner.moments is None:
            with pytest.raises(ValueError, match=f"{inner.name}.* needs"):
                jc.compress(small, [(re.escape(inner.name), "gptq(bits=3)")], known)
            continue
        followed.add(inner.name.removeprefix(KERNEL + "/"))
        if isinstance(inner.moments, Masked):
            # The whole kernel's moments; a change moves what stays, and nothing else.
            change = rng.normal(size=inner.value.shape)
            moved = fill(jnp.asarray(change, jnp.float32), inner.moments.mask)
            np.testing.assert_array_equal(moved, effect_of(inner, change, small))
            np.testing.assert_array_equal(inner.moments.moments.second, second)
            continue
        outputs = rng.normal(size=inner.value.shape[-1])
        ratios = []
        for inputs in rng.normal(size=(4, inner.value.shape[-2])):
            change = np.outer(inputs, outputs)

            costs = output_loss(effect_of(inner, change, small), second)
            own = np.asarray(inner.moments.second, np.float64)
            ratios.append(costs / output_loss(change, own))
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
    assert followed == FOLLOW[first]

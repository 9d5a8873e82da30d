"""Training steps and runs: what trains, accumulation, meshes, resuming, bad input."""

import functools
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jaxcompress as jc
from jaxcompress import distillation as d

ROWS, WIDTH = 32, 16
RECIPE = [
    ("up/kernel", "symmetric(bits=4)"),
    ("mix/kernel", "magnitude(sparsity=0.5)"),
    ("down/kernel", "svd(rank=4)"),
    (".*", None),
]
# Adam makes steps of the noise where a gradient is almost zero: compare with this one.
SGD = optax.sgd(0.1)
OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)


def dense():
    """Parameters of `apply`: the next token from this one and the one before."""
    random = np.random.default_rng(5)
    sizes = {
        "up": (WIDTH, 2 * WIDTH),
        "mix": (2 * WIDTH,) * 2,
        "down": (2 * WIDTH, WIDTH),
    }
    draw = lambda *shape: jnp.asarray(random.normal(size=shape) / 4, jnp.float32)  # noqa: E731
    layers = {name: {"kernel": draw(*shape)} for name, shape in sizes.items()}
    return {"embed": {"embedding": draw(ROWS, WIDTH)}, "bias": draw(WIDTH), **layers}


def apply(params, tokens):
    params = jc.materialize(params)
    x = params["embed"]["embedding"][tokens]
    x = x + 0.5 * jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    x = jnp.tanh(x @ params["up"]["kernel"])
    x = jnp.tanh(x @ params["mix"]["kernel"]) @ params["down"]["kernel"]
    return (x + params["bias"][None, None]) @ params["embed"]["embedding"].T


DENSE = dense()


@functools.cache
def small():
    return jc.compress(DENSE, RECIPE)


def batch_at(step, examples=4):
    random = np.random.default_rng((7, step))
    tokens = random.integers(0, ROWS, (examples, 6)).astype(np.int32)
    lengths = random.integers(3, 7, examples)
    return {"tokens": tokens, "mask": np.arange(6) < lengths[:, None]}


def loss_of(teacher, params, batch, key):
    """KL to the teacher on the tokens, and a little noise from the key."""
    logits = apply(params, batch["tokens"])
    target = apply(teacher, batch["tokens"])
    values = d.forward_kl(logits, target, mask=batch["mask"])
    noise = (
        1e-3 * jax.random.normal(key) * jnp.square(params["embed"]["embedding"]).mean()
    )
    weight = d.count(values, batch["mask"])
    return d.mean(values, batch["mask"]) + noise, {
        "weight": weight,
        "twice": 2 * weight,
    }


LOSS = jax.tree_util.Partial(loss_of, jax.tree.map(lambda x: 1.5 * x, DENSE))


@functools.cache
def stepper(accumulate=1):
    return d.make_train_step(LOSS, OPTIMIZER, accumulate=accumulate)


def same_places(first, second):
    """Whether every array of two trees lies on the same devices in the same way."""
    return all(
        x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for x, y in zip(*map(jax.tree.leaves, (first, second)), strict=True)
    )


def start(params=None, optimizer=OPTIMIZER):
    params = small() if params is None else params
    return d.init_state(params, optimizer, key=jax.random.key(3))


def test_public_name():
    assert jc.make_train_step is d.make_train_step


@pytest.mark.slow
def test_codes_stay_and_the_rest_trains():
    state, losses = start(), []
    for _ in range(12):
        state, metrics = stepper()(state, batch_at(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0] and int(state.step) == 12
    trained, codes = jc.partition(state.params)
    before, kept = jc.partition(small())
    chex.assert_trees_all_equal(codes, kept)
    assert len(jax.tree.leaves(kept)) == 2
    for old, new in zip(*map(jax.tree.leaves, (before, trained)), strict=True):
        assert (old != new).any()
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, small())


def test_one_step_is_optax_by_hand():
    key = jax.random.fold_in(jax.random.key(3), 0)
    batch = jax.tree.map(jnp.asarray, batch_at(0))

    @jax.jit
    def by_hand(params):
        trainable, frozen = jc.partition(params)
        loss, gradient = jax.value_and_grad(
            lambda x: LOSS(jc.combine(x, frozen), batch, key)[0]
        )(trainable)
        updates, _ = SGD.update(gradient, SGD.init(trainable), trainable)
        return jc.combine(optax.apply_updates(trainable, updates), frozen), loss

    params, loss = by_hand(DENSE)
    step = d.make_train_step(LOSS, SGD)
    state, metrics = step(start(DENSE, SGD), batch_at(0))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-5)
    assert metrics["weight"] == batch["mask"].sum() and metrics["gradient_norm"] > 0


def test_the_callers_arrays_are_not_given_up():
    params = jax.tree.map(jnp.array, small())
    state = start(params)
    key = state.key
    after, _ = stepper()(state, batch_at(0))
    chex.assert_trees_all_equal(params, small())
    assert jax.tree.leaves(state.params)[0].is_deleted() and key.is_deleted()
    jax.block_until_ready(after)
    assert not any(x.is_deleted() for x in jax.tree.leaves(LOSS))


def test_the_teacher_is_an_argument_of_the_step():
    traced = []

    def loss(teacher, params, batch, key):
        traced.append(teacher)
        return jnp.square(params["w"] - teacher).mean(), {}

    teacher = jax.tree_util.Partial(loss, jnp.arange(3.0))
    step = d.make_train_step(teacher, SGD)
    state = start({"w": jnp.zeros(3)}, SGD)
    for _ in range(3):
        state, _ = step(state, {"x": np.zeros(1)})
    assert len(traced) == 1 and isinstance(traced[0], jax.core.Tracer)
    np.testing.assert_allclose(
        state.params["w"], (1 - (1 - 0.2 / 3) ** 3) * np.arange(3), rtol=1e-5
    )


def quiet(teacher, params, batch, key):
    return loss_of(teacher, params, batch, jax.random.key(0))


@pytest.mark.slow
def test_accumulation_is_the_whole_batch():
    """Though its parts have different numbers of tokens."""
    loss = jax.tree_util.Partial(quiet, *LOSS.args)
    results = []
    for accumulate in (1, 4):
        step = d.make_train_step(loss, SGD, accumulate=accumulate)
        results.append(step(start(DENSE, SGD), batch_at(1)))
    (whole, first), (parts, second) = results
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-4, atol=1e-6)
    assert first["weight"] == second["weight"] == batch_at(1)["mask"].sum()
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(second[name], first[name], rtol=1e-4)
    assert second["twice"] < first["twice"]  # an average, as it is no weight


def test_mixed_precision_keeps_the_parameters_wide():
    seen = {}

    def loss(params, batch, key):
        seen.update({name: x.dtype for name, x in params.items()})
        x = batch["x"].astype(jnp.bfloat16)
        return jnp.square((x @ params["w"]).astype(jnp.float32) - 1).mean(), {}

    params = {"w": jnp.full((8, 1), 0.3), "codes": jnp.ones(2, jnp.uint8)}
    step = d.make_train_step(loss, SGD, compute_dtype=jnp.bfloat16)
    state = start(params, SGD)
    for _ in range(40):
        state, metrics = step(state, {"x": np.ones((4, 8), np.float32)})
    assert seen == {"w": jnp.bfloat16, "codes": jnp.uint8}
    assert state.params["w"].dtype == jnp.float32 and metrics["loss"] < 1e-4
    # Finer than bfloat16: the steps have been added up in float32.
    w = state.params["w"]
    assert (w != w.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, "data"])
def test_two_devices_give_the_same_losses(axis):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    step = d.make_train_step(LOSS, OPTIMIZER)
    one, two = start(), d.place(start(), mesh, axis=axis)
    first_place = d.place(start(), mesh, axis=axis)
    sharded = [x for x in jax.tree.leaves(two.params) if not x.is_fully_replicated]
    assert bool(sharded) == (axis is not None)
    for number in range(4):
        one, first = stepper()(one, batch_at(number))
        two, second = step(two, d.shard_batch(batch_at(number), mesh))
        jax.block_until_ready(two)
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(second[name], first[name], rtol=1e-5)
    assert same_places(two, first_place)


def test_a_state_survives_its_checkpoint(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    state, _ = stepper()(start(), batch_at(0))
    d.save_state(tmp_path / "new" / "one", state)
    again = d.restore_state(tmp_path / "new" / "one", start())
    chex.assert_trees_all_equal(again, state)
    there = d.place(start(), mesh, axis="data")
    moved = d.restore_state(tmp_path / "new" / "one", there)
    chex.assert_trees_all_equal(
        jax.device_get(moved.params), jax.device_get(state.params)
    )
    assert same_places(moved, there)
    with pytest.raises(ValueError, match="resume with the same model"):
        d.restore_state(tmp_path / "new" / "one", start(DENSE))


def test_a_checkpoint_is_of_leaves_of_one_kind(tmp_path):
    """Codes of both grids have the same shapes, and mean other numbers."""
    signed, other = (
        start(jc.compress({"w": jnp.eye(4)}, [("w", method)]), SGD)
        for method in ("symmetric(bits=4, block=2)", "nf4(block=2)")
    )
    chex.assert_trees_all_equal_shapes(*map(jax.tree.leaves, (signed, other)))
    d.save_state(tmp_path / "one", signed)
    chex.assert_trees_all_equal(d.restore_state(tmp_path / "one", signed), signed)
    with pytest.raises(ValueError, match="leaves of other types or settings"):
        d.restore_state(tmp_path / "one", other)


PROGRAM = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import training.test_steps as t
    from jaxcompress import distillation as d

    def batch_at(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return t.batch_at(step)

    d.train(t.stepper(), t.start(), batch_at, steps=7, folder={folder!r}, every=2)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_same_bits(tmp_path):
    whole = d.train(stepper(), start(), batch_at, steps=7)
    tests = str(Path(__file__).parents[1])
    folder = tmp_path / "run"
    program = textwrap.dedent(PROGRAM).format(tests=tests, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert d.latest_checkpoint(folder).name == "step_00000004"
    seen = []

    def resumed_at(step):
        seen.append(step)
        return batch_at(step)

    ended = d.train(stepper(), start(), resumed_at, steps=7, folder=folder, every=2)
    assert seen == [4, 5, 6]
    chex.assert_trees_all_equal(ended, whole)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000006",
        "step_00000007",
    ]


def test_a_loss_that_is_nan_stops_the_run(tmp_path):
    def loss(params, batch, key):
        return jnp.square(params["w"] - batch["x"][0]).sum(), {}

    def bad_at(step):
        return {"x": np.full(1, np.nan if step == 3 else 1.0, np.float32)}

    step = d.make_train_step(loss, SGD)
    seen = []
    with pytest.raises(
        FloatingPointError, match=r"step 4: the loss is nan.*step_00000002 stays"
    ):
        d.train(
            step,
            start({"w": jnp.zeros(2)}, SGD),
            bad_at,
            steps=6,
            folder=tmp_path,
            every=2,
            report=lambda number, metrics: seen.append((number, metrics["loss"])),
        )
    assert [number for number, _ in seen] == [1, 2, 3]
    kept = d.restore_state(tmp_path / "step_00000002", start({"w": jnp.zeros(2)}, SGD))
    np.testing.assert_allclose(kept.params["w"], 0.36, rtol=1e-5)
    state, metrics = step(kept, bad_at(3))
    assert not metrics["finite"] and int(state.step) == 2
    np.testing.assert_allclose(state.params["w"], 0.36, rtol=1e-5)


def test_an_infinite_gradient_changes_nothing_either():
    loss = lambda params, batch, key: (jnp.sqrt(params["w"]).sum(), {})  # noqa: E731
    step = d.make_train_step(loss, SGD)
    state, metrics = step(start({"w": jnp.zeros(2)}, SGD), {"x": np.ones(1)})
    assert metrics["loss"] == 0 and not metrics["finite"]
    assert (state.params["w"] == 0).all()


def test_an_infinite_update_changes_nothing_and_stops_the_run(tmp_path):
    loss = lambda params, batch, key: (params["w"].sum(), {})  # noqa: E731
    optimizer = optax.sgd(lambda step: jnp.where(step < 2, 0.1, jnp.inf))
    begin = lambda: start({"w": jnp.zeros(2)}, optimizer)  # noqa: E731
    step = d.make_train_step(loss, optimizer)
    with pytest.raises(FloatingPointError, match=r"update inf; .*step_00000002 stays"):
        d.train(
            step,
            begin(),
            lambda number: {"x": np.ones(1)},
            steps=5,
            folder=tmp_path,
            every=1,
            max_to_keep=1,
        )
    kept = d.restore_state(tmp_path / "step_00000002", begin())
    np.testing.assert_allclose(kept.params["w"], -0.2, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mask_on_a_device_may_turn_out_empty(accumulate):
    batch = jax.tree.map(jnp.asarray, batch_at(0))
    batch["mask"] = jnp.zeros_like(batch["mask"])
    state, metrics = stepper(accumulate)(start(), batch)
    assert not metrics["finite"] and int(state.step) == 0
    chex.assert_trees_all_equal(state.params, start().params)
    with pytest.raises(ValueError, match="step 1: an empty batch"):
        d.train(stepper(accumulate), start(), lambda number: batch, steps=1)


EMPTY = {"tokens": np.zeros((0, 6), np.int32), "mask": np.zeros((0, 6), bool)}
MASKED = {"tokens": np.zeros((2, 6), np.int32), "mask": np.zeros((2, 6), bool)}
WRONG = {
    "empty": (lambda: stepper()(start(), EMPTY), "is empty or uneven"),
    "masked": (lambda: stepper()(start(), MASKED), "mask is false everywhere"),
    "no arrays": (lambda: stepper()(start(), {}), "is empty or uneven"),
    "uneven": (
        lambda: stepper()(start(), {**MASKED, "mask": np.ones((3, 6), bool)}),
        r"\(3, 6\), \(2, 6\).* empty or uneven",
    ),
    "empty in a run": (
        lambda: d.train(stepper(), start(), lambda step: EMPTY, steps=1),
        "step 1: .* is empty or uneven",
    ),
    "masked on a device": (
        lambda: d.train(
            stepper(), start(), lambda step: jax.tree.map(jnp.asarray, MASKED), steps=1
        ),
        "step 1: an empty batch",
    ),
    "parts": (lambda: stepper(4)(start(), batch_at(0, 6)), "6 examples .* into 4"),
    "no parts": (lambda: d.make_train_step(LOSS, OPTIMIZER, accumulate=0), "not 0"),
    "float16": (
        lambda: d.make_train_step(LOSS, OPTIMIZER, compute_dtype=jnp.float16),
        "compute_dtype is float16",
    ),
    "vector": (
        lambda: d.make_train_step(lambda p, b, k: (p["w"], {}), OPTIMIZER)(
            start({"w": jnp.zeros(2)}), batch_at(0)
        ),
        r"the loss is float32 \(2,\)",
    ),
    "metric": (
        lambda: d.make_train_step(lambda p, b, k: (p["w"].sum(), p), OPTIMIZER)(
            start({"w": jnp.zeros(2)}), batch_at(0)
        ),
        r"metric 'w' has shape \(2,\)",
    ),
    "own metric": (
        lambda: d.make_train_step(
            lambda p, b, k: (p["w"].sum(), {"loss": p["w"].sum()}), OPTIMIZER
        )(start({"w": jnp.zeros(2)}), batch_at(0)),
        "call the metric 'loss' of the loss function otherwise",
    ),
    "nothing trains": (
        lambda: start({"codes": jnp.ones(2, jnp.uint8)}),
        "nothing here trains",
    ),
    "steps": (lambda: d.train(stepper(), start(), batch_at, steps=-1), "steps is -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_meshes():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="not 'model'"):
        d.place(start(), mesh, axis="model")
    with pytest.raises(ValueError, match="3 examples cannot be shared out over 2"):
        d.shard_batch(batch_at(0, 3), mesh)


def test_an_update_of_another_shape_is_refused():
    """`optax.apply_updates` would broadcast it over the weights."""
    narrow = optax.stateless(lambda updates, _: jax.tree.map(jnp.sum, updates))
    loss = lambda p, batch, key: (jnp.square(p["w"]).sum(), {})  # noqa: E731
    state = d.init_state({"w": jnp.ones((3, 2))}, narrow, key=jax.random.key(0))
    with pytest.raises(AssertionError, match="shapes"):
        d.make_train_step(loss, narrow)(state, {"x": np.ones((1, 1))})

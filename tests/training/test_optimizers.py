"""Optimizers by name and by layer, and projections, in training steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import distillation as d
from jaxcompress.tree.paths import array_names

RANDOM = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


DENSE = {
    "embed": {"embedding": draw(16, 8)},
    "layer_0": {"mlp": {"kernel": draw(8, 8), "bias": draw(8)}},
    "layer_1": {"mlp": {"kernel": draw(8, 8), "bias": draw(8)}},
    "norm": {"scale": draw(8)},
}
SMALL = jc.compress(DENSE, [("layer_1/mlp/kernel", "symmetric(bits=4)"), (".*", None)])


def moved(optimizer, params=SMALL, steps=1):
    """Parameters after steps on gradients of one, by name, less those before."""

    def loss(params, batch, key):
        trainable, _ = jc.partition(params)
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(trainable)), {}

    step = d.make_train_step(loss, optimizer)
    state = d.init_state(params, optimizer, dtype=jnp.float32, key=jax.random.key(0))
    for _ in range(steps):
        state, _ = step(state, {"x": np.ones(1)})
    before, after = (jc.partition(x)[0] for x in (params, state.params))
    changes = jax.tree.map(lambda x, y: np.asarray(y - x), before, after)
    names = jax.tree.leaves(array_names(before))
    return dict(zip(names, jax.tree.leaves(changes), strict=True)), state


def test_names_of_what_trains_are_those_of_the_tree():
    trainable, _ = jc.partition(SMALL)
    names = jax.tree.leaves(array_names(trainable))
    assert set(names) == set(jc.leaf_names(SMALL)) - {"layer_1/mlp/kernel/codes"}
    assert array_names(trainable)["layer_1"]["mlp"]["kernel"].scale == (
        "layer_1/mlp/kernel/scale"
    )
    reshaped = jc.compress(
        {"conv": {"kernel": draw(3, 8, 8)}},
        [("conv/kernel", "symmetric(bits=4)")],
        layouts={"conv/kernel": jc.Layout((), (0, 1), (2,))},
    )
    trainable, _ = jc.partition(reshaped)
    assert jax.tree.leaves(array_names(trainable)) == ["conv/kernel/scale"]


def test_by_name():
    optimizer = jc.optimizers.by_name(
        [
            ("embed/.*", None),
            (r".*kernel(/scale)?", optax.sgd(0.5)),
            (".*", optax.adam(0.25)),
        ]
    )
    changes, state = moved(optimizer)
    for name, change in changes.items():
        want = 0 if name.startswith("embed") else -0.5 if "kernel" in name else -0.25
        np.testing.assert_allclose(change, want, rtol=1e-5)
    sizes = [x.size for x in jax.tree.leaves(state.optimizer)]
    assert sum(sizes) < 3 * 2 * 8 + 8  # no moments of what is frozen or has plain steps
    chex.assert_trees_all_equal(state.params["embed"], SMALL["embed"])


def test_layerwise_rates():
    optimizer = optax.chain(optax.sgd(1.0), jc.optimizers.layerwise_rates(0.5))
    changes, _ = moved(optimizer)
    for name, change in changes.items():
        rate = {"embed": 0.25, "layer_0": 0.5}.get(name.split("/")[0], 1)
        np.testing.assert_allclose(change, -rate, rtol=1e-5)


def test_relative_updates_are_those_of_logarithms():
    """Adam on log |x| of a loss, beside Adam on x with relative updates."""
    start = {"a": jnp.array([1e-3, -2.0, 50.0]), "b": jnp.zeros(2)}
    slope = {"a": jnp.array([30.0, 0.4, -0.02]), "b": jnp.ones(2)}
    optimizer, plain = jc.optimizers.relative(optax.adam(0.01)), optax.adam(0.01)
    logs = {"a": jnp.log(jnp.abs(start["a"]))}
    state, state_of_logs, x = optimizer.init(start), plain.init(logs), start
    for _ in range(3):
        updates, state = optimizer.update(slope, state, x)
        x = optax.apply_updates(x, updates)
        slopes = {"a": slope["a"] * jnp.sign(start["a"]) * jnp.exp(logs["a"])}
        moved_logs, state_of_logs = plain.update(slopes, state_of_logs, logs)
        logs = optax.apply_updates(logs, moved_logs)
    wanted = jnp.sign(start["a"]) * jnp.exp(logs["a"])
    np.testing.assert_allclose(x["a"], wanted, rtol=1e-3)
    assert abs(float(x["a"][0]) / 1e-3 - 1) == pytest.approx(0.03, rel=0.05)
    np.testing.assert_array_equal(x["b"], 0)


def test_layerwise_rates_of_stacked_layers():
    params = {"layers": {"kernel": draw(3, 4, 4), "bias": draw(3, 4)}, "head": draw(4)}
    optimizer = optax.chain(optax.sgd(1.0), jc.optimizers.layerwise_rates(0.5))
    changes, _ = moved(optimizer, params)
    for name in ("layers/kernel", "layers/bias"):
        for layer, rate in enumerate((0.25, 0.5, 1)):
            np.testing.assert_allclose(changes[name][layer], -rate, rtol=1e-5)
    np.testing.assert_allclose(changes["head"], -1, rtol=1e-5)


def on_grid(params):
    rules = [("layer_0/mlp/kernel", "symmetric(bits=4)"), (".*", None)]
    return jc.materialize(jc.compress(params, rules))


@pytest.mark.parametrize("every", [1, 2])
def test_projection_onto_a_grid(every):
    optimizer = optax.chain(
        optax.adam(0.1), jc.optimizers.project(on_grid, every=every)
    )
    for steps in range(1, every + 1):
        _, state = moved(optimizer, DENSE, steps)
        _, plain = moved(optax.adam(0.1), DENSE, steps)
        want = plain.params if steps % every else on_grid(plain.params)
        chex.assert_trees_all_close(state.params, want, rtol=1e-5, atol=1e-6)


def test_projection_onto_masks():
    scores = jax.tree.map(lambda x: jnp.abs(x) if x.ndim == 2 else None, DENSE)
    masks = jc.masks.make(DENSE, scores, 0.5)
    project = jc.optimizers.project(lambda params: jc.masks.apply(params, masks))
    _, state = moved(optax.chain(optax.adamw(0.1), project), DENSE, 3)
    kept = jc.masks.apply(state.params, masks)
    chex.assert_trees_all_close(state.params, kept, atol=1e-6)
    exact = optax.chain(optax.adamw(0.1), jc.optimizers.keep_masked_zero(masks))
    _, state = moved(exact, DENSE, 3)
    chex.assert_trees_all_equal(state.params, jc.masks.apply(state.params, masks))


WRONG = {
    "no match": (
        lambda: jc.optimizers.by_name([("layer_9/.*", None)]).init(DENSE),
        r"'layer_9/\.\*' matches no array that trains; the nearest",
    ),
    "left over": (
        lambda: jc.optimizers.by_name([("layer_.*", None)]).init(DENSE),
        "no pattern matches embed/embedding",
    ),
    "no rule": (lambda: jc.optimizers.by_name([(".*",)]), "is not a rule"),
    "relative": (
        lambda: jc.optimizers.relative(optax.sgd(1.0)).update(
            DENSE, jc.optimizers.relative(optax.sgd(1.0)).init(DENSE)
        ),
        "relative needs the parameters",
    ),
    "decay": (lambda: jc.optimizers.layerwise_rates(0.0), "decay is 0.0"),
    "no layers": (
        lambda: jc.optimizers.layerwise_rates(0.5).update({"a": draw(2)}, None),
        "no name matches",
    ),
    "every": (lambda: jc.optimizers.project(on_grid, every=0), "not 0"),
    "no parameters": (
        lambda: jc.optimizers.project(on_grid).update(
            DENSE, jc.optimizers.project(on_grid).init(DENSE)
        ),
        "needs the parameters",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()

"""Units that leave whole: oracles, masked models, and what makes up for them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.calibration.moments import Moments
from jaxcompress.models import structure
from jaxcompress.models.convolutional import ConvNet
from jaxcompress.models.stacking import stack_layers, unstack_layers
from jaxcompress.models.transformer import Transformer
from jaxcompress.pruning.structured import remove_units
from jaxcompress.pruning.structured.groups import Group, choose_units, find_places
from jaxcompress.pruning.structured.unit_scores import score_units

INPUTS, OUTPUTS, SAMPLES = 12, 7, 400
DAMPING = 1e-3


def samples(seed=0, mean=0.0):
    """Correlated inputs `[samples, inputs]`, float64."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(INPUTS, INPUTS)) * np.exp(rng.normal(size=INPUTS))
    return rng.normal(size=(SAMPLES, INPUTS)) @ mix + mean * rng.normal(size=INPUTS)


def moments_of(x):
    second = jnp.asarray(x.T @ x / len(x), jnp.float32)
    return Moments(jnp.float32(len(x)), jnp.asarray(x.mean(0), jnp.float32), second)


def layer(bias, seed=1):
    rng = np.random.default_rng(seed)
    params = {
        "up": {"kernel": jnp.asarray(rng.normal(size=(5, INPUTS)), jnp.float32)},
        "down": {
            "kernel": jnp.asarray(rng.normal(size=(INPUTS, OUTPUTS)), jnp.float32)
        },
    }
    if bias:
        params["down"]["bias"] = jnp.asarray(rng.normal(size=OUTPUTS), jnp.float32)
    return params


GROUP = [("up/kernel", 1), ("down/kernel", 0)]


# What makes up for units that go.


@pytest.mark.parametrize("bias", [False, True])
def test_what_stays_is_the_least_squares_fit(bias):
    x, params, keep = samples(mean=3.0), layer(bias), [0, 3, 4, 7, 8, 11]
    small = remove_units(params, GROUP, keep, {"down/kernel": moments_of(x)})
    np.testing.assert_array_equal(
        small["up"]["kernel"], params["up"]["kernel"][:, keep]
    )
    # Rows of samples, and a ridge that draws to the old weights, solved as they stand.
    old = np.asarray(params["down"]["kernel"], np.float64)
    kept = x[:, keep]
    spread = kept - kept.mean(0) if bias else kept
    ridge = DAMPING * np.mean(np.sum(spread**2, axis=0))
    rows = np.hstack([kept, np.ones((SAMPLES, 1))])[:, : len(keep) + bias]
    draw = np.sqrt(ridge) * np.eye(len(keep), len(keep) + bias)
    target = x @ old + (np.asarray(params["down"]["bias"]) if bias else 0)
    wanted = np.vstack([target, np.sqrt(ridge) * old[keep]])
    best = np.linalg.lstsq(np.vstack([rows, draw]), wanted, rcond=None)[0]
    np.testing.assert_allclose(small["down"]["kernel"], best[: len(keep)], rtol=2e-3)
    if bias:
        np.testing.assert_allclose(small["down"]["bias"], best[-1], rtol=2e-3)


def test_a_bias_carries_the_mean_of_what_goes():
    x, keep = samples(mean=3.0), [0, 1, 2]
    known = {"down/kernel": moments_of(x)}

    def error(bias):
        params = layer(bias)
        small = remove_units(params, GROUP, keep, known)
        before, after = (
            jax.tree.map(np.asarray, tree["down"]) for tree in (params, small)
        )
        change = x[:, keep] @ after["kernel"] - x @ before["kernel"]
        return np.sum((change + (after["bias"] - before["bias"] if bias else 0)) ** 2)

    assert error(True) < 0.9 * error(False)


def test_units_that_others_can_stand_for_are_removed_for_nothing():
    x = samples()
    x[:, 5] = 2 * x[:, 1] - x[:, 9]
    params, keep = layer(False), [i for i in range(INPUTS) if i != 5]
    known = {"down/kernel": moments_of(x)}
    small = remove_units(params, GROUP, keep, known, damping=1e-9)
    np.testing.assert_allclose(
        x[:, keep] @ small["down"]["kernel"], x @ params["down"]["kernel"], atol=0.02
    )
    plain = remove_units(params, GROUP, keep)
    np.testing.assert_array_equal(
        plain["down"]["kernel"], params["down"]["kernel"][np.array(keep)]
    )
    everything = remove_units(params, GROUP, range(INPUTS), known)
    for a, b in zip(*map(jax.tree.leaves, (everything, params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# What units are worth.


def oracle_losses(old, second, table):
    """Share of the output lost as units go one by one, each solved anew."""
    second = second + DAMPING * np.mean(np.diag(second)) * np.eye(len(second))

    def lost(gone):
        kept = np.setdiff1d(np.arange(len(second)), gone)
        if not kept.size:
            return np.trace(old.T @ second @ old)
        fit = np.linalg.solve(second[np.ix_(kept, kept)], second[kept] @ old)
        change = old.copy()
        change[kept] -= fit
        return np.trace(change.T @ second @ change)

    left, gone, scores = list(range(len(table))), np.array([], int), {}
    while left:
        costs = {unit: lost(np.append(gone, table[unit])) for unit in left}
        unit = min(costs, key=costs.get)
        left.remove(unit)
        gone, scores[unit] = np.append(gone, table[unit]), costs[unit]
    whole = np.trace(old.T @ second @ old)
    return np.array([scores[unit] for unit in range(len(table))]) / whole


@pytest.mark.parametrize("units", [None, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_is_that_of_the_best_that_can_be_done_without_them(units, bias):
    x, params = samples(mean=1.0), layer(bias)
    group = Group(tuple(GROUP), units)
    scores = score_units(
        {"down/kernel": moments_of(x)}, group, params=params, by="loss"
    )
    spread = x - x.mean(0) if bias else x
    old = np.asarray(params["down"]["kernel"], np.float64)
    table = np.arange(INPUTS).reshape(units or INPUTS, -1)
    expected = oracle_losses(old, spread.T @ spread / SAMPLES, table)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-6)
    assert float(jnp.max(scores)) == pytest.approx(1, abs=1e-6)


def test_activation_is_the_root_mean_square_of_what_a_unit_sends():
    x = samples(mean=1.0)
    known = {"down/kernel": moments_of(x)}
    scores = score_units(known, Group(tuple(GROUP), 4))
    power = np.mean(x**2, axis=0).reshape(4, 3).sum(1)
    np.testing.assert_allclose(scores, np.sqrt(power / power.mean()), rtol=1e-5)
    named = score_units(known, {"a": GROUP})
    assert named["a"].shape == (INPUTS,)
    silent = score_units({"down/kernel": moments_of(0 * x)}, GROUP)
    np.testing.assert_array_equal(silent, np.zeros(INPUTS))


def test_units_are_scored_by_loss_where_weights_are_known():
    known, params = {"down/kernel": moments_of(samples())}, layer(False)
    found = {
        by: score_units(known, GROUP, params=params, by=by)
        for by in ("auto", "activation", "loss")
    }
    np.testing.assert_array_equal(found["auto"], found["loss"])
    assert np.any(np.argsort(found["activation"]) != np.argsort(found["loss"]))
    alone = score_units(known, GROUP)
    np.testing.assert_array_equal(alone, found["activation"])


def test_readers_add_up_and_silent_inputs_are_worth_nothing():
    x = samples()
    x[:, 4] = 0
    rng = np.random.default_rng(3)
    wide = jnp.asarray(rng.normal(size=(INPUTS, 5)), jnp.float32)
    params = layer(False) | {"other": {"kernel": wide}}
    group = [*GROUP, ("other/kernel", 0)]
    known = {f"{name}/kernel": moments_of(x) for name in ("down", "other")}
    both = score_units(known, group, params=params, by="loss")
    joined = np.hstack([params["down"]["kernel"], wide])
    one = {"up": params["up"], "down": {"kernel": jnp.asarray(joined)}}
    alone = score_units(known, GROUP, params=one, by="loss")
    np.testing.assert_allclose(both, alone, rtol=1e-4, atol=1e-7)
    assert both[4] == 0
    with jax.debug_nans(True):
        score_units(known, Group(tuple(group), 4), params=params, by="loss")


def test_the_best_units_are_chosen_in_order():
    scores = {"a": [3.0, 1.0, 2.0, 2.0], "b": [0.1, 0.2]}
    kept = choose_units(scores, 0.5)
    assert {key: list(value) for key, value in kept.items()} == {"a": [0, 2], "b": [1]}
    kept = choose_units(scores, 0.5, scope="global")
    assert {key: list(value) for key, value in kept.items()} == {"a": [0, 2], "b": [1]}
    kept = choose_units(scores, 0.9, scope="global")
    assert {key: list(value) for key, value in kept.items()} == {"a": [0], "b": [1]}
    np.testing.assert_array_equal(choose_units(jnp.zeros(4), 0.25), [0, 1, 2])


# Our models.

TOKENS = jnp.arange(12).reshape(2, 6) % 11


@functools.cache
def transformer():
    model = Transformer(
        vocab_size=11,
        width=16,
        layers=3,
        heads=4,
        kv_heads=2,
        head_size=4,
        mlp_width=12,
        qkv_bias=True,
        mlp_bias=True,
        qk_norm=True,
    )
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    noisy = lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    return model, jax.tree.map(noisy, params)


def logits(model, params):
    return jax.jit(model.apply)({"params": params}, TOKENS)


def silenced(params, kernel, rows):
    """The parameters with rows of one kernel at zero: its inputs do not count."""
    layer, part, name = kernel
    copy = jax.tree.map(lambda x: x, params)
    x = copy[layer][part][name]["kernel"]
    copy[layer][part][name]["kernel"] = x.at[np.asarray(rows)].set(0)
    return copy


@pytest.mark.slow
def test_a_smaller_transformer_is_the_masked_one(tmp_path):
    model, params = transformer()
    groups = structure.neuron_groups(model) | structure.head_groups(model)
    keep = {
        "layer_0/mlp": [1, 2, 5, 7, 10],
        "layer_2/mlp": list(range(11)),
        "layer_1/attention": [1],
    }
    small = remove_units(params, groups, keep)
    less = structure.resized(model, small)
    assert less.mlp_width == (5, 12, 11)
    assert less.heads == (4, 2, 4) and less.kv_heads == (2, 1, 2)
    masked = silenced(params, ("layer_0", "mlp", "down_proj"), [0, 3, 4, 6, 8, 9, 11])
    masked = silenced(masked, ("layer_2", "mlp", "down_proj"), [11])
    # Key/value head 0 and the two queries that share it, of four values each.
    masked = silenced(masked, ("layer_1", "attention", "o_proj"), range(8))
    expected = logits(model, masked)
    np.testing.assert_allclose(logits(less, small), expected, rtol=1e-4, atol=1e-5)
    assert small["embed"]["embedding"] is params["embed"]["embedding"]
    assert jc.nbytes(small) < jc.nbytes(params)
    jc.models.save(tmp_path / "less.safetensors", less, small)
    again, loaded, _ = jc.models.load(tmp_path / "less.safetensors")
    assert again == less
    np.testing.assert_array_equal(logits(again, loaded), logits(less, small))
    # All layers alike: one number, and the model can be scanned.
    half = remove_units(
        params,
        structure.neuron_groups(model),
        {f"layer_{i}/mlp": range(i, i + 6) for i in range(3)},
    )
    even = structure.resized(model, half)
    assert even.mlp_width == 6
    scanned = logits(even.clone(scan=True), stack_layers(half))
    np.testing.assert_allclose(scanned, logits(even, half), rtol=1e-4, atol=1e-5)


def test_layers_are_units_of_the_scanned_model():
    model, params = transformer()
    scanned, stacked = model.clone(scan=True), stack_layers(params)
    small = remove_units(
        stacked, structure.layer_groups(scanned), {"layers": np.array([0, 2])}
    )
    less = structure.resized(scanned, small)
    assert less.layers == 2 and less.mlp_width == 12
    chosen = {**params, "layer_1": params["layer_2"]}
    del chosen["layer_2"]
    expected = logits(model.clone(layers=2), chosen)
    np.testing.assert_allclose(logits(less, small), expected, rtol=1e-4, atol=1e-5)
    looped = unstack_layers(small)
    assert structure.resized(model, looped) == model.clone(layers=2)


def test_layers_that_change_nothing_have_no_influence():
    model, params = transformer()
    idle = silenced(params, ("layer_1", "attention", "o_proj"), range(16))
    idle = silenced(idle, ("layer_1", "mlp", "down_proj"), range(12))
    idle["layer_1"]["mlp"]["down_proj"]["bias"] *= 0
    batches = [TOKENS[:1], TOKENS]
    found = structure.layer_influence(model, idle, batches)
    assert abs(found[1]) < 1e-6 and found[0] > 1e-3 and found[2] > 1e-3
    scanned = model.clone(scan=True)
    again = structure.layer_influence(scanned, stack_layers(idle), batches)
    np.testing.assert_allclose(again, found, atol=1e-6)
    # The first layer's, from the embeddings and from a model of that layer alone.
    watched = model.clone(layers=1, sow_intermediates=True)
    one = watched.apply({"params": idle}, TOKENS, mutable=["intermediates"])[1]
    one = one["intermediates"]
    a = np.asarray(one["hidden"][0], np.float64).reshape(-1, 16)
    b = np.asarray(one["layer_0"]["hidden"][0], np.float64).reshape(-1, 16)
    cosine = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    first = structure.layer_influence(model, idle, [TOKENS])[0]
    assert float(first) == pytest.approx(np.mean(1 - cosine), abs=1e-5)
    with pytest.raises(ValueError, match="no batches"):
        structure.layer_influence(model, params, [])


def test_moments_make_up_for_neurons_and_heads_of_a_model():
    model, params = transformer()
    known = jc.collect_moments(model, params, [TOKENS], where=".*(down|o)_proj/kernel")
    dense = logits(model, params)
    for groups, scope in (
        (structure.neuron_groups(model), "group"),
        (structure.head_groups(model), "global"),
    ):
        scores = score_units(known, groups, params=params, by="loss")
        keep = choose_units(scores, 0.3, scope=scope)
        errors = []
        for moments in (None, known):
            small = remove_units(params, groups, keep, moments)
            less = structure.resized(model, small)
            errors.append(float(jnp.mean((logits(less, small) - dense) ** 2)))
        assert errors[1] < 0.7 * errors[0]


@functools.cache
def convolutional():
    model = ConvNet(filters=(6, 5, 4), classes=3)
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 2))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    _, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return model, {"params": variables["params"], **changed}, images


@pytest.mark.slow
def test_filters_shrink_with_their_norms_and_readers():
    model, variables, images = convolutional()
    groups = structure.filter_groups(model)
    keep = {"conv_0": [0, 2, 5], "conv_2": [1, 3]}
    small = remove_units(variables, groups, keep)
    less = structure.resized(model, small)
    assert less.filters == (3, 5, 2)
    masked = jax.tree.map(lambda x: x, variables)
    for name, gone in (("conv_1", [1, 3, 4]), ("head", [0, 2])):
        kernel = masked["params"][name]["kernel"]
        axis = kernel.ndim - 2
        index = (slice(None),) * axis + (np.array(gone),)
        masked["params"][name]["kernel"] = kernel.at[index].set(0)
    expected = model.apply(masked, images)
    np.testing.assert_allclose(less.apply(small, images), expected, atol=1e-5)
    # With moments, what stays makes up for them; the statistics shrink too.
    run = lambda variables, images: model.apply(variables, images)  # noqa: E731
    select = "params/(conv_[12]|head)/kernel"
    known = jc.collect_moments(run, variables, [images], where=select)
    layout = jc.find_layouts(run, variables, images)
    scores = score_units(known, groups, params=variables, layouts=layout, by="loss")
    assert [len(score) for score in scores.values()] == [6, 5, 4]
    better = remove_units(variables, groups, keep, known, layouts=layout)
    assert better["batch_stats"]["norm_0"]["mean"].shape == (3,)
    dense = model.apply(variables, images)
    errors = [
        float(jnp.sum((less.apply(tree, images) - dense) ** 2))
        for tree in (small, better)
    ]
    assert errors[1] < 0.7 * errors[0]
    # A reader of whole windows: solved as one least-squares problem.
    kernel = np.asarray(variables["params"]["conv_1"]["kernel"], np.float64)
    old = kernel.reshape(-1, 5)
    rows = np.arange(54).reshape(3, 3, 6)[:, :, [0, 2, 5]].ravel()
    second = np.asarray(known["params/conv_1/kernel"].second, np.float64)
    normal = second[np.ix_(rows, rows)]
    normal += DAMPING * np.mean(np.diag(normal)) * np.eye(len(rows))
    gone = np.setdiff1d(np.arange(54), rows)
    fit = old[rows] + np.linalg.solve(normal, second[np.ix_(rows, gone)] @ old[gone])
    got = np.asarray(better["params"]["conv_1"]["kernel"]).reshape(-1, 5)
    np.testing.assert_allclose(got, fit, rtol=1e-3, atol=1e-5)


class Flat(nn.Module):
    """A convolution whose image is flattened into a dense layer, declared by hand."""

    filters: int = 4

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(self.filters, (3, 3), name="conv")(images))
        return nn.Dense(3, name="out")(x.reshape(len(x), -1))


def test_a_dimension_may_be_held_several_times_over():
    images = jax.random.normal(jax.random.key(1), (5, 4, 4, 2))
    params = Flat().init(jax.random.key(0), images)["params"]
    group = [("conv/(kernel|bias)", -1), ("out/kernel", 0, 16)]
    small = remove_units(params, group, [0, 3])
    masked = jax.tree.map(lambda x: x, params)
    masked["conv"]["kernel"] = params["conv"]["kernel"].at[..., 1:3].set(0)
    masked["conv"]["bias"] = params["conv"]["bias"].at[1:3].set(0)
    expected = Flat().apply({"params": masked}, images)
    got = Flat(2).apply({"params": small}, images)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_layers_of_zeros_lose_nothing():
    params = jax.tree.map(jnp.zeros_like, layer(True))
    known = {"down/kernel": moments_of(samples())}
    scores = score_units(known, GROUP, params=params, by="loss")
    np.testing.assert_array_equal(scores, np.zeros(INPUTS))
    keep = choose_units(scores, 0.5)
    small = remove_units(params, GROUP, keep, known)
    assert all(not np.any(x) for x in jax.tree.leaves(small))
    silent = {"down/kernel": moments_of(0 * samples())}
    params = layer(True)
    told = pytest.warns(UserWarning, match="down/kernel: remove_units: no calibration")
    with jax.debug_nans(True), told:
        small = remove_units(params, GROUP, keep, silent)
    rows = params["down"]["kernel"][keep]
    np.testing.assert_allclose(small["down"]["kernel"], rows, rtol=1e-6)


def test_types_are_kept_and_one_group_stands_alone():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), layer(True))
    known = {"down/kernel": moments_of(samples())}
    small = remove_units(params, GROUP, [1, 2], known)
    assert {x.dtype for x in jax.tree.leaves(small)} == {jnp.dtype(jnp.bfloat16)}


# Bad input.


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            [("up/kernel", 1), ("down/kernel", 1)],
            "down/kernel has 7 .* up/kernel has 12",
        ),
        ([("up/kernel", 1), ("down", 0)], "'down' matches no leaf; .* down/kernel"),
        ([("up/kernel", 2)], "has no axis 2"),
        ([("up/.*", 1), ("up/kernel", -1)], "listed twice"),
        ([], "no members"),
        (Group((("up/kernel", 1),), 5), "12 along axis 1, no multiple of 5 units"),
        (Group(tuple(GROUP), 24), "no multiple of 24"),
        ([("up/kernel", 1), ("down/kernel", 0, 2)], "holds the dimension 2 times"),
    ],
)
def test_groups_that_do_not_fit(group, message):
    with pytest.raises(ValueError, match=message):
        remove_units(layer(True), group, [0])


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ([], ValueError, "none of 12 units"),
        ([0, 12], ValueError, "are 0 to 12, and there are 12"),
        ([-1, 0], ValueError, "are -1 to 0"),
        ([2, 1], ValueError, "in order"),
        ([1, 1], ValueError, "each once"),
        ([True] * 12, TypeError, "boolean mask"),
        ([0.5], TypeError, "float64"),
    ],
)
def test_units_that_cannot_stay(keep, error, message):
    with pytest.raises(error, match=message):
        remove_units(layer(False), GROUP, keep)


def test_moments_and_trees_that_do_not_fit():
    params, known = layer(True), {"down/kernel": moments_of(samples())}
    with pytest.raises(
        ValueError, match=r"down/kernel reads removed units.* no moments"
    ):
        remove_units(params, GROUP, [0], {})
    other = {"down/kernel": moments_of(samples()[:, :5])}
    with pytest.raises(ValueError, match=r"down/kernel: .* \(5, 5\).* \(12, 12\)"):
        remove_units(params, GROUP, [0], other)
    with pytest.raises(ValueError, match=r"down/kernel: .* \(5, 5\).* \(12, 12\)"):
        score_units(other, GROUP, params=params)
    with pytest.raises(ValueError, match="nothing that moments could compensate"):
        remove_units(params, [("up/kernel", 1)], [0], known)
    with pytest.raises(ValueError, match=r"both hold axis 0 of down/kernel"):
        groups = {"a": GROUP, "b": [("down/.*", 0)]}
        remove_units(params, {"a": GROUP, "b": GROUP[1:]}, {"a": [0], "b": [0]})
    with pytest.raises(ValueError, match=r"name \['c'\]"):
        remove_units(params, {"a": GROUP}, {"c": [0]})
    with pytest.raises(TypeError, match="one too"):
        remove_units(params, {"a": GROUP}, [0])
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda keep: remove_units(params, GROUP, keep))(jnp.arange(2))
    small = jc.compress(params, [("down/kernel", "symmetric(bits=8)")])
    with pytest.raises(ValueError, match="down/kernel is a Quantized"):
        remove_units(small, GROUP, [0])
    with pytest.raises(TypeError, match=r"is not \(pattern, axis\)"):
        remove_units(params, [("up/kernel", "1")], [0])
    with pytest.raises(ValueError, match="no kernel that reads"):
        score_units({}, GROUP)
    with pytest.raises(ValueError, match="or 'loss', not 'luck'"):
        score_units(known, GROUP, by="luck")
    with pytest.raises(ValueError, match="pass params"):
        score_units(known, GROUP, by="loss")
    with pytest.raises(ValueError, match="damping above 0 and below 1, not 0"):
        remove_units(params, GROUP, [0], known, damping=0)
    model, tree = transformer()
    scanned = model.clone(scan=True)
    for groups in (structure.neuron_groups, structure.head_groups):
        with pytest.raises(ValueError, match="unstack_layers"):
            groups(scanned)
    with pytest.raises(ValueError, match="stack_layers"):
        structure.layer_groups(model)
    with pytest.raises(ValueError, match="3 axes, and which are inputs"):
        group = [("layers/mlp/down_proj/kernel", 1)]
        remove_units(stack_layers(tree), group, [0], known)
    wide = jc.Layout((0,), (1,), (2,))
    with pytest.raises(ValueError, match="stacked layers keep different units"):
        name = "layers/mlp/down_proj/kernel"
        remove_units(stack_layers(tree), group, [0], known, layouts={name: wide})
    variables = convolutional()[1]
    with pytest.raises(ValueError, match="4 axes, and which are inputs"):
        groups = structure.filter_groups(convolutional()[0])
        remove_units(variables, groups, {"conv_0": [0]}, known)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([1.0, 2.0], {"sparsity": 1.0}, "below 1, not 1.0"),
        ([1.0, 2.0], {"sparsity": True}, "not True"),
        ([1.0, np.nan], {"sparsity": 0.5}, "1 not finite"),
        ([[1.0]], {"sparsity": 0.5}, r"shape \(1, 1\)"),
        ([1.0], {"sparsity": 0.5, "scope": "leaf"}, "not 'leaf'"),
    ],
)
def test_scores_and_options_out_of_range(scores, options, message):
    with pytest.raises(ValueError, match=message):
        choose_units(scores, **options)


def test_places_own_their_indices():
    shapes = {"q": (3, 24), "flat": (24, 2)}
    q, flat = find_places(shapes, Group((("q", 1), ("flat", 0, 2)), 4), "")
    np.testing.assert_array_equal(
        q.indices(np.array([0, 2])), [*range(6), *range(12, 18)]
    )
    np.testing.assert_array_equal(flat.table[1], [3, 4, 5, 15, 16, 17])

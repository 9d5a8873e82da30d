"""Loss functions of language models, students made from teachers, rollouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import distillation as d
from jaxcompress import models
from jaxcompress.evaluation import Apply, windows

SIZES = {"width": 16, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp_width": 24}
MODEL = models.Transformer(vocab_size=12, layers=4, **SIZES)
APPLY = Apply(MODEL)
LITTLE = MODEL.clone(layers=1)
LITTLE_APPLY = Apply(LITTLE)
TEXT = np.random.default_rng(0).integers(0, 12, 80)
BATCH = windows(TEXT, 9, 4)[0]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def teacher():
    params = jax.jit(MODEL.init)(jax.random.key(1), BATCH["tokens"])["params"]
    return jax.tree.map(lambda x: 1.5 * x, params)


@pytest.fixture(scope="module")
def student():
    return jax.jit(MODEL.init)(jax.random.key(2), BATCH["tokens"])["params"]


@pytest.fixture(scope="module")
def writer(teacher):
    """The teacher's second layer alone."""
    return models.fewer_layers(MODEL, teacher, [1])[1]


# Loss functions.


@pytest.mark.slow
def test_hard_labels_are_the_loss_of_evaluation(student):
    loss, metrics = jax.jit(d.hard_labels(APPLY))(student, BATCH, KEY)
    report = jc.compare(APPLY, student, student, [BATCH])
    np.testing.assert_allclose(loss, report.dense.loss, rtol=1e-5)
    assert metrics["weight"] == report.tokens


def test_a_batch_without_a_mask_counts_whole(student, teacher):
    tokens = BATCH["tokens"][:2]
    whole = {"tokens": tokens, "mask": np.ones(tokens.shape, bool)}
    for loss in (d.hard_labels(APPLY), d.soft_labels(APPLY, APPLY, teacher)):
        value, _ = loss(student, {"tokens": tokens}, KEY)
        want, _ = loss(student, whole, KEY)
        assert value == want
    first, second = (
        jc.compare(APPLY, teacher, student, [batch])
        for batch in ({"tokens": tokens}, whole)
    )
    np.testing.assert_allclose(first.kl, second.kl, rtol=1e-5)
    assert first.tokens == second.tokens == tokens[:, 1:].size


@pytest.mark.slow
def test_soft_labels_are_the_divergence_of_evaluation(student, teacher):
    report = jc.compare(APPLY, teacher, student, [BATCH])
    loss = d.soft_labels(APPLY, APPLY, teacher)
    value, metrics = jax.jit(loss)(student, BATCH, KEY)
    np.testing.assert_allclose(value, report.kl, rtol=1e-5)
    assert metrics["weight"] == report.tokens and "hard" not in metrics
    both = d.soft_labels(APPLY, APPLY, teacher, soft_weight=0.25)
    value, metrics = jax.jit(both)(student, BATCH, KEY)
    want = 0.25 * report.kl + 0.75 * report.small.loss
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["hard"], report.small.loss, rtol=1e-5)


@pytest.mark.slow
def test_a_cached_teacher_is_as_good_as_a_running_one(student, teacher, tmp_path):
    logits = APPLY(teacher, BATCH["tokens"])[:, :-1]
    make = lambda: d.top_k(logits, 11)  # noqa: E731
    cached = d.write_cache(tmp_path, 0, BATCH, make)
    loss = jax.jit(d.cached_labels(APPLY, soft_weight=0.5))
    value, _ = loss(student, BATCH | {"teacher": cached}, KEY)
    running = d.soft_labels(APPLY, APPLY, teacher, soft_weight=0.5)
    want, _ = jax.jit(running)(student, BATCH, KEY)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    # What the teacher said is cut along with the batch.
    parts = jax.tree.map(lambda x: x[::2], BATCH | {"teacher": cached})
    half, _ = loss(student, parts, KEY)
    assert half != value and parts["teacher"].indices.shape == (2, 8, 11)
    # In a step too, part by part.
    optimizer = optax.sgd(0.1)
    step = d.make_train_step(
        d.cached_labels(APPLY, soft_weight=0.5), optimizer, accumulate=2
    )
    state = d.init_state(student, optimizer, key=KEY)
    _, metrics = step(state, BATCH | {"teacher": cached})
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert metrics["finite"] and metrics["update_norm"] > 0


@pytest.mark.slow
def test_a_projection_trains_beside_the_student(teacher):
    """Of a narrower student, in one tree with it."""
    narrow = MODEL.clone(layers=1, width=8, heads=2, kv_heads=1)
    begin = narrow.init(KEY, BATCH["tokens"])["params"]
    params = {"student": begin, "projection": d.initial_projection(8, 16, key=KEY)}

    def loss(teacher, params, batch, key):
        _, mine = d.capture(narrow, ["layer_0/mlp"])(params["student"], batch["tokens"])
        _, theirs = d.capture(MODEL, ["layer_3/mlp"])(teacher, batch["tokens"])
        states = mine["layer_0/mlp"], theirs["layer_3/mlp"]
        values = d.hidden_states(*states, projection=params["projection"])
        return values.mean(), {}

    optimizer = optax.adam(1e-2)
    step = d.make_train_step(jax.tree_util.Partial(loss, teacher), optimizer)
    state, losses = d.init_state(params, optimizer, key=KEY), []
    for _ in range(30):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    for name in ("student", "projection"):
        moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, params)
        assert any(jax.tree.leaves(moved[name]))


# Students.


@pytest.mark.parametrize("scan", [False, True])
def test_fewer_layers(teacher, scan):
    model = MODEL.clone(scan=scan)
    params = models.stack_layers(teacher) if scan else teacher
    small_model, small = models.fewer_layers(model, params, 2)
    assert small_model.layers == 2 and small_model.scan == scan
    got = small_model.apply({"params": small}, BATCH["tokens"])
    rest = {k: x for k, x in teacher.items() if not k.startswith("layer_")}
    rest |= {"layer_0": teacher["layer_1"], "layer_1": teacher["layer_3"]}
    want = MODEL.clone(layers=2).apply({"params": rest}, BATCH["tokens"])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_fewer_layers_of_an_encoder(scan):
    model = models.Bert(
        vocab_size=12, width=8, layers=4, heads=2, mlp_width=16, scan=scan
    )
    params = model.init(KEY, BATCH["tokens"])["params"]
    small_model, small = models.fewer_layers(model, params, 2)
    assert small_model.layers == 2
    assert small_model.apply({"params": small}, BATCH["tokens"]).shape[-1] == 8


def test_fewer_layers_keep_their_own_settings(teacher):
    model = MODEL.clone(sliding_window=(None, 3, 4, 5))
    small, params = models.fewer_layers(model, teacher, [0, 2])
    assert small.sliding_window == (None, 4) and set(params) == {
        *("embed", "final_norm", "layer_0", "layer_1")
    }
    assert params["layer_1"] is teacher["layer_2"]
    with pytest.raises(ValueError, match="of 4 layers give increasing numbers"):
        models.fewer_layers(model, teacher, [0, 4])
    for wrong in (0, [2, 1], []):
        with pytest.raises(ValueError, match="layers is"):
            models.fewer_layers(model, teacher, wrong)


def moments_of(params):
    select = r"layer_\d+/.*kernel"
    return jc.collect_moments(MODEL, params, [BATCH["tokens"]], where=select)


@pytest.mark.slow
def test_fewer_neurons(teacher):
    """Neurons that do nothing go first, and nothing changes."""
    params = jax.tree.map(lambda x: x, teacher)
    for layer in range(4):
        mlp = params[f"layer_{layer}"]["mlp"]
        mlp["up_proj"]["kernel"] = mlp["up_proj"]["kernel"].at[:, ::3].set(0)
    small_model, small = models.fewer_neurons(
        MODEL, params, moments_of(params), sparsity=1 / 3
    )
    assert small_model.mlp_width == 16
    assert small["layer_0"]["mlp"]["down_proj"]["kernel"].shape == (16, 16)
    got = small_model.apply({"params": small}, BATCH["tokens"])
    np.testing.assert_allclose(
        got, APPLY(params, BATCH["tokens"]), rtol=1e-2, atol=1e-2
    )


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_fewer_channels(teacher, tied):
    """Channels that are zero go first, and nothing changes, norms included."""
    model, dead = MODEL.clone(tied=tied, norm_eps=1e-12), np.arange(0, 16, 4)
    params = jax.tree.map(lambda x: x, teacher)
    if not tied:
        params["head"] = {"kernel": jnp.ones((16, 12)) + jnp.eye(16, 12)}
    params["embed"]["embedding"] = params["embed"]["embedding"].at[:, dead].set(0)
    for layer in range(4):
        for part, name in (("attention", "o_proj"), ("mlp", "down_proj")):
            place = params[f"layer_{layer}"][part][name]
            place["kernel"] = place["kernel"].at[:, dead].set(0)
    want = model.apply({"params": params}, BATCH["tokens"])
    small_model, small = models.fewer_channels(
        model, params, moments_of(params), sparsity=0.25
    )
    assert small_model.width == 12 and small["embed"]["embedding"].shape == (12, 12)
    got = small_model.apply({"params": small}, BATCH["tokens"])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="unstack_layers"):
        models.channel_group(model.clone(scan=True))


# Rollouts.


def write(params, prompts, length, **options):
    run = functools.partial(d.rollout, LITTLE, length=length, **options)
    return jax.jit(lambda params, prompts: run(params, prompts))(params, prompts)


def test_a_greedy_rollout_is_what_the_whole_model_would_say(writer):
    prompts = jnp.asarray(BATCH["tokens"][:, :3])
    tokens, mask = write(writer, prompts, 6, temperature=0, key=KEY)
    assert tokens.shape == mask.shape == (4, 9) and tokens.dtype == prompts.dtype
    np.testing.assert_array_equal(mask, np.arange(9)[None] >= np.full((4, 1), 3))
    np.testing.assert_array_equal(tokens[:, :3], prompts)
    logits = LITTLE_APPLY(writer, tokens)
    np.testing.assert_array_equal(logits.argmax(-1)[:, 2:-1], tokens[:, 3:])


@pytest.mark.slow
def test_compressed_students_write_too(writer):
    small = jc.compress(writer, [(".*kernel", "symmetric(bits=8)"), (".*", None)])
    prompts = jnp.asarray(BATCH["tokens"][:, :3])
    tokens, _ = write(small, prompts, 6, temperature=0, key=KEY)
    want, _ = write(jc.materialize(small), prompts, 6, temperature=0, key=KEY)
    np.testing.assert_array_equal(tokens, want)


@pytest.mark.slow
def test_a_rollout_draws_from_the_model(writer):
    """The second token written, in 3 000 texts, against its exact distribution."""
    count, temperature = 3000, 1.3
    prompts = jnp.broadcast_to(jnp.array([[3, 5]]), (count, 2))
    tokens, _ = write(writer, prompts, 2, temperature=temperature, key=KEY)
    every = jnp.array([[3, 5, token] for token in range(12)])
    chances = jax.nn.softmax(LITTLE_APPLY(writer, every) / temperature, axis=-1)
    want = np.asarray(chances[0, 1] @ chances[:, 2], np.float64)
    found = np.bincount(np.asarray(tokens[:, 3]), minlength=12) / count
    error = np.sqrt(want * (1 - want) / count)
    assert (np.abs(found - want) < 5 * error).all() and want.max() > 2 / 12


@pytest.mark.slow
def test_nothing_counts_after_the_end(writer):
    prompts = jnp.asarray(BATCH["tokens"][:, :3])
    free, _ = write(writer, prompts, 6, key=KEY)
    eos = int(free[0, 5])
    tokens, mask = write(writer, prompts, 6, eos_id=eos, key=KEY)
    for row, counted, before in zip(tokens, mask, free, strict=True):
        ends = [i for i in range(3, 9) if before[i] == eos] + [9]
        np.testing.assert_array_equal(
            counted, (np.arange(9) >= 3) & (np.arange(9) <= ends[0])
        )
        np.testing.assert_array_equal(row[: ends[0]], before[: ends[0]])
        assert (row[ends[0] :] == eos).all()


@pytest.mark.slow
def test_mixing(student, writer):
    apply, (_, student) = LITTLE_APPLY, models.fewer_layers(MODEL, student, [0])
    loss = d.soft_labels(apply, apply, writer, soft=d.reverse_kl)
    off, _ = jax.jit(loss)(student, BATCH, KEY)
    never = d.on_policy(loss, LITTLE, prompt=3, ratio=0)
    value, metrics = jax.jit(never)(student, BATCH, KEY)
    np.testing.assert_allclose(value, off, rtol=1e-5)
    assert metrics["written"] == 0
    always = d.on_policy(loss, LITTLE, prompt=3, ratio=1)
    value, metrics = jax.jit(always)(student, BATCH, KEY)
    tokens, mask = d.rollout(
        LITTLE,
        student,
        jnp.asarray(BATCH["tokens"][:, :3]),
        6,
        key=jax.random.split(KEY, 3)[0],
    )
    want, _ = jax.jit(loss)(student, {"tokens": tokens, "mask": mask}, KEY)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert metrics["written"] == 1 and metrics["weight"] == 4 * 6
    # A text that ends inside the prompt is not gone on with.
    short = BATCH | {"mask": BATCH["mask"].copy()}
    short["mask"][1, 3:] = False
    _, metrics = jax.jit(always)(student, short, KEY)
    assert metrics["written"] == 0.75 and metrics["weight"] == 3 * 6 + 2


@pytest.mark.slow
def test_training_on_own_texts_draws_near_to_the_teacher(writer):
    apply, start = LITTLE_APPLY, jax.tree.map(lambda x: 0.9 * x, writer)
    loss = d.soft_labels(apply, apply, writer, soft=d.reverse_kl)
    loss = d.on_policy(loss, LITTLE, prompt=1, ratio=0.5)
    optimizer = optax.adam(5e-3)
    step = d.make_train_step(loss, optimizer)
    state = d.init_state(start, optimizer, key=KEY)
    shares = []
    for _ in range(20):
        state, metrics = step(state, BATCH)
        shares.append(float(metrics["written"]))
    before, after = (
        jc.compare(apply, writer, x, [BATCH]).kl for x in (start, state.params)
    )
    assert after < 0.75 * before
    assert 0.25 < np.mean(shares) < 0.75 and len(set(shares)) > 1


WRONG = {
    "soft weight": (
        lambda: d.soft_labels(APPLY, APPLY, {}, soft_weight=0),
        "hard_labels",
    ),
    "ratio": (lambda: d.on_policy(None, MODEL, prompt=1, ratio=2), "ratio is 2"),
    "prompt": (
        lambda: d.on_policy(d.hard_labels(APPLY), MODEL, prompt=9)({}, BATCH, KEY),
        "prompt is 9; of texts of 9 tokens",
    ),
    "empty": (
        lambda: d.rollout(MODEL, {}, jnp.zeros((0, 3), int), 2, key=KEY),
        "0 prompts of 3 tokens",
    ),
    "temperature": (
        lambda: d.rollout(
            MODEL, {}, jnp.zeros((1, 3), int), 2, temperature=-1, key=KEY
        ),
        "temperature is -1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()

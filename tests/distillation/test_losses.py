"""Losses of distillation against their definitions in NumPy float64."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import distillation as d

SHAPE, VOCABULARY = (2, 3), 7
RANDOM = np.random.default_rng(0)
STUDENT = RANDOM.normal(size=(*SHAPE, VOCABULARY)) * 2
TEACHER = RANDOM.normal(size=(*SHAPE, VOCABULARY)) * 2
LABELS = RANDOM.integers(0, VOCABULARY, SHAPE)
MASK = np.array([[1, 1, 0], [1, 0, 0]], bool)


def softmax(row, temperature=1.0):
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mixed(p, q, weight):
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def each(function, temperature=1.0):
    """`function(p, q, label)` of teacher and student at every position, float64."""
    result = np.empty(SHAPE)
    for at in np.ndindex(*SHAPE):
        p, q = (softmax(x[at], temperature) for x in (TEACHER, STUDENT))
        result[at] = temperature**2 * function(p, q, LABELS[at])
    return result


T = 2.5
ORACLES = {
    "forward_kl": (
        functools.partial(d.forward_kl, temperature=T),
        lambda: each(lambda p, q, _: kl(p, q), T),
    ),
    "reverse_kl": (
        functools.partial(d.reverse_kl, temperature=T),
        lambda: each(lambda p, q, _: kl(q, p), T),
    ),
    "soft_cross_entropy": (
        functools.partial(d.soft_cross_entropy, temperature=T),
        lambda: each(
            lambda p, q, _: -sum(a * math.log(b) for a, b in zip(p, q, strict=True)), T
        ),
    ),
    "jensen_shannon": (
        functools.partial(d.jensen_shannon, beta=0.3, temperature=T),
        lambda: each(
            lambda p, q, _: (
                0.3 * kl(p, mixed(p, q, 0.3)) + 0.7 * kl(q, mixed(p, q, 0.3))
            ),
            T,
        ),
    ),
    "skewed_kl": (
        functools.partial(d.skewed_kl, alpha=0.2, temperature=T),
        lambda: each(lambda p, q, _: kl(p, mixed(p, q, 0.2)), T),
    ),
    "skewed_reverse_kl": (
        functools.partial(d.skewed_reverse_kl, alpha=0.2, temperature=T),
        lambda: each(lambda p, q, _: kl(q, mixed(q, p, 0.2)), T),
    ),
    "loss": (
        lambda s, t, mask=None: d.loss(
            s, t, jnp.asarray(LABELS), temperature=T, soft_weight=0.3, mask=mask
        ),
        lambda: (
            0.7 * each(lambda p, q, label: -math.log(q[label]))
            + 0.3 * each(lambda p, q, _: kl(p, q), T)
        ),
    ),
}
every = pytest.mark.parametrize("name", ORACLES)


def arrays(dtype=jnp.float32):
    return jnp.asarray(STUDENT, dtype), jnp.asarray(TEACHER, dtype)


@every
def test_definition(name):
    loss, oracle = ORACLES[name]
    got = jax.jit(loss)(*arrays())
    assert got.shape == SHAPE and got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle(), rtol=2e-5, atol=1e-6)


@every
def test_bfloat16_logits_are_widened_first(name):
    loss, _ = ORACLES[name]
    student, teacher = arrays(jnp.bfloat16)
    got = loss(student, teacher)
    assert got.dtype == jnp.float32
    chex.assert_trees_all_equal(
        got, loss(*(x.astype("float32") for x in arrays("bfloat16")))
    )


@every
def test_padding_is_neither_in_the_loss_nor_in_the_gradient(name):
    loss, oracle = ORACLES[name]
    student, teacher = (jnp.where(MASK[..., None], x, jnp.nan) for x in arrays())
    got = loss(student, teacher, mask=jnp.asarray(MASK))
    np.testing.assert_allclose(got, np.where(MASK, oracle(), 0), rtol=2e-5, atol=1e-6)
    total = lambda x: d.mean(loss(x, teacher, mask=MASK), MASK)  # noqa: E731
    gradient = np.asarray(jax.jit(jax.grad(total))(student))
    assert np.isfinite(gradient).all()
    assert (gradient[~MASK] == 0).all() and (gradient[MASK] != 0).any(axis=-1).all()


@every
def test_gradient_is_that_of_the_definition(name):
    """Central differences of the float64 definition along a random direction."""
    global STUDENT
    loss, oracle = ORACLES[name]
    along = RANDOM.normal(size=STUDENT.shape)
    gradient = jax.grad(lambda x: loss(x, arrays()[1]).sum())(arrays()[0])
    kept, step = STUDENT, 1e-5
    try:
        STUDENT = kept + step * along
        after = oracle().sum()
        STUDENT = kept - step * along
        before = oracle().sum()
    finally:
        STUDENT = kept
    np.testing.assert_allclose(
        (gradient * along).sum(), (after - before) / (2 * step), rtol=1e-3
    )


def test_cross_entropy_and_mean():
    student, _ = arrays()
    got = d.cross_entropy(student, jnp.asarray(LABELS))
    want = each(lambda p, q, label: -math.log(q[label]))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(d.mean(got, MASK), want[MASK].mean(), rtol=1e-5)
    np.testing.assert_allclose(d.mean(got), want.mean(), rtol=1e-5)
    assert d.count(got, MASK) == 3 and d.count(got) == 6
    assert d.mean(got, np.zeros_like(MASK)) == 0


def test_labels_out_of_range_show():
    student, _ = arrays()
    for wrong in (-100, VOCABULARY):
        labels = jnp.asarray(LABELS).at[0, 2].set(wrong)
        assert np.isnan(d.cross_entropy(student, labels)[0, 2])
        assert d.cross_entropy(student, labels, mask=MASK)[0, 2] == 0


def test_a_teacher_alone_needs_no_labels():
    labels = jnp.full(SHAPE, -1)
    found = d.loss(STUDENT, TEACHER, labels, temperature=T, soft_weight=1)
    wanted = d.forward_kl(STUDENT, TEACHER, temperature=T)
    np.testing.assert_array_equal(found, wanted)
    assert np.isnan(d.loss(STUDENT, TEACHER, labels, soft_weight=0.5)).all()


def test_impossible_tokens_of_the_teacher():
    """A teacher may forbid a token; a student that allows it has a finite loss."""
    student, teacher = arrays()
    teacher = teacher.at[..., 0].set(-jnp.inf)
    loss = lambda x: d.forward_kl(x, teacher).sum()  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(student)
    rows = zip(
        STUDENT.reshape(-1, VOCABULARY), TEACHER.reshape(-1, VOCABULARY), strict=True
    )
    want = sum(kl([0, *softmax(t[1:])], softmax(s)) for s, t in rows)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_small_divergences_do_not_drown():
    student = jnp.asarray(TEACHER + 1e-4 * STUDENT, jnp.float32)
    teacher = jnp.asarray(TEACHER, jnp.float32)
    want = np.empty(SHAPE)
    for at in np.ndindex(*SHAPE):
        rows = (np.asarray(x, np.float64)[at] for x in (teacher, student))
        want[at] = kl(*map(softmax, rows))
    np.testing.assert_allclose(d.forward_kl(student, teacher), want, rtol=0.02)


def test_limits_of_jensen_shannon():
    student, teacher = arrays()
    half = d.jensen_shannon(student, teacher)
    np.testing.assert_allclose(half, d.jensen_shannon(teacher, student), rtol=1e-5)
    assert (np.asarray(half) < math.log(2)).all()
    near = d.jensen_shannon(student, teacher, beta=1e-4) / 1e-4
    np.testing.assert_allclose(near, d.forward_kl(student, teacher), rtol=1e-2)
    skewed = d.skewed_kl(100 * student, 100 * teacher, alpha=0.1)
    assert (np.asarray(skewed) <= -math.log(0.1) + 1e-5).all()


# Teachers in files.


def test_top_k_is_exact_with_one_token_in_the_tail():
    student, teacher = arrays()
    cached = d.top_k(teacher, VOCABULARY - 1, temperature=T)
    assert cached.indices.dtype == jnp.uint16
    want = ORACLES["forward_kl"][1]()
    np.testing.assert_allclose(d.top_k_kl(student, cached), want, rtol=2e-5, atol=1e-6)


def test_top_k_is_the_divergence_of_buckets():
    student, teacher = arrays()
    got = d.top_k_kl(student, d.top_k(teacher, 2, temperature=T))
    for at in np.ndindex(*SHAPE):
        p, q = (softmax(x[at], T) for x in (TEACHER, STUDENT))
        top = sorted(range(VOCABULARY), key=lambda i: -p[i])[:2]
        buckets = [[x[i] for i in top] + [1 - sum(x[i] for i in top)] for x in (p, q)]
        np.testing.assert_allclose(got[at], T**2 * kl(*buckets), rtol=1e-4)
    assert (
        np.asarray(got) <= np.asarray(d.forward_kl(student, teacher, temperature=T))
    ).all()


@pytest.mark.slow
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_sampled_logits_are_unbiased(power):
    """Loss and gradient agree with the full ones within five standard errors."""
    student, teacher = arrays()

    def estimate(key):
        cached = d.sampled(teacher, 4, temperature=T, power=power, key=key)
        return jax.value_and_grad(lambda x: d.sampled_kl(x, cached).sum())(student)

    keys = jax.random.split(jax.random.key(1), 4000)
    values, gradients = jax.jit(jax.vmap(estimate))(keys)
    full = lambda x: d.forward_kl(x, teacher, temperature=T).sum()  # noqa: E731
    value, gradient = jax.value_and_grad(full)(student)
    for found, want in ((values, value), (gradients, gradient)):
        found = np.asarray(found, np.float64)
        error = found.std(axis=0) / math.sqrt(len(keys))
        assert (np.abs(found.mean(axis=0) - want) < 5 * error + 1e-5).all()


def test_plain_top_k_without_a_tail_would_be_biased():
    """Why the tail stands there: a student equal to its teacher has no loss."""
    _, teacher = arrays()
    cached = d.top_k(teacher, 2)
    np.testing.assert_allclose(d.top_k_kl(teacher, cached), 0, atol=1e-6)
    gradient = jax.grad(lambda x: d.top_k_kl(x, cached).sum())(teacher)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TopK", "Sampled"])
def test_files(kind, tmp_path):
    student, teacher = arrays()
    batch = {"tokens": LABELS.astype(np.int32), "mask": MASK}
    calls = []

    def make():
        calls.append(1)
        if kind == "TopK":
            return d.top_k(teacher, 3, temperature=T)
        return d.sampled(teacher, 5, key=jax.random.key(2))

    written = d.write_cache(tmp_path / "new", 4, batch, make)
    again = d.write_cache(tmp_path / "new", 4, batch, make)
    read = d.read_cache(tmp_path / "new", 4, batch)
    assert len(calls) == 1 and type(read).__name__ == kind
    chex.assert_trees_all_equal(written, again, read)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [
        "00000004.safetensors"
    ]
    chex.assert_trees_all_equal(
        d.cached_kl(student, read, mask=MASK), d.cached_kl(student, written, mask=MASK)
    )
    other = batch | {"tokens": batch["tokens"] + 1}
    with pytest.raises(ValueError, match="another batch 4"):
        d.read_cache(tmp_path / "new", 4, other)
    d.write_cache(tmp_path, 0, batch, make, source="teacher A, 3 likeliest")
    assert d.read_cache(tmp_path, 0, batch).vocabulary == teacher.shape[-1]
    with pytest.raises(
        ValueError, match=r"another source \('teacher A, 3 likeliest'\) than"
    ):
        d.write_cache(tmp_path, 0, batch, make)
    with pytest.raises(FileNotFoundError, match="not run on batch 5"):
        d.read_cache(tmp_path / "new", 5, batch)
    path = tmp_path / "new" / "00000004.safetensors"
    data = bytearray(path.read_bytes())
    data[-300] ^= 1
    path.write_bytes(data)
    with pytest.raises(jc.FileDamaged):
        d.read_cache(tmp_path / "new", 4, batch)


def test_an_interrupted_teacher_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        d.write_cache(tmp_path, 0, {"tokens": LABELS}, _interrupt)
    assert not list(tmp_path.iterdir())


def _interrupt():
    raise KeyboardInterrupt


# Inside the teacher.

B, S, W, H = 2, 4, 6, 2
STATES = [RANDOM.normal(size=(B, S, width)) for width in (W, 2 * W)]
TEXT_MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)


def test_hidden_states():
    student, teacher = (jnp.asarray(x, jnp.float32) for x in STATES)
    projection = RANDOM.normal(size=(W, 2 * W))
    got = {
        kind: d.hidden_states(
            student,
            teacher,
            projection=jnp.asarray(projection, jnp.float32),
            kind=kind,
            mask=TEXT_MASK,
        )
        for kind in ("squared", "relative", "cosine")
    }
    for at in np.ndindex(B, S):
        mine, theirs = STATES[0][at] @ projection, STATES[1][at]
        squared = sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True)) / (2 * W)
        size = sum(b**2 for b in theirs) / (2 * W)
        cosine = mine @ theirs / math.sqrt(mine @ mine) / math.sqrt(theirs @ theirs)
        want = {"squared": squared, "relative": squared / size, "cosine": 1 - cosine}
        for kind, value in want.items():
            np.testing.assert_allclose(
                got[kind][at], value * TEXT_MASK[at], rtol=1e-5, atol=1e-6
            )


def test_a_state_of_zeros_has_a_finite_gradient():
    states = jnp.zeros((1, 1, 3))
    for kind in ("relative", "cosine"):
        loss = lambda x, kind=kind: d.hidden_states(x, states, kind=kind).sum()  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(states)
        assert value == (kind == "cosine") and np.isfinite(gradient).all()


def test_an_initial_projection_keeps_lengths():
    wide = d.initial_projection(W, 2 * W, key=jax.random.key(0))
    np.testing.assert_allclose(wide @ wide.T, np.eye(W), atol=1e-5)
    narrow = d.initial_projection(2 * W, W, key=jax.random.key(0))
    np.testing.assert_allclose(narrow.T @ narrow, np.eye(W), atol=1e-5)


def maps(heads, seed):
    """Causal attention maps `[B, heads, S, S]`, zero above the diagonal."""
    found = np.zeros((B, heads, S, S))
    random = np.random.default_rng(seed)
    for b, h, q in np.ndindex(B, heads, S):
        found[b, h, q, : q + 1] = softmax(random.normal(size=q + 1))
    return found


def test_attention_maps():
    mine, theirs = maps(2, 1), maps(4, 2)
    for kind in ("kl", "squared"):
        got = d.attention_maps(
            jnp.asarray(mine, jnp.float32),
            jnp.asarray(theirs, jnp.float32),
            heads=(3, 1),
            kind=kind,
            mask=TEXT_MASK,
        )
        for b, q in np.ndindex(B, S):
            want = 0.0
            for head, other in enumerate((3, 1)):
                a, t = mine[b, head, q, : q + 1], theirs[b, other, q, : q + 1]
                want += (kl(t, a) if kind == "kl" else sum((a - t) ** 2)) / 2
            np.testing.assert_allclose(
                got[b, q], want * TEXT_MASK[b, q], rtol=1e-5, atol=1e-6
            )


def test_relations():
    got = d.relations(
        *(jnp.asarray(x, jnp.float32) for x in STATES), heads=H, mask=TEXT_MASK
    )
    for b, query in np.ndindex(B, S):
        want = 0.0
        for head in range(H):
            rows = []
            for states in STATES:
                size = states.shape[-1] // H
                part = states[b, :, head * size : (head + 1) * size]
                keys = [k for k in range(S) if TEXT_MASK[b, k]]
                rows.append(
                    softmax([part[query] @ part[k] / math.sqrt(size) for k in keys])
                )
            want += kl(rows[1], rows[0]) / H
        np.testing.assert_allclose(
            got[b, query], want * TEXT_MASK[b, query], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("loss", ["hidden_states", "relations", "attention_maps"])
def test_padding_of_states_leaves_gradients_clean(loss):
    options = {"heads": H} if loss == "relations" else {}
    x = jnp.asarray(STATES[0] if loss != "attention_maps" else maps(H, 1), jnp.float32)
    queries = TEXT_MASK[..., None] if x.ndim == 3 else TEXT_MASK[:, None, :, None]
    bad = jnp.where(queries, x, jnp.nan)
    other = jnp.where(queries, x[::-1], jnp.nan)
    total = lambda x: getattr(d, loss)(x, other, mask=TEXT_MASK, **options).sum()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(total))(bad)
    assert value > 0 and np.isfinite(gradient).all() and np.any(gradient)


def test_layer_pairs():
    assert d.layer_pairs(3, 6, "uniform") == [(0, 1), (1, 3), (2, 5)]
    assert d.layer_pairs(2, 5, "uniform") == [(0, 2), (1, 4)]
    assert d.layer_pairs(3, 6, "last") == [(2, 5)]
    assert d.layer_pairs(3, 6, {0: 0, -1: -2}) == [(0, 0), (2, 4)]


def test_over_layers():
    random = np.random.default_rng(3)
    mine = jnp.asarray(random.normal(size=(2, B, S, W)), jnp.float32)
    theirs = jnp.asarray(random.normal(size=(4, B, S, W)), jnp.float32)
    got = d.over_layers(d.hidden_states, mine, list(theirs), mask=TEXT_MASK)
    want = [d.hidden_states(mine[i], theirs[2 * i + 1], mask=TEXT_MASK) for i in (0, 1)]
    np.testing.assert_allclose(got, (want[0] + want[1]) / 2, rtol=1e-6)
    eyes = [jnp.eye(W), 2 * jnp.eye(W)]
    got = d.over_layers(d.hidden_states, mine, theirs, projection=eyes)
    want = [d.hidden_states((i + 1) * mine[i], theirs[2 * i + 1]) for i in (0, 1)]
    np.testing.assert_allclose(got, (want[0] + want[1]) / 2, rtol=1e-5)


# Bad input.

SMALL = jnp.zeros((2, 3))
WRONG = {
    "vocabularies": (
        lambda: d.loss(SMALL, jnp.zeros((2, 5)), jnp.zeros(2, int)),
        "student's vocabulary has 3 entries, the teacher's 5",
    ),
    "cached vocabulary": (
        lambda: d.top_k_kl(SMALL, d.top_k(jnp.zeros((2, 5)), 2)),
        "has 3 entries, the teacher's 5",
    ),
    "positions": (lambda: d.forward_kl(SMALL, SMALL[:1]), r"\(2, 3\).*\(1, 3\)"),
    "cached positions": (
        lambda: d.top_k_kl(SMALL, d.top_k(SMALL[:1], 2)),
        r"positions \(2,\), the cache holds \(1,\)",
    ),
    "labels": (lambda: d.cross_entropy(SMALL, jnp.zeros(2)), "labels are float32"),
    "temperature": (
        lambda: d.forward_kl(SMALL, SMALL, temperature=0),
        "temperature is 0",
    ),
    "soft weight": (
        lambda: d.loss(SMALL, SMALL, jnp.zeros(2, int), soft_weight=2),
        "soft_weight .*, not 2",
    ),
    "beta": (lambda: d.jensen_shannon(SMALL, SMALL, beta=1), "beta .*, not 1"),
    "alpha": (lambda: d.skewed_kl(SMALL, SMALL, alpha=0), "alpha .*, not 0"),
    "k": (lambda: d.top_k(SMALL, 3), "k is 3; of a vocabulary of 3"),
    "draws": (lambda: d.sampled(SMALL, 0, key=jax.random.key(0)), "draws is 0"),
    "mask": (lambda: d.mean(SMALL, SMALL[0]), r"mask has shape \(3,\)"),
    "empty batch": (lambda: d.mean(SMALL[:0]), r"empty batch: .*\(0, 3\)"),
    "mapped student": (lambda: d.layer_pairs(2, 4, {2: 0}), "student has 2 layers"),
    "mapped teacher": (
        lambda: d.layer_pairs(2, 4, {1: 4}),
        "1 -> 4 points nowhere: the teacher has 4 layers, 0 to 3",
    ),
    "no mapping": (lambda: d.layer_pairs(2, 4, {}), "give 'uniform', 'last'"),
    "no layers": (lambda: d.layer_pairs(0, 4, "last"), "0 student"),
    "projections": (
        lambda: d.over_layers(
            d.hidden_states, [SMALL], [SMALL], projection=[SMALL, SMALL]
        ),
        "2 projections for 1 pairs",
    ),
    "widths": (
        lambda: d.hidden_states(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 3))),
        "widths that differ need a projection",
    ),
    "projection": (
        lambda: d.hidden_states(
            jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 3)), projection=jnp.zeros((3, 2))
        ),
        r"need \(2, 3\)",
    ),
    "kind": (
        lambda: d.hidden_states(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2)), kind="l1"),
        "kind is 'l1'",
    ),
    "heads": (
        lambda: d.attention_maps(
            jnp.ones((1, 2, 1, 1)), jnp.ones((1, 4, 1, 1)), heads=(0, 4)
        ),
        "point nowhere",
    ),
    "unequal heads": (
        lambda: d.attention_maps(jnp.ones((1, 2, 1, 1)), jnp.ones((1, 4, 1, 1))),
        "pass heads=",
    ),
    "relation heads": (
        lambda: d.relations(jnp.zeros((1, 1, 6)), jnp.zeros((1, 1, 6)), heads=4),
        "4 relation heads do not divide a width of 6; try 2",
    ),
    "relation texts": (
        lambda: d.relations(jnp.zeros((1, 2, 6)), jnp.zeros((1, 1, 6)), heads=2),
        "batch and tokens must agree",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call()

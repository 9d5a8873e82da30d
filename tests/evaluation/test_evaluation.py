"""Evaluation against sums written out in NumPy float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.evaluation import (
    Apply,
    LanguageModelMetrics,
    compare,
    divergence,
    evaluate,
    per_example,
    totals,
    windows,
)
from jaxcompress.models.transformer import Transformer

VOCABULARY = 13


def data_mesh(count=2):
    devices = np.array(jax.devices()[:count])
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def squares(params, batch):
    """Masked squares of `x [examples, places] * scale`, and their number."""
    mask = batch["mask"]
    values = jnp.where(mask, (batch["x"] * params["scale"]) ** 2, 0.0)
    return {"squares": (values.sum(axis=1), mask.sum(axis=1))}


def ragged_batches(sizes, seed=0):
    random = np.random.default_rng(seed)
    return [
        {
            "x": random.normal(size=(size, 5)).astype(np.float32),
            "mask": random.random((size, 5)) < 0.7,
        }
        for size in sizes
    ]


def mean_square(batches, scale):
    values = [
        (float(batch["x"][i, j]) * scale) ** 2
        for batch in batches
        for i, j in zip(*np.nonzero(batch["mask"]), strict=True)
    ]
    return np.mean(values)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 3), (3, 1), (1,), (2, 5, 1)])
@pytest.mark.parametrize("where", ["one device", "two devices", "mesh", "default"])
def test_evaluate_agrees_with_numpy(sizes, where):
    batches = ragged_batches(sizes)
    options = {
        "one device": {"devices": jax.devices()[:1]},
        "two devices": {"devices": jax.devices()[:2]},
        "mesh": {"mesh": data_mesh()},
        "default": {},
    }[where]
    found = evaluate(squares, {"scale": jnp.full((1, 5), 1.5)}, batches, **options)
    assert found.keys() == {"squares"}
    np.testing.assert_allclose(found["squares"], mean_square(batches, 1.5), rtol=1e-6)


def test_totals_count_only_real_examples():
    batches = ragged_batches((4, 3))
    total, weight = totals(squares, {"scale": jnp.ones((1, 5))}, batches)["squares"]
    assert weight == sum(batch["mask"].sum() for batch in batches)
    assert (
        total / weight
        == evaluate(squares, {"scale": jnp.ones((1, 5))}, batches)["squares"]
    )


def test_totals_are_summed_in_float64():
    def values(params, batch):
        return {"x": (batch["x"] + params, jnp.ones_like(batch["x"]))}

    batches = [{"x": np.array([2.0**24, 1.0], np.float32)}] * 3
    total, weight = totals(values, jnp.zeros(1), batches)["x"]
    assert (total, weight) == (3 * 2**24 + 3, 6)


def test_padding_that_is_not_finite_does_not_leak():
    def inverse(params, batch):  # the padded row repeats the last one
        return {"x": (params / batch["x"], jnp.ones_like(batch["x"]))}

    batches = [{"x": np.array([1.0, 2.0, 4.0], np.float32)}]
    assert evaluate(inverse, jnp.ones(1), batches)["x"] == pytest.approx(1.75 / 3)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, "data")])
def test_parameters_sharded_over_the_mesh(spec):
    mesh, batches = data_mesh(), ragged_batches((4, 3))
    scale = jnp.full((1, 6), 1.5)
    params = {"scale": jax.device_put(scale, NamedSharding(mesh, spec))}

    def metrics(params, batch):
        return squares({"scale": params["scale"][:, :5]}, batch)

    found = evaluate(metrics, params, batches, mesh=mesh)
    np.testing.assert_allclose(found["squares"], mean_square(batches, 1.5), rtol=1e-6)


def test_batch_is_sharded_over_the_first_axis_only():
    devices = np.array(jax.devices()[:2]).reshape(1, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    batches = ragged_batches((3, 2))
    found = evaluate(squares, {"scale": jnp.ones((1, 5))}, batches, mesh=mesh)
    np.testing.assert_allclose(found["squares"], mean_square(batches, 1), rtol=1e-6)


def test_same_function_is_traced_once():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return squares(params, batch)

    for _ in range(3):
        evaluate(counted, {"scale": jnp.ones((1, 5))}, ragged_batches((4, 4, 3)))
    assert len(traces) == 1


def bad_loss(params, batch):
    x = batch["x"][:, 0]
    return {"nats": (jnp.where(batch["mask"][:, 0], jnp.nan, x), jnp.ones_like(x))}


def test_errors_name_what_is_wrong():
    params, batches = {"scale": jnp.ones((1, 5))}, ragged_batches((4, 4))
    batches[0]["mask"][:] = False
    batches[1]["mask"][:] = False
    batches[1]["mask"][2, 0] = True
    with pytest.raises(ValueError, match="no batches"):
        evaluate(squares, params, [])
    with pytest.raises(ValueError, match=r"nats is nan .* example 2 of batch 1"):
        evaluate(bad_loss, params, batches)
    with pytest.raises(ValueError, match=r"'squares' add up to 0\.0"):
        evaluate(squares, params, batches[:1])
    with pytest.raises(ValueError, match=r"batch 0 has .*'x': 3.* examples"):
        evaluate(squares, params, [{"x": np.ones((3, 5)), "mask": np.ones((2, 5))}])
    with pytest.raises(ValueError, match="one number per example"):
        evaluate(lambda p, b: {"x": (b["x"], b["x"])}, params, batches)
    with pytest.raises(ValueError, match="pair"):
        evaluate(lambda p, b: {"x": b["x"]}, params, batches)
    with pytest.raises(ValueError, match="not both"):
        evaluate(squares, params, batches, mesh=data_mesh(), devices=jax.devices())
    explicit = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="Auto"):
        evaluate(squares, params, batches, mesh=explicit)


# Windows.


@pytest.mark.parametrize("count", [2, 7, 8, 9, 15, 16, 50])
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_score_every_token_but_the_first_once(count, batch):
    tokens = np.arange(100, 100 + count)
    scored = []
    for part in windows(tokens, 8, batch, token_bytes=tokens % 5):
        assert part["tokens"].shape == part["mask"].shape == part["bytes"].shape
        assert part["tokens"].shape[0] <= batch and part["tokens"].shape[1] == 8
        assert not part["mask"][:, 0].any()
        for row, mask, size in zip(*part.values(), strict=True):
            real = 1 + mask.sum()
            assert mask[1:real].all() and not mask[real:].any()
            np.testing.assert_array_equal(np.diff(row[:real]), 1)
            np.testing.assert_array_equal(size[:real], row[:real] % 5)
            scored.extend(row[mask])
    assert scored == list(tokens[1:])


def test_windows_limit_and_errors():
    assert sum(len(part["tokens"]) for part in windows(range(99), 8, 2, limit=3)) == 3
    with pytest.raises(ValueError, match="at least 2 tokens"):
        windows(range(9), 1, 1)
    with pytest.raises(ValueError, match="2 tokens or more"):
        windows([3], 4, 1)
    with pytest.raises(ValueError, match="2 token_bytes for 3 tokens"):
        windows([1, 2, 3], 4, 1, token_bytes=[1, 1])
    with pytest.raises(ValueError, match="at least one window"):
        windows(range(9), 4, 1, limit=0)


# Language models: a table of next-token logits is a model.


def bigrams(params, tokens):
    return jnp.take(params["table"], tokens, axis=0)


def bigram_text(seed=0, count=100):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, count)
    sizes = random.integers(1, 4, count)
    table = random.normal(size=(VOCABULARY, VOCABULARY)) * 2
    return tokens, sizes, table.astype(np.float32)


def log_softmax(row):
    row = np.asarray(row, np.float64)
    return row - row.max() - np.log(np.sum(np.exp(row - row.max())))


def oracle(tokens, sizes, table, other):
    """What `compare` reports, token by token."""
    nats, hits, kl, same = [], [], [], []
    for before, after in itertools.pairwise(tokens):
        p, q = log_softmax(table[before]), log_softmax(other[before])
        nats.append((-p[after], -q[after]))
        hits.append((np.argmax(p) == after, np.argmax(q) == after))
        kl.append(np.sum(np.exp(p) * (p - q)))
        same.append(np.argmax(p) == np.argmax(q))
    bits = np.sum(nats, axis=0) / np.log(2) / np.sum(sizes[1:])
    return np.array(nats), np.mean(hits, axis=0), np.array(kl), np.mean(same), bits


@pytest.mark.parametrize("options", [{}, {"devices": 1}, {"mesh": 2}])
def test_compare_agrees_with_numpy(options):
    if "devices" in options:
        options = {"devices": jax.devices()[:1]}
    if "mesh" in options:
        options = {"mesh": data_mesh()}
    tokens, sizes, table = bigram_text()
    other = table + bigram_text(seed=1)[2] / 4
    batches = windows(tokens, 8, 4, token_bytes=sizes)
    report = compare(bigrams, {"table": table}, {"table": other}, batches, **options)
    nats, hits, kl, same, bits = oracle(tokens, sizes, table, other)
    assert report.tokens == len(tokens) - 1
    assert report.windows == 15
    for i, score in enumerate((report.dense, report.small)):
        np.testing.assert_allclose(score.loss, nats[:, i].mean(), rtol=1e-5)
        perplexity = np.exp(nats[:, i].mean())
        np.testing.assert_allclose(score.perplexity, perplexity, rtol=1e-5)
        np.testing.assert_allclose(score.bits_per_byte, bits[i], rtol=1e-5)
        np.testing.assert_allclose(score.accuracy, hits[i], rtol=1e-6)
    np.testing.assert_allclose(report.kl, kl.mean(), rtol=1e-5)
    np.testing.assert_allclose(report.agreement, same, rtol=1e-6)
    clusters = [kl[i : i + 7] for i in range(0, len(kl), 7)]
    left_out = [  # the jackknife over windows estimates the same standard error
        np.mean(np.concatenate(clusters[:i] + clusters[i + 1 :]))
        for i in range(len(clusters))
    ]
    n = len(clusters)
    jackknife = np.sqrt((n - 1) / n * np.sum((left_out - np.mean(left_out)) ** 2))
    np.testing.assert_allclose(report.kl_standard_error, jackknife, rtol=0.02)
    assert report.to_dict()["small"]["loss"] == report.small.loss


def test_identical_models_do_not_diverge():
    tokens, _, table = bigram_text()
    batches = windows(tokens, 8, 4)
    report = compare(bigrams, {"table": table}, {"table": table.copy()}, batches)
    assert report.kl == 0 and report.kl_standard_error == 0
    assert report.agreement == 1
    assert report.small == report.dense
    assert report.small.bits_per_byte is None


def test_compare_and_evaluate_agree():
    tokens, sizes, table = bigram_text()
    batches = windows(tokens, 8, 4, token_bytes=sizes)
    report = compare(bigrams, {"table": table}, {"table": -table}, batches)
    found = evaluate(LanguageModelMetrics(bigrams), {"table": -table}, batches)
    assert found == {
        "loss": report.small.loss,
        "accuracy": report.small.accuracy,
        "bits_per_byte": report.small.bits_per_byte,
    }


def test_one_window_has_no_standard_error():
    tokens, _, table = bigram_text()
    batches = windows(tokens, 8, 4, limit=1)
    report = compare(bigrams, {"table": table}, {"table": -table}, batches)
    assert report.windows == 1 and report.kl_standard_error is None


def test_models_of_different_vocabularies_are_refused():
    tokens, _, table = bigram_text()
    with pytest.raises(ValueError, match="different vocabularies"):
        compare(
            bigrams,
            {"table": table},
            {"table": table[:, :5]},
            windows(tokens, 8, 4),
        )


@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.3, 3.0, 300.0])
def test_divergence_keeps_its_digits_where_it_is_small(size):
    random = np.random.default_rng(3)
    logits = random.normal(size=(20, 50)).astype(np.float32) * 5
    others = (logits + size * random.normal(size=(20, 50))).astype(np.float32)
    expected = []
    for a, b in zip(logits, others, strict=True):
        p, q = log_softmax(a), log_softmax(b)
        expected.append(np.sum(np.exp(p) * (p - q)))
    with jax.debug_nans(True):
        found = divergence(jnp.asarray(logits), jnp.asarray(others))
    np.testing.assert_allclose(found, expected, rtol=2e-3 if size < 0.1 else 1e-5)
    assert (found >= 0).all()


def test_per_example_gives_one_column_per_slot():
    found = list(
        per_example(squares, {"scale": jnp.ones((1, 5))}, ragged_batches((3,)))
    )
    assert found[0]["squares"].shape == (2, 4)
    assert found[0]["squares"][:, 3].tolist() == [0, 0]


def test_large_logits_are_scored_window_by_window():
    rng = np.random.default_rng(0)
    table = {"table": jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)}
    tokens = rng.integers(0, 6, 100)
    batches = windows(tokens, 10, 4, token_bytes=np.ones(len(tokens), int))
    plain = evaluate(LanguageModelMetrics(bigrams), table, batches)
    parts = evaluate(LanguageModelMetrics(bigrams, logits_bytes=1), table, batches)
    assert plain.keys() == parts.keys()
    for name in plain:
        np.testing.assert_allclose(parts[name], plain[name], rtol=1e-6)
    one = jax.make_jaxpr(LanguageModelMetrics(bigrams, logits_bytes=1))
    all_ = jax.make_jaxpr(LanguageModelMetrics(bigrams))
    assert "scan" in str(one(table, batches[0]))
    assert "scan" not in str(all_(table, batches[0]))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_applied_to_few_tokens_at_a_time(tied):
    """The same metrics as from all logits at once, which are never in memory."""
    model = Transformer(
        vocab_size=500,
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_size=8,
        mlp_width=16,
        tied=tied,
    )
    tokens = np.random.default_rng(1).integers(0, 500, 150)
    batches = windows(tokens, 51, 2, token_bytes=np.arange(150) % 4)
    key, first = jax.random.key(0), batches[0]["tokens"]
    params = jax.jit(model.init)(key, first)["params"]
    small = jc.compress(params, "symmetric(bits=4)")

    def at_once(params, tokens):
        return model.apply({"params": params}, tokens)

    metrics = LanguageModelMetrics(Apply(model), logits_bytes=16 * 4 * 500)
    for tree in (params, small):
        want = evaluate(LanguageModelMetrics(at_once), tree, batches)
        found = evaluate(metrics, tree, batches)
        assert found.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5)
    want = compare(at_once, params, small, batches)
    found = compare(Apply(model), params, small, batches)
    np.testing.assert_allclose(found.kl, want.kl, rtol=1e-4)
    assert found.agreement == want.agreement
    compiled = jax.jit(metrics).lower(params, batches[0]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 50 * 500 * 4


def test_tokens_outside_the_vocabulary_are_named():
    class Model:
        vocab_size = 6

        def apply(self, variables, tokens):
            return bigrams(variables["params"], tokens)

    table = {"table": jnp.zeros((6, 6))}
    apply_fn = Apply(Model())
    for wrong in (77, -1):
        batches = windows([1, wrong, 3], 3, 1)
        for run in (
            lambda batches: compare(apply_fn, table, table, batches),
            lambda batches: evaluate(LanguageModelMetrics(apply_fn), table, batches),
        ):
            with pytest.raises(ValueError, match=rf"batch 0 has token {wrong}.*0 to 5"):
                run(batches)

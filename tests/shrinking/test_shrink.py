"""`shrink`: the file is as large as asked, the better recipe is returned."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.models.sampling import draw_rows
from jaxcompress.models.transformer import Transformer
from jaxcompress.shrinking import efforts, estimates, fitting, own_text, quality, search
from jaxcompress.shrinking.goals import Goal, parse_goal
from jaxcompress.shrinking.own_text import write_text
from jaxcompress.shrinking.stages import Stages
from jaxcompress.shrinking.subject import read_subject
from jaxcompress.tree.equality import same_bits
from jaxcompress.tree.selection import planned_entries

MODEL = Transformer(
    vocab_size=256,
    width=64,
    layers=2,
    heads=2,
    kv_heads=2,
    head_size=32,
    mlp_width=128,
    scan=True,
)


@pytest.fixture(scope="module")
def params():
    tokens = np.zeros((1, 8), np.int32)
    return MODEL.init(jax.random.key(1), tokens)["params"]


@pytest.fixture
def brief(monkeypatch):
    """Efforts that end in seconds on a tiny model."""
    few = {"texts": 10, "length": 32, "curvature_rows": 8, "curvature_length": 32}
    for name, steps in (("good", 0), ("best", 4)):
        changed = dataclasses.replace(
            efforts.EFFORTS[name], states=8, joint=False, tuning_steps=steps, **few
        )
        monkeypatch.setitem(efforts.EFFORTS, name, changed)


def shrink(params, **options):
    return jc.shrink(MODEL, params, progress=False, **options)


@pytest.mark.parametrize("limit", [50_000, 90_000])
def test_a_quick_file_is_at_most_so_large_and_nearly_so(params, tmp_path, limit):
    small = shrink(params, size=limit, effort="quick")
    small.save(tmp_path / "small.safetensors")
    written = (tmp_path / "small.safetensors").stat().st_size
    assert written == small.file_bytes
    assert 0.99 * limit <= written <= limit
    assert small.kl is None  # nothing was measured, and nothing is claimed


@pytest.mark.slow
def test_a_plan_is_measured_beside_the_uniform_recipe(params, brief, tmp_path):
    small = shrink(params, size="60kB", effort="good", store=tmp_path / "store")
    assert set(small.candidates) == {"plan", "uniform"}
    assert small.kl == min(row["kl"] for row in small.candidates.values())
    for row in small.candidates.values():
        assert 59_400 <= row["file_bytes"] <= 60_000
    path = tmp_path / "small.safetensors"
    small.save(path)
    model, loaded, _ = jc.models.load(path)
    assert same_bits(loaded, small.params) and model == MODEL
    assert small.predicted_kl > 0 and small.report["embed/embedding"].method
    # Again with the store: nothing is measured or coded again, and the bytes agree.
    again = shrink(params, size="60kB", effort="good", store=tmp_path / "store")
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


class Interrupted(Exception):
    pass


@pytest.mark.nightly
def test_a_run_killed_in_each_stage_ends_with_the_same_bytes(
    params, brief, tmp_path, monkeypatch
):
    options = {"size": "60kB", "effort": "best", "progress": False}
    jc.shrink(MODEL, params, **options).save(tmp_path / "whole.safetensors")
    killed = []

    def items(self, label, unit):
        def wrap(items):
            items = list(items)
            for i, item in enumerate(items):
                if i == min(1, len(items) - 1) and label not in killed:
                    killed.append(label)
                    raise Interrupted
                yield item

        return wrap

    monkeypatch.setattr(Stages, "items", items)
    store, small = tmp_path / "store", None
    while small is None:
        with contextlib.suppress(Interrupted):
            small = jc.shrink(MODEL, params, **options, store=store)
    assert killed == [
        "writing calibration text",
        "moments",
        "curvatures",
        "compressing",
        "tuning",
    ]
    small.save(tmp_path / "again.safetensors")
    whole, again = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    assert again.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_the_better_candidate_is_returned(params, brief, monkeypatch):
    kls = iter([0.5, 0.25])
    monkeypatch.setattr(
        "jaxcompress.shrinking.preparation.measure_quality",
        lambda *_: quality.Quality(next(kls), None, 1),
    )
    small = shrink(params, size="60kB")
    assert small.candidates["plan"]["kl"] == 0.5 and small.kl == 0.25
    assert len({method for _, method in small.recipe}) == 1  # equal rates


@pytest.mark.slow
def test_a_divergence_that_is_asked_for_is_met(params, brief):
    small = shrink(params, kl=0.01, text=tokens(20, 16))
    assert 0 < small.kl <= 0.01
    larger = shrink(params, kl=0.002, text=tokens(20, 16))
    assert larger.kl <= 0.002 and larger.file_bytes > small.file_bytes


@pytest.mark.slow
def test_training_changes_steps_and_norms_alone(params, brief):
    small = shrink(params, size="60kB", effort="best")
    assert "uniform" not in small.candidates  # half of the time for what never won
    assert "tuned" in small.candidates or small.notes
    assert small.file_bytes <= 60_000


def test_a_size_that_holds_the_model_changes_nothing(params, tmp_path):
    small = shrink(params, size="1MB", effort="quick")
    assert same_bits(small.params, params) and small.kl == 0
    assert "nothing was changed" in str(small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of size="),
        ({"size": "1MB", "kl": 0.1}, "exactly one of size="),
        ({"size": "many"}, "not a size"),
        ({"kl": -1.0}, "kl above 0"),
        ({"size": "60kB", "effort": "great"}, "effort='quick' or 'good'"),
        ({"size": 900}, "what is not planned"),
        ({"size": "60kB", "text": "words"}, "no tokenizer"),
    ],
)
def test_a_wrong_call_says_what_to_pass(params, options, message):
    with pytest.raises(ValueError, match=message):
        shrink(params, **options)


def test_goals_are_bytes_of_the_file():
    assert parse_goal("60MB", None, None, 1) == Goal(60_000_000, None)
    assert parse_goal(None, 4.0, None, 1000) == Goal(500, None)
    assert parse_goal(None, None, 0.05, 1) == Goal(None, 0.05)


def test_rates_are_scaled_in_the_string():
    method = "rate_distortion(rate=(2.0, 3.0), states=8)"
    assert fitting.with_rate(method, 1.5) == (
        "rate_distortion(rate=(3.0, 4.5), states=8)"
    )
    assert "rate=12.0," in fitting.with_rate("rate_distortion(rate=9.0, states=0)", 2)


def test_the_next_size_lies_on_the_line_of_the_logarithm():
    tried = [(3.0, -2.0, None), (4.0, -4.0, None)]
    assert search._next_bits(tried, -3.0) == pytest.approx(3.5)


def test_written_texts_follow_the_model():
    """A model that always says the token after the last one writes a count."""
    texts = write_text(
        Counting(8), {}, count=3, length=6, start=2, batch=2, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(texts, [[2, 3, 4, 5, 6, 7]] * 3)


def test_texts_of_other_keys_differ(params):
    first, second, again = (
        write_text(MODEL, params, count=2, length=8, start=1, key=jax.random.key(k))
        for k in (0, 1, 0)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != second).any() and (first[:, 0] == 1).all()


@pytest.mark.slow
def test_a_growing_cache_changes_no_token(params, monkeypatch):
    """Tokens are those that the model without a cache gives the same random numbers."""
    monkeypatch.setattr(own_text, "SEGMENT", 4)
    monkeypatch.setattr(own_text, "SLOTS", 8)
    key, length = jax.random.key(3), 14
    texts = write_text(MODEL, params, count=2, length=length, start=1, key=key)
    logits = MODEL.apply({"params": params}, texts)
    for place in range(4):
        part = jax.random.fold_in(jax.random.fold_in(key, 0), place)
        for i, each in enumerate(jax.random.split(part, 4)):
            at = 4 * place + i
            if at + 1 < length:
                drawn = draw_rows(logits[:, at], each)
                np.testing.assert_array_equal(texts[:, at + 1], drawn)


def test_batches_of_texts_are_equal_and_all_are_written():
    calls = []
    texts = write_text(
        Counting(8),
        {},
        count=5,
        length=4,
        start=2,
        batch=4,
        progress=lambda items: calls.append(len(items)) or items,
        key=jax.random.key(0),
    )
    np.testing.assert_array_equal(texts, [[2, 3, 4, 5]] * 5)
    assert calls == [2]  # batches of 3 and 3


@dataclasses.dataclass(frozen=True)
class Counting:
    """A language model whose next token is the last one plus one."""

    size: int

    def init_cache(self, batch, length):
        return {"index": np.int32(0)}

    def apply(self, variables, token, cache):
        del variables
        return 1e9 * jax.nn.one_hot(token + 1, self.size), cache


def test_an_embedding_is_estimated_by_its_features():
    model = MODEL.clone(vocab_size=50_000, width=8, head_size=4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["params"])
    planned = planned_entries(params, None, None)
    subject = read_subject(model, params)
    good = efforts.EFFORTS["good"]
    seconds, memory = estimates.estimate(subject, planned, {}, good, writes=True)
    assert seconds > 5 * estimates.COMPILING  # of a tiny model that is most of it
    assert memory < 2**30  # a square of the vocabulary has 9.3 GiB
    quick, quick_memory = estimates.estimate(
        subject, planned, {}, efforts.EFFORTS["quick"], writes=False
    )
    assert quick > 0 and quick_memory < memory


def test_a_stage_is_announced_and_timed(capsys):
    stages = Stages(True)
    for _ in range(2):
        with stages.stage("moments", "3 batches"):
            assert capsys.readouterr().err == "shrink: moments: 3 batches\n"
            sum(range(100_000))
    row = stages.taken["moments"]
    assert row["processor_seconds"] > 0 and row["seconds"] > 0
    assert row["peak_memory_bytes"] > 2**20
    with Stages(False).stage("silent"):
        pass
    assert capsys.readouterr().err == ""


def tokens(texts, length):
    random = np.random.default_rng(0)
    return random.integers(0, MODEL.vocab_size, (texts, length))


@pytest.mark.slow
def test_training_keeps_no_layers_for_the_way_back():
    """Less temporary memory than the function that evaluates, the same gradient."""
    deep = MODEL.clone(layers=12)
    tokens = np.arange(128, dtype=np.int32)[None]
    dense = jax.jit(deep.init)(jax.random.key(1), tokens)["params"]
    subject = read_subject(deep, dense)
    temporary, gradients = [], []
    for function in (subject.function, subject.function_to_train()):
        loss = lambda tree, f=function: (f(tree, {"tokens": tokens}) ** 2).mean()  # noqa: E731
        step = jax.jit(jax.grad(loss)).lower(dense).compile()
        temporary.append(step.memory_analysis().temp_size_in_bytes)
        gradients.append(step(dense)["embed"]["embedding"])
    assert temporary[1] < 0.6 * temporary[0]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-8)

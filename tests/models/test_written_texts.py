"""Several texts at once, stop strings, pieces as they are written, growing caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.models import Transformer, attention, generation
from jaxcompress.models.attention import product
from jaxcompress.models.cache import cache_length, grow_cache
from jaxcompress.models.generation import generate
from jaxcompress.models.sampling import TOGETHER, draw, sample_rows
from jaxcompress.models.written_text import Written

MODEL = Transformer(
    vocab_size=40,
    width=24,
    layers=2,
    heads=2,
    kv_heads=1,
    head_size=8,
    mlp_width=32,
    sliding_window=(None, 5),
)
SIGNS = "abcdefghijklmnopqrstuvwxyz .,!?012345"
PROMPTS = ["hello", "a", "rather longer than the others"]


@dataclasses.dataclass
class Letters:
    """A tokenizer of lower-case letters and the blank; 1 begins a text."""

    bos_id: int | None = 1
    eos_id: int | None = None
    end_ids: tuple[int, ...] = ()

    def encode(self, text):
        return [3 + SIGNS.index(x) for x in text]

    def decode(self, ids):
        return "".join(SIGNS[i - 3] for i in ids if i > 2)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    random = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes["params"]
    )


def write(params, prompt, **options):
    return generate(MODEL, params, Letters(), prompt, **{"max_tokens": 8} | options)


@pytest.mark.parametrize("sampled", [False, True])
def test_texts_written_together_are_those_written_alone(params, sampled):
    options = {"temperature": 0.8, "key": jax.random.key(4)} if sampled else {}
    together = write(params, PROMPTS, **options)
    assert len(set(together)) == 3 and min(map(len, map(set, together))) > 1
    assert together[0] == write(params, PROMPTS[0], **options)
    if not sampled:  # the draws of a text depend on its number
        assert together == [write(params, prompt) for prompt in PROMPTS]


def test_a_cache_that_grows_changes_no_text(params, monkeypatch):
    whole = write(params, PROMPTS, max_tokens=20)
    grown = []

    def record(cache, length):
        grown.append((cache_length(cache), length))
        return grow_cache(cache, length)

    monkeypatch.setattr(generation, "SLACK", 8)
    monkeypatch.setattr(generation, "FIRST", 8)
    monkeypatch.setattr(generation, "grow_cache", record)
    assert write(params, PROMPTS, max_tokens=20) == whole
    assert grown == [(40, 56)]


def test_a_scanned_cache_grows_too(params):
    model = MODEL.clone(scan=True)
    cache = jax.tree.map(lambda x: x + 1, model.init_cache(2, 3))
    longer = grow_cache(cache, 5)
    assert cache_length(longer) == 5 and int(longer["index"]) == 1
    key, value = longer["layers"]["key"], longer["layers"]["value"]
    assert key[..., :3].all() and not key[..., 3:].any()
    assert value[..., :3, :].all() and not value[..., 3:, :].any()


def test_logits_of_the_last_position_alone(params):
    tokens = jnp.arange(10).reshape(2, 5)
    apply = jax.jit(MODEL.apply, static_argnames="last")
    whole = apply({"params": params}, tokens)
    last = apply({"params": params}, tokens, last=True)
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-5)


def test_stop_strings_and_end_marks(params):
    whole = write(params, PROMPTS)
    stop = whole[0][3:5]
    cut = write(params, PROMPTS, stop=[stop, "not there"])
    assert cut == [text.split(stop)[0] for text in whole] and cut != whole
    ends = [Letters().encode(text[2])[0] for text in whole[:2]]
    cut = write(params, PROMPTS, end_ids=ends)
    letters = Letters().decode(ends)
    expected = [
        text[: min([text.find(x) for x in letters if x in text], default=len(text))]
        for text in whole
    ]
    assert cut == expected


def test_pieces_add_up_to_the_texts(params):
    pieces = {0: [], 1: [], 2: []}
    on_text = lambda text, row: pieces[row].append(text)  # noqa: E731
    whole = write(params, PROMPTS)
    stop = whole[0][3:5]
    cut = write(params, PROMPTS, stop=[stop], on_text=on_text)
    assert ["".join(pieces[row]) for row in range(3)] == cut
    assert len(pieces[2]) > 3, "told as it is written"


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_pieces_are_whole_characters_and_no_beginnings_of_stop_strings():
    told = []
    text = Written(Bytes(), list(b"> "), (), ("END",), lambda x, _: told.append(x), 0)
    for token in "aé E€ENxEND".encode():
        text.add(token)
    assert text.ended and text.finish() == "aé E€ENx"
    assert "".join(told) == "aé E€ENx" and "\ufffd" not in "".join(told)
    assert all(piece not in ("E", "EN") for piece in told)
    left = Written(Bytes(), [], (), (), lambda x, _: told.append(x), 0)
    left.add("é".encode()[0])
    assert left.finish() == told[-1] == "\ufffd", "what never became a character"


@pytest.mark.parametrize("size", [5, TOGETHER, 2 * TOGETHER + 3])
def test_draws_follow_the_probabilities(size):
    """Frequencies of 20 000 draws within five standard deviations of a softmax."""
    logits = np.random.default_rng(0).normal(size=size).astype(np.float32)
    logits[size // 2] = -np.inf
    count = 20000
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, size))
    settings = (jnp.float32(1), jnp.int32(size), jnp.float32(1))
    drawn = sample_rows(rows, jax.random.key(7), *settings, greedy=False, cut=False)
    found = np.bincount(np.asarray(drawn), minlength=size) / count
    chances = np.exp(logits.astype(np.float64))
    chances /= chances.sum()
    spread = np.sqrt(chances * (1 - chances) / count)
    assert (
        found[size // 2] == 0 and (np.abs(found - chances) <= 5 * spread + 1e-9).all()
    )


def test_a_draw_never_takes_what_is_impossible(monkeypatch):
    """Even the largest random number, and one likely token among impossible ones."""
    for largest in (0.0, 1.0):
        monkeypatch.setattr(jax.random, "uniform", lambda key, x=largest: x)
        for place in (0, 3, TOGETHER, 2 * TOGETHER):
            logits = jnp.full(2 * TOGETHER + 1, -jnp.inf).at[place].set(2.0)
            assert int(draw(logits, jax.random.key(0))) == place


def test_options_are_checked(params):
    assert write(params, []) == []
    with pytest.raises(ValueError, match="a list of strings"):
        write(params, "a", stop="abc")
    with pytest.raises(ValueError, match="not empty"):
        write(params, "a", stop=["", "abc"])


def test_few_rows_are_multiplied_as_many_are():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 3, 4, 8)), random.normal(size=(2, 3, 8, 5))
    got = product(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(got, x @ y, atol=1e-5)
    assert "dot_general" not in str(jax.make_jaxpr(product)(x, y))
    many = jnp.concatenate([jnp.asarray(x)] * 8, axis=2)
    assert "dot_general" in str(jax.make_jaxpr(product)(many, y))


def test_a_long_cache_is_read_as_a_short_one(params, monkeypatch):
    short = write(params, PROMPTS)
    monkeypatch.setattr(attention, "LONG", 1)
    jax.clear_caches()
    assert write(params, PROMPTS) == short

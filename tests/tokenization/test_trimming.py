"""A trimmed vocabulary changes nothing for text that does not use what is gone."""

import bisect
import inspect
import json
import json.decoder
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import tokenization
from jaxcompress.models.bundled_text import heldout_text

DOMAIN = [inspect.getsource(textwrap), inspect.getsource(bisect)]
OTHER = [
    inspect.getsource(json.decoder) * 2,
    "The quick brown fox\n\tjumps over 12345 lazy dogs; naïve café, 漢字.\n" * 20,
]
KINDS = {
    **{"bpe": 1000, "unigram": 800, "char": 400},
    **{"word": 900, "wordpiece": 900, "dictionary": 900},
}
SIZE = 900  # of the byte-level one, before a last special token


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level tokenizer.json with special tokens and a template for them."""
    tokenizers = pytest.importorskip("tokenizers")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    built.pre_tokenizer = level(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(DOMAIN + OTHER, trainer)
    built.add_special_tokens(["<|late|>"])
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|late|> $A", special_tokens=[("<|late|>", SIZE)]
    )
    return tokenization.from_huggingface_json(built.to_str(), eos="<|end|>")


def tokenizer_of(kind, request):
    if kind == "byte-level":
        return request.getfixturevalue("byte_level")
    return tokenization.train(DOMAIN + OTHER, kind=kind, vocab_size=KINDS[kind])


@pytest.mark.parametrize("kind", [*KINDS, "byte-level"])
def test_text_of_kept_pieces_is_encoded_as_before(kind, request):
    tokenizer = tokenizer_of(kind, request)
    counts = tokenization.count_pieces(tokenizer, DOMAIN)
    small, kept = tokenization.trim(tokenizer, np.flatnonzero(counts))
    assert small.vocab_size == len(kept) < tokenizer.vocab_size
    assert [small.pieces[i] for i in range(len(kept))] == [
        tokenizer.pieces[i] for i in kept
    ]
    for text in DOMAIN:
        for part in (text, text[7:], text[:31] * 3, *text.split()):
            before = tokenizer.encode(part)
            if set(before) <= set(kept.tolist()):
                assert kept[small.encode(part)].tolist() == before
    assert kept[small.encode(DOMAIN[0])].tolist() == tokenizer.encode(DOMAIN[0])
    for text in [*OTHER, "Ωx\0</s>▁", DOMAIN[0] + OTHER[0]]:
        assert small.decode(small.encode(text)) == text
    other = "".join(OTHER)
    assert len(small.encode(other)) > len(tokenizer.encode(other))
    again = tokenization.from_bytes(small.to_bytes())
    assert again.digest == small.digest and again.vocab_size == small.vocab_size
    for mark in ("bos_id", "eos_id"):
        if getattr(tokenizer, mark) is not None:
            assert kept[getattr(small, mark)] == getattr(tokenizer, mark)


@pytest.mark.parametrize("kind", [*KINDS, "byte-level"])
def test_keeping_everything_changes_nothing(kind, request):
    tokenizer = tokenizer_of(kind, request)
    small, kept = tokenization.trim(tokenizer, range(tokenizer.vocab_size))
    assert kept.tolist() == list(range(tokenizer.vocab_size))
    for text in DOMAIN + OTHER:
        assert small.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", [*KINDS, "byte-level"])
def test_keeping_nothing_leaves_what_every_text_needs(kind, request):
    tokenizer = tokenizer_of(kind, request)
    small, _ = tokenization.trim(tokenizer, [])
    for text in DOMAIN + OTHER:
        assert small.decode(small.encode(text)) == text


def test_pieces_on_the_way_to_a_kept_one_stay():
    """`abcd` alone is used, but without `ab` and `cd` it could not arise."""
    tokenizer = tokenization.train(
        ["abcd abcd ab cd abcd xy"], vocab_size=10**4, min_frequency=2
    )
    (used,) = tokenizer.encode(" abcd")
    small, kept = tokenization.trim(tokenizer, [used])
    found = {tokenizer.pieces[i] for i in kept if i > 258}
    assert found > {b" abcd", b"a", b"b", b"c", b"d", b" "} and b"x" not in found
    assert len(small.encode(" abcd")) == 1
    none, _ = tokenization.trim(tokenizer, [])
    assert len(none.encode(" abcd")) == 5


def test_the_template_of_a_tokenizer_json_is_renumbered(byte_level):
    small, kept = tokenization.trim(byte_level, [])
    described = json.loads(json.loads(small.to_bytes())["tokenizer"])
    ids = described["post_processor"]["special_tokens"]["<|late|>"]["ids"]
    assert ids == [small.vocab_size - 1] and kept[-1] == SIZE
    assert small.encode("<|late|>") == ids


def test_trimming_errors(byte_level):
    with pytest.raises(ValueError, match=f"0 to {SIZE}"):
        tokenization.trim(byte_level, [SIZE + 1])
    with pytest.raises(ValueError, match=f"0 to {SIZE}"):
        tokenization.trim(byte_level, [-1])
    contents = json.loads(byte_level.to_bytes())
    described = json.loads(contents["tokenizer"])
    described["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    described["added_tokens"] = []
    words = tokenization.from_huggingface_json(json.dumps(described))
    with pytest.raises(ValueError, match="WordLevel cannot be trimmed"):
        tokenization.trim(words, [0])


@pytest.fixture(scope="module")
def reference():
    return jc.models.load("reference", scan=True)


def test_a_model_without_unused_pieces(reference):
    """Same hidden states and logits; probabilities differ by one factor a place."""
    model, params, tokenizer = reference
    text = heldout_text()[:3000]
    ids = np.array(tokenizer.encode(text))[:256]
    small_model, small_params, small = jc.models.trim_vocabulary(
        model, params, tokenizer, ids
    )
    _, kept = tokenization.trim(tokenizer, ids)
    assert small_model.vocab_size == small.vocab_size == len(kept) < 1500
    assert small_params["embed"]["embedding"].shape == (len(kept), model.width)
    assert jc.nbytes(params) - jc.nbytes(small_params) == 4 * model.width * (
        model.vocab_size - len(kept)
    )
    old = jax.jit(model.apply)({"params": params}, ids[None])[0][:, kept]
    new_ids = np.searchsorted(kept, ids)
    assert small.decode(new_ids.tolist()) == tokenizer.decode(ids.tolist())
    new = jax.jit(small_model.apply)({"params": small_params}, new_ids[None])[0]
    np.testing.assert_allclose(new, old, atol=2e-4)
    ratio = jax.nn.log_softmax(new) - jax.nn.log_softmax(old)
    np.testing.assert_allclose(ratio, 0, atol=2e-4)
    assert params["embed"]["embedding"].shape[0] == model.vocab_size, "input changed"


@pytest.mark.slow
def test_a_trimmed_model_is_saved_with_its_tokenizer(reference, tmp_path):
    trimmed = jc.models.trim_vocabulary(*reference, range(600))
    jc.models.save(tmp_path / "small.safetensors", *trimmed)
    model, params, tokenizer = jc.models.load(tmp_path / "small.safetensors")
    assert model.vocab_size == tokenizer.vocab_size == trimmed[2].vocab_size
    text = jc.models.generate(model, params, tokenizer, "def f(x):", max_tokens=3)
    assert isinstance(text, str)


@pytest.mark.slow
def test_an_untied_head_is_trimmed_too():
    tokenizer = tokenization.train(DOMAIN, vocab_size=400)
    model = jc.models.Transformer(
        vocab_size=404,
        width=16,
        layers=1,
        heads=1,
        kv_heads=1,
        head_size=16,
        mlp_width=16,
        tied=False,
    )  # 4 rows of padding
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    params = params["params"]
    ids = np.array(tokenizer.encode(DOMAIN[1][:60]))
    small_model, small_params, small = jc.models.trim_vocabulary(
        model, params, tokenizer, ids
    )
    _, kept = tokenization.trim(tokenizer, ids)
    assert small_params["head"]["kernel"].shape == (16, len(kept))
    old = model.apply({"params": params}, ids[None])[..., kept]
    new = np.array(small.encode(DOMAIN[1][:60]))
    new = small_model.apply({"params": small_params}, new[None])
    np.testing.assert_allclose(new, old, atol=1e-5)


def test_trimming_a_model_wrongly(reference):
    model, params, tokenizer = reference
    small = jc.compress(params, [(".*embedding", "symmetric(bits=8)")])
    with pytest.raises(ValueError, match="embed/embedding is a Reshaped"):
        jc.models.trim_vocabulary(model, small, tokenizer, [5])
    with pytest.raises(ValueError, match="do not belong together"):
        jc.models.trim_vocabulary(model.clone(vocab_size=9), params, tokenizer, [5])

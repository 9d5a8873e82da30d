"""Quality on the trained reference model: held-out text, never random weights."""

import hashlib
import lzma
from importlib import resources

import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import demo
from jaxcompress.evaluation import Apply, windows

HELDOUT_SHA256 = "1b43338678fff55e110b0793364566110064094350ede6e62cd331e017e6082e"
LENGTH, BATCH = 256, 4
KERNELS, MLP = r"layers/.*kernel", r"layers/mlp/.*kernel"


@pytest.fixture(scope="module")
def reference():
    """Scanned model, its parameters, layouts, and windows of text to measure on."""
    model, params, tokenizer = jc.models.load("reference", scan=True)
    text = demo.heldout_text()
    ids = tokenizer.encode(text[len(text) // 2 :])
    batches = list(
        windows(ids, LENGTH, BATCH, token_bytes=tokenizer.token_bytes(ids), limit=24)
    )
    layout = jc.layout(model, params, batches[0]["tokens"])
    return model, params, tokenizer, layout, batches


@pytest.fixture(scope="module")
def moments(reference):
    """From the first half of the held-out text, which nothing here is measured on."""
    model, params, tokenizer, _, _ = reference
    text = demo.heldout_text()
    ids = np.array(tokenizer.encode(text[: len(text) // 2])[: 32 * LENGTH])
    found = jc.collect_moments(model, params, ids.reshape(-1, 8, LENGTH))
    assert float(found["embed/embedding"].count) == ids.size
    return found


@pytest.fixture(scope="module")
def kl(reference):
    """Held-out KL in nats of a recipe, compiled once for all of them."""
    model, params, _, layout, batches = reference
    seen = {}

    def measure(recipe, moments=None, where=KERNELS):
        if (recipe, where) not in seen:
            rules = [(where, recipe)]
            small = jc.compress(params, rules, moments, layout=layout)
            dense = jax.jit(jc.materialize)(small)
            report = jc.compare(Apply(model), params, dense, batches)
            seen[recipe, where] = report.kl
        return seen[recipe, where]

    return measure


def test_the_file_is_small_and_the_text_is_the_recorded_one():
    data = resources.files("jaxcompress.models") / "data"
    assert len((data / "reference.safetensors").read_bytes()) < 5_000_000
    text = (data / "heldout.txt").read_bytes()
    assert len(text) > 100_000
    assert hashlib.sha256(text).hexdigest() == HELDOUT_SHA256


def test_it_predicts_held_out_text_far_better_than_xz(reference):
    model, params, _, _, batches = reference
    report = jc.compare(Apply(model), params, params, batches)
    text = demo.heldout_text().encode()
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert report.kl == 0
    assert report.dense.bits_per_byte < 0.75 * xz


def test_every_bit_counts(kl):
    costs = [kl(f"symmetric(bits={bits}, block=64, search=True)") for bits in (8, 4, 3)]
    costs.append(kl("symmetric(bits=2, block=64, search=True, full_range=True)"))
    assert costs[0] < 1e-3
    assert costs == sorted(costs)
    # A bit multiplies the squared error by four, and the KL by about as much.
    assert 2.5 < costs[2] / costs[1] < 8


def test_full_range_helps_at_two_bits(kl):
    plain = kl("symmetric(bits=2, block=64, search=True)")
    assert kl("symmetric(bits=2, block=64, search=True, full_range=True)") < plain


def test_data_helps(kl, moments):
    nearest = kl("symmetric(bits=3, block=64, search=True)")
    fed = kl("gptq(bits=3, block=64)", moments)
    learned = kl("learned(bits=3, block=64, steps=40)", moments)
    assert fed < 0.8 * nearest
    assert learned < fed


def test_rounding_that_knows_of_outliers(kl, moments):
    nearest = kl("asymmetric(bits=3, block=64)", where=MLP)
    assert kl("hqq(bits=3, block=64)", where=MLP) < 0.97 * nearest
    assert kl("awq(bits=3, block=64)", moments, where=MLP) < 0.97 * nearest


def test_number_formats(kl):
    assert kl("nf4(block=64)") < 0.9 * kl("symmetric(bits=4, block=64)")
    four = kl("nvfp4(search=True)")
    assert four < 0.7 * kl("mxfp4(search=True)")
    assert kl("fp8()") < 0.1 * four


def test_block_by_block(reference, kl, moments):
    model, params, tokenizer, _, batches = reference
    ids = np.array(tokenizer.encode(demo.heldout_text()[:60_000])[: 16 * LENGTH])
    small = jc.compress_blockwise(
        model, params, [(MLP, "gptq(bits=3, block=64)")], list(ids.reshape(-1, 8, 256))
    )
    dense = jax.jit(jc.materialize)(small)
    found = jc.compare(Apply(model), params, dense, batches).kl
    assert found < 0.8 * kl("symmetric(bits=3, block=64, search=True)", where=MLP)
    assert found < 1.1 * kl("gptq(bits=3, block=64)", moments, where=MLP)

"""The integer model: near the float one, and the same bits whichever way it is run."""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.models import Bert, Transformer, stack_layers
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.textcoding import (
    exact,
    export,
    integer_transformer,
    rounding,
    self_test,
)

GOLDEN = ("ba2c2bc992090197", "94cab7156f285139")
NATS = math.log(2) / 4096
SMALL = {
    "vocab_size": 96,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 16,
    "mlp_width": 48,
}
VARIANTS = {
    "tied": {},
    "biased": {
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tied": False,
        "qk_norm": True,
        "sliding_window": 5,
        "attention_scale": 0.4,
    },
    "uneven": {
        "heads": (4, 2),
        "mlp_width": (48, 40),
        "sliding_window": (None, 4),
        "rope_scaling": (
            ("rope_type", "yarn"),
            ("factor", 4.0),
            ("original_max_position_embeddings", 8),
        ),
    },
}
run = jax.jit(lambda model, *inputs: model.apply(*inputs))


def build(**options):
    """A model of random weights, some biases and norms away from their defaults."""
    model = Transformer(**(SMALL | options))
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = model.init(jax.random.key(0), tokens)["params"]
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), params
    )
    return model, params


def tokens_of(batch, length):
    random = np.random.default_rng(2)
    return random.integers(0, SMALL["vocab_size"], (batch, length)).astype(np.int32)


@pytest.fixture(scope="module")
def tied():
    model, params = build()
    return model, params, exact(model, params, context=32)


def rounded_params(model, integers, params):
    """The float parameters that the integer weights stand for."""

    def dense(linear, stack=()):
        scale = linear.scale[stack] * 2.0 ** (linear.exponent[stack] - 15.0)
        return np.float32(linear.weight[stack] * scale)

    arrays = integers.arrays
    params = jax.tree.map(np.array, params)
    params["embed"]["embedding"] = dense(arrays["embed"]).T
    if not model.tied:
        params["head"]["kernel"] = dense(arrays["head"])
    for i in range(model.layers):
        stacked = isinstance(arrays["layers"], dict)
        layer = arrays["layers"] if stacked else arrays["layers"][i]
        for room in ("attention", "mlp"):
            for name, leaf in params[f"layer_{i}"][room].items():
                if "kernel" in leaf:
                    leaf["kernel"] = dense(layer[name], i if stacked else ())
    return params


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_float_model_with_rounded_weights(variant):
    model, params = build(**VARIANTS[variant])
    integers = exact(model, params, context=32)
    ids = tokens_of(3, 20)
    rounded = rounded_params(model, integers, params)
    wanted = jax.jit(lambda p, t: model.apply({"params": p}, t))(rounded, ids)
    found = run(integers, ids)
    assert found.dtype == jnp.int32
    difference = jax.nn.log_softmax(found * NATS) - jax.nn.log_softmax(wanted)
    assert float(jnp.sqrt((difference**2).mean())) < 0.01 * float(wanted.std())


def test_any_batch_cache_and_order_gives_the_same_integers(tied):
    _, _, integers = tied
    ids = tokens_of(3, 20)
    wanted = np.asarray(run(integers, ids))
    plain = jax.jit(
        lambda model, t: model.apply(t),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    wide = plain(integers.widen(), np.tile(ids, (2, 1))[:5, :13])
    assert np.array_equal(wide[3:], wanted[:2, :13])
    cache = integers.init_cache(3, 32)
    found, cache = run(integers, ids[:, :6], cache)
    assert np.array_equal(found, wanted[:, :6])
    for i in range(6, 20):
        found, cache = run(integers, ids[:, i : i + 1], cache)
        assert np.array_equal(found[:, 0], wanted[:, i])


def test_scanned_compressed_and_dense_parameters_are_taken(tied):
    model, params, integers = tied
    stacked = exact(model.clone(scan=True), stack_layers(params), context=32)
    assert stacked.digest == integers.digest
    small = jc.compress(params, [(r".*kernel", "symmetric(bits=8)")])
    assert exact(model, small, context=32).digest != integers.digest


def test_every_weight_counts_in_the_digest(tied):
    model, params, integers = tied
    assert integers.widen().digest == integers.digest
    params = jax.tree.map(np.array, params)
    params["layer_1"]["mlp"]["up_proj"]["kernel"][3, 5] += 0.1
    assert exact(model, params, context=32).digest != integers.digest
    assert exact(model, tied[1], context=31).digest != integers.digest


def test_the_bound_is_the_largest_that_is_proved():
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (300, 5)).astype(np.int8)
    parts, bound = rounding.prove("kernel", weight)
    largest = max(
        np.abs(part.astype(int)).sum(0).max() for part in rounding.split(weight, parts)
    )
    assert bound * largest <= rounding.EXACT < (bound + 1) * largest
    wide = np.full((4000, 2), 127, np.int8)
    parts, bound = rounding.prove("kernel", wide)
    assert parts == 16 and bound == rounding.EXACT // (250 * 127)


def test_a_sum_that_cannot_be_bounded_is_refused():
    with pytest.raises(
        ValueError, match=r"layer_0/mlp/down: .* 264033 .*magnitude 63 "
    ):
        rounding.prove("layer_0/mlp/down", np.full((133_000, 1), 127, np.int8))


def test_kernels_are_rounded_to_nearest():
    kernel = np.random.default_rng(0).normal(size=(40, 6)) * [1, 2, 3, 1e-3, 0, 50]
    linear = rounding.round_kernel("kernel", kernel)
    step = linear.scale * 2.0 ** (int(linear.exponent) - 15)
    assert (np.abs(linear.weight * step - kernel) <= step / 2 + 1e-12).all()
    assert (step[:3] < 1.02 * np.abs(kernel).max(0)[:3] / 127).all()
    assert not linear.weight[:, 4].any()


def test_rotary_tables():
    speeds = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    cosine, sine = rounding.rotary_table(speeds, 300)
    angles = np.arange(300)[:, None] * speeds
    assert np.abs(cosine - np.cos(angles) * 32768).max() < 0.5001
    assert np.abs(sine - np.sin(angles) * 32768).max() < 0.5001


def test_refusals_name_what_is_wrong(tied):
    model, params, integers = tied
    bad = jax.tree.map(np.array, params)
    bad["layer_1"]["attention"]["v_proj"]["kernel"][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"layer_1/attention/v_proj/kernel: 1 of"):
        exact(model, bad)
    with pytest.raises(TypeError, match="Bert"):
        exact(Bert(10, 8, 1, 1, 8, 4), params)
    for options in ({"activation": "gelu", "gated": False}, {"post_norms": True}):
        with pytest.raises(
            ValueError, match=f"no integer form of .*{next(iter(options))}"
        ):
            exact(model.clone(**options), params)
    with pytest.raises(ValueError, match="rope_theta"):
        exact(model.clone(rope_theta=None), params)
    with pytest.raises(ValueError, match="context is 9000"):
        exact(model, params, context=9000)
    with pytest.raises(ValueError, match="context of 32"):
        integers.apply(tokens_of(1, 33))
    with pytest.raises(ValueError, match="no layer_1/mlp_norm"):
        exact(model, params | {"layer_1": {"attention_norm": {"scale": np.ones(32)}}})


def test_the_self_test_finds_a_device_that_rounds(tied, monkeypatch):
    integers = tied[2]
    self_test(integers)

    def rounded(x, y):  # as if sums had two bits less
        total = (np.asarray(x, float) @ np.asarray(y, float)).astype(np.int64)
        return np.where(np.abs(total) > 1 << 22, total & ~3, total)

    monkeypatch.setattr(export, "exact_dot", rounded)
    with pytest.raises(RuntimeError, match="float32 dot products of integers"):
        self_test(integers)


@pytest.fixture(scope="module")
def reference():
    model, params, tokenizer = jc.models.load("reference", scan=False)
    return model, params, tokenizer, exact(model, params, context=256)


def test_the_trained_model_loses_a_thousandth_at_most(reference):
    model, params, tokenizer, integers = reference
    ids = tokenizer.encode(heldout_text()[:3000])[:512]
    ids = np.array(ids, np.int32).reshape(2, 256)
    losses = []
    for logits in (
        jax.jit(lambda p, t: model.apply({"params": p}, t))(params, ids),
        run(integers.widen(), ids) * NATS,
    ):
        scores = jax.nn.log_softmax(logits[:, :-1])
        losses.append(float(-jnp.take_along_axis(scores, ids[:, 1:, None], -1).mean()))
    assert abs(losses[1] / losses[0] - 1) < 1e-3


def test_golden_integers(reference):
    """The same on every device, instruction set and version of JAX."""
    integers = reference[3]
    ids = (np.arange(48, dtype=np.int32).reshape(2, 24) * 37) % 2048
    logits = np.asarray(run(integers, ids))
    found = hashlib.sha256(logits.astype("<i4").tobytes()).hexdigest()
    assert (integers.digest[:16], found[:16]) == GOLDEN


@pytest.mark.nightly
def test_blocks_of_queries_and_a_list_of_layers_give_the_same_integers(monkeypatch):
    model, params = build()
    exact_model = exact(model, params, context=40)
    tokens = np.random.default_rng(0).integers(0, 96, (1, 40)).astype(np.int32)
    wanted = run(exact_model, tokens)
    listed = exact_model.unstack()
    assert isinstance(listed.arrays["layers"], list)
    np.testing.assert_array_equal(run(listed, tokens), wanted)
    monkeypatch.setattr(integer_transformer, "_QUERIES", 16)  # 16, 16 and 8
    blocks = jax.jit(lambda model, tokens: model.apply(tokens))
    np.testing.assert_array_equal(blocks(exact_model, tokens), wanted)

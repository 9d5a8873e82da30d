"""The decoder against a NumPy oracle, and its forms against each other."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import tokenization
from jaxcompress.models import Transformer, stack_layers, unstack_layers
from jaxcompress.models.generation import _step, generate, sample
from jaxcompress.models.rope import rope_frequencies

TINY = Transformer(
    vocab_size=40,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    mlp_width=24,
)
LLAMA3 = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 64),
)
YARN = (
    ("rope_type", "yarn"),
    ("factor", 4.0),
    ("original_max_position_embeddings", 64),
)
VARIANTS = {
    "llama": TINY,
    "untied": TINY.clone(tied=False),
    "one_kv_head": TINY.clone(kv_heads=1),
    "no_sharing": TINY.clone(kv_heads=4),
    "qwen2": TINY.clone(qkv_bias=True, rope_theta=1e6),
    "qwen3": TINY.clone(qk_norm=True, head_size=12, norm_eps=1e-2),
    "all_biases": TINY.clone(qkv_bias=True, out_bias=True, mlp_bias=True),
    "mistral": TINY.clone(sliding_window=3),
    "per_layer": TINY.clone(
        heads=(3, 2),
        kv_heads=(3, 1),
        mlp_width=(8, 24),
        sliding_window=(None, 2),
    ),
    "linear": TINY.clone(rope_scaling=(("type", "linear"), ("factor", 4.0))),
    "llama3": TINY.clone(rope_scaling=LLAMA3),
    "yarn": TINY.clone(rope_scaling=YARN),
}


def tokens_of(batch=2, length=10, seed=0):
    drawn = np.random.default_rng(seed).integers(0, 40, (batch, length))
    return jnp.asarray(drawn, jnp.int32)


def params_of(model, seed=0):
    """Parameters with no zeros or ones left: biases and norms count too."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens_of(1, 2))["params"]
    draw = np.random.default_rng(seed)

    def values(path, x):
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(draw.normal(middle, 0.3, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(values, shapes)


@partial(jax.jit, static_argnums=0, static_argnames="mutable")
def apply(model, params, tokens, **options):
    return model.apply({"params": params}, tokens, **options)


def largest_difference(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs)


# The oracle: one text, one layer, one head, one query at a time.


def oracle_norm(x, scale, eps):
    return (
        np.array([row / math.sqrt((row @ row) / row.size + eps) for row in x]) * scale
    )


def oracle_speeds(model):
    """Angles per position and the attention factor, from the papers' formulas."""
    half = model.head_size // 2
    plain = [model.rope_theta ** (-2 * i / model.head_size) for i in range(half)]
    options = dict(model.rope_scaling or ())
    kind = options.get("rope_type", options.get("type"))
    factor = options.get("factor")
    original = options.get("original_max_position_embeddings")
    if kind == "linear":
        return [speed / factor for speed in plain], 1.0
    if kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        out = []
        for speed in plain:
            wavelength = 2 * math.pi / speed
            if wavelength < original / high:
                out.append(speed)
            elif wavelength > original / low:
                out.append(speed / factor)
            else:
                smooth = (original / wavelength - low) / (high - low)
                out.append((1 - smooth) * speed / factor + smooth * speed)
        return out, 1.0
    if kind == "yarn":
        size, log_theta = model.head_size, math.log(model.rope_theta)
        first, last = (
            size * math.log(original / (turns * 2 * math.pi)) / (2 * log_theta)
            for turns in (32, 1)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        out = []
        for i, speed in enumerate(plain):
            ramp = min(max((i - first) / (last - first), 0), 1)
            out.append(speed / factor * ramp + speed * (1 - ramp))
        return out, 0.1 * math.log(factor) + 1
    return plain, 1.0


def oracle_rotate(vector, position, speeds, factor):
    half = len(vector) // 2
    out = np.empty_like(vector)
    for i, speed in enumerate(speeds):
        turned = (vector[i] + 1j * vector[i + half]) * np.exp(1j * position * speed)
        out[i], out[i + half] = factor * turned.real, factor * turned.imag
    return out


def oracle_linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def oracle_attention(x, p, model, heads, kv_heads, window):
    count, size = len(x), model.head_size
    speeds, factor = oracle_speeds(model)
    q, k, v = (oracle_linear(x, p[f"{name}_proj"]) for name in "qkv")
    out = np.zeros((count, heads * size))
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        kv_head = head // (heads // kv_heads)
        shared = slice(kv_head * size, (kv_head + 1) * size)
        queries, keys, values = q[:, own], k[:, shared], v[:, shared]
        if model.qk_norm:
            queries = oracle_norm(queries, p["q_norm"]["scale"], model.norm_eps)
            keys = oracle_norm(keys, p["k_norm"]["scale"], model.norm_eps)
        for t in range(count):
            begin = 0 if window is None else max(0, t - window + 1)
            query = oracle_rotate(queries[t], t, speeds, factor)
            weights = np.array(
                [
                    math.exp(
                        query @ oracle_rotate(keys[s], s, speeds, factor) / size**0.5
                    )
                    for s in range(begin, t + 1)
                ]
            )
            out[t, own] = weights / weights.sum() @ values[begin : t + 1]
    return oracle_linear(out, p["o_proj"])


def oracle_logits(model, params, tokens):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    each = lambda x, i: x[i] if isinstance(x, tuple) else x  # noqa: E731
    x = params["embed"]["embedding"][np.asarray(tokens)]
    for i in range(model.layers):
        p = params[f"layer_{i}"]
        normed = oracle_norm(x, p["attention_norm"]["scale"], model.norm_eps)
        x = x + oracle_attention(
            normed,
            p["attention"],
            model,
            each(model.heads, i),
            each(model.kv_heads, i),
            each(model.sliding_window, i),
        )
        normed = oracle_norm(x, p["mlp_norm"]["scale"], model.norm_eps)
        gate = oracle_linear(normed, p["mlp"]["gate_proj"])
        up = oracle_linear(normed, p["mlp"]["up_proj"])
        x = x + oracle_linear(up * gate / (1 + np.exp(-gate)), p["mlp"]["down_proj"])
    x = oracle_norm(x, params["final_norm"]["scale"], model.norm_eps)
    if model.tied:
        return x @ params["embed"]["embedding"].T
    return x @ params["head"]["kernel"]


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_pass_equals_the_oracle(name):
    model, tokens = VARIANTS[name], tokens_of()
    params = params_of(model)
    logits = apply(model, params, tokens)
    assert logits.dtype == jnp.float32
    for row, text in zip(logits, tokens, strict=True):
        np.testing.assert_allclose(row, oracle_logits(model, params, text), atol=5e-5)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_rope_scaling_equals_the_formulas_at_real_sizes(name):
    scaling = VARIANTS[name].rope_scaling
    model = TINY.clone(head_size=64, rope_theta=5e5, rope_scaling=scaling)
    speeds, factor = rope_frequencies(64, 5e5, scaling)
    expected, expected_factor = oracle_speeds(model)
    np.testing.assert_allclose(speeds, expected, rtol=1e-12)
    assert factor == pytest.approx(expected_factor)
    plain, _ = rope_frequencies(64, 5e5)
    assert speeds[-1] == pytest.approx(plain[-1] / dict(scaling)["factor"])


def test_yarn_factor_from_mscale_or_given():
    both = (("mscale", 1.0), ("mscale_all_dim", 0.5))
    _, factor = rope_frequencies(8, 1e4, YARN + both)
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert factor == pytest.approx(expected)
    assert rope_frequencies(8, 1e4, (*YARN, ("attention_factor", 1.5)))[1] == 1.5


def test_rope_errors_name_the_kind_and_the_key():
    with pytest.raises(ValueError, match=r"'dynamic'.*'yarn'"):
        rope_frequencies(8, 1e4, (("rope_type", "dynamic"),))
    with pytest.raises(ValueError, match=r"'llama3' lacks .'high_freq_factor'"):
        rope_frequencies(8, 1e4, tuple(x for x in LLAMA3 if "high" not in x[0]))
    with pytest.raises(ValueError, match="head_size is 7"):
        rope_frequencies(7, 1e4)


@pytest.mark.parametrize("name", ["llama", "mistral", "per_layer"])
def test_cached_decoding_equals_the_full_pass(name):
    model, tokens = VARIANTS[name], tokens_of()
    params = params_of(model)
    full = apply(model, params, tokens)
    cache = model.init_cache(2, 12)
    first, cache = apply(model, params, tokens[:, :4], cache=cache)
    parts = [first]
    for t in range(4, 10):
        logits, cache = apply(model, params, tokens[:, t : t + 1], cache=cache)
        parts.append(logits)
    assert int(cache["index"]) == 10
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=2e-5)


def test_scan_equals_loop():
    looped, tokens = TINY.clone(sow_intermediates=True), tokens_of()
    scanned = looped.clone(scan=True)
    params = params_of(looped)
    stacked = stack_layers(params)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    full, sown = apply(looped, params, tokens, mutable="intermediates")
    same, also = apply(scanned, stacked, tokens, mutable="intermediates")
    np.testing.assert_allclose(same, full, atol=2e-5)
    sown, also = sown["intermediates"], also["intermediates"]
    for i in range(2):
        one = sown[f"layer_{i}"]["attention"]["attention"][0]
        other = also["layers"]["attention"]["attention"][0][i]
        np.testing.assert_allclose(one, other, atol=1e-5)
    logits, cache = apply(
        scanned, stacked, tokens[:, :7], cache=scanned.init_cache(2, 12)
    )
    rest, cache = apply(scanned, stacked, tokens[:, 7:], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([logits, rest], 1), full, atol=2e-5)
    assert int(cache["index"]) == 10


def test_stacking_layers_and_back_is_exact():
    params = params_of(TINY)
    back = unstack_layers(stack_layers(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert largest_difference(back, params) == 0
    stacked = stack_layers(params)["layers"]
    assert stacked["mlp"]["up_proj"]["kernel"].shape == (2, 16, 24)


def test_stacking_errors():
    with pytest.raises(ValueError, match="layer_1 differs from layer_0"):
        stack_layers(params_of(VARIANTS["per_layer"]))
    with pytest.raises(ValueError, match="no layer_0"):
        stack_layers(stack_layers(params_of(TINY)))
    with pytest.raises(ValueError, match="no layers"):
        unstack_layers(params_of(TINY))


def test_remat_changes_nothing_but_memory():
    tokens = tokens_of()
    params = params_of(TINY)

    def gradients(model, params):
        def loss(params):
            return (apply(model, params, tokens) ** 2).mean()

        return jax.jit(jax.grad(loss))(params)

    plain = gradients(TINY, params)
    assert largest_difference(gradients(TINY.clone(remat=True), params), plain) < 1e-5
    scanned = gradients(TINY.clone(scan=True, remat=True), stack_layers(params))
    assert largest_difference(unstack_layers(scanned), plain) < 1e-5


def test_sown_maps_and_hidden_states():
    model, tokens = TINY.clone(sow_intermediates=True), tokens_of()
    _, sown = apply(model, params_of(model), tokens, mutable="intermediates")
    sown = sown["intermediates"]
    assert sown["hidden"][0].shape == (2, 10, 16)
    for i in range(2):
        assert sown[f"layer_{i}"]["hidden"][0].shape == (2, 10, 16)
        (maps,) = sown[f"layer_{i}"]["attention"]["attention"]
        assert maps.shape == (2, 4, 10, 10)
        np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)
        assert jnp.abs(jnp.triu(maps, 1)).max() == 0
    params = params_of(TINY)
    _, none = apply(TINY, params, tokens, mutable="intermediates")
    assert not none


def test_padding_on_either_side_changes_nothing():
    tokens, params = tokens_of(), params_of(TINY)
    full = apply(TINY, params, tokens)
    padding = jnp.full((2, 3), 39, jnp.int32)
    real, none = jnp.ones((2, 10), bool), jnp.zeros((2, 3), bool)
    right = apply(
        TINY,
        params,
        jnp.concatenate([tokens, padding], 1),
        mask=jnp.concatenate([real, none], 1),
    )
    np.testing.assert_allclose(right[:, :10], full, atol=2e-5)
    positions = jnp.broadcast_to(jnp.maximum(jnp.arange(13) - 3, 0), (2, 13))
    left = apply(
        TINY,
        params,
        jnp.concatenate([padding, tokens], 1),
        positions=positions,
        mask=jnp.concatenate([none, real], 1),
    )
    np.testing.assert_allclose(left[:, 3:], full, atol=2e-5)
    assert np.isfinite(left).all()


def test_bfloat16_computes_near_float32():
    tokens, params = tokens_of(), params_of(TINY)
    full = apply(TINY, params, tokens)
    half = TINY.clone(dtype=jnp.bfloat16)
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = apply(half, small, tokens)
    assert logits.dtype == jnp.float32
    assert half.init_cache(1, 4)["layer_0"]["key"].dtype == jnp.bfloat16
    assert 0 < jnp.abs(logits - full).max() < 0.1 * jnp.abs(full).max()


def test_settings_that_do_not_fit_are_errors():
    tokens = tokens_of()

    def init(**changes):
        jax.eval_shape(TINY.clone(**changes).init, jax.random.key(0), tokens)

    with pytest.raises(ValueError, match="heads has 3 entries for 2 layers"):
        init(heads=(4, 4, 4))
    with pytest.raises(ValueError, match="layer_0: 4 heads cannot share 3"):
        init(kv_heads=3)
    with pytest.raises(ValueError, match="use scan=False"):
        init(scan=True, mlp_width=(8, 16))
    init(scan=True, mlp_width=(8, 8))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\).*\(2, 10\)"):
        apply(TINY, params_of(TINY), tokens, mask=jnp.ones((2, 3), bool))


# Generation


@dataclasses.dataclass
class Letters:
    """A tokenizer of lower-case letters: id 3 is "a"; 1 begins and 2 ends a text."""

    vocab_size: int = 40
    bos_id: int | None = 1
    eos_id: int | None = None

    @property
    def end_ids(self):
        return () if self.eos_id is None else (self.eos_id,)

    def encode(self, text):
        return [ord(letter) - 94 for letter in text]

    def decode(self, ids):
        return "".join(chr(i + 94) for i in ids if i > 2)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_greedy_generation_equals_a_loop_of_full_passes(scan):
    model = TINY.clone(scan=scan)
    params = params_of(TINY, seed=3)
    ids = [1, *Letters().encode("hello")]
    for count in range(6, 12):
        padded = jnp.array([ids + [0] * (12 - count)])  # what comes later is not seen
        logits = apply(TINY, params, padded)
        ids.append(int(logits[0, count - 1].argmax()))
    expected = Letters().decode(ids[6:])
    params = stack_layers(params) if scan else params
    written = generate(model, params, Letters(), "hello", max_tokens=6)
    assert written == expected
    assert len(set(written)) > 1, "a model that repeats itself tests little"


def test_generation_stops_at_the_end_mark():
    params = params_of(TINY, seed=3)
    whole = generate(TINY, params, Letters(), "hello", max_tokens=6)
    end = Letters().encode(whole[3])[0]
    cut = generate(TINY, params, Letters(eos_id=end), "hello", max_tokens=6)
    assert cut == whole[: whole.index(whole[3])]


def test_generation_compiles_once_for_similar_lengths():
    params, key = params_of(TINY), jax.random.key(0)
    before = _step._cache_size()
    generate(TINY, params, Letters(), "one", max_tokens=4)
    compiled = _step._cache_size() - before
    assert compiled <= 2  # the prompt and the steps
    generate(TINY, params, Letters(), "another", max_tokens=9)
    assert _step._cache_size() - before == compiled
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "key": key}
    generate(TINY, params, Letters(), "one", max_tokens=4, **options)
    compiled = _step._cache_size()
    options = {"temperature": 0.9, "top_p": 0.5, "key": key}
    generate(TINY, params, Letters(), "another", max_tokens=9, **options)
    assert _step._cache_size() == compiled


def test_sampling_repeats_with_its_key():
    params = params_of(TINY)

    def write(seed):
        key = jax.random.key(seed)
        return generate(
            TINY, params, Letters(), "x", max_tokens=8, temperature=1.5, key=key
        )

    assert write(0) == write(0)
    assert write(0) != write(1)


def test_sampling_follows_temperature_top_k_and_top_p():
    chances = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
    logits = jnp.log(jnp.asarray(chances, jnp.float32))
    draw = jax.jit(jax.vmap(sample, (None, 0, None, None, None)))
    keys = jax.random.split(jax.random.key(0), 20_000)

    def frequencies(temperature, top_k=5, top_p=1.0):
        drawn = draw(logits, keys, temperature, top_k, top_p)
        return np.bincount(drawn, minlength=5) / len(keys)

    def expected(kept, power=1.0):
        weights = np.where(np.isin(np.arange(5), kept), chances**power, 0)
        return weights / weights.sum()

    close = {"atol": 0.015}
    np.testing.assert_allclose(frequencies(1.0), chances, **close)
    np.testing.assert_allclose(frequencies(0.5), expected(range(5), 2), **close)
    np.testing.assert_allclose(frequencies(1.0, top_k=2), expected([1, 2]), **close)
    np.testing.assert_allclose(frequencies(1.0, 5, 0.7), expected([1, 2, 3]), **close)
    # top-p counts what top-k left: 0.4 and 0.25 of 0.85 are 0.76
    np.testing.assert_allclose(frequencies(1.0, 3, 0.7), expected([1, 2]), **close)
    np.testing.assert_allclose(frequencies(0.0), [0, 1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(1.0, 5, 1e-6), [0, 1, 0, 0, 0])


@pytest.mark.slow
def test_generation_with_a_trained_tokenizer():
    tokenizer = tokenization.train(
        ["some words, some more words\n" * 9], vocab_size=275
    )
    model = TINY.clone(vocab_size=tokenizer.vocab_size)
    params = params_of(model)
    written = generate(model, params, tokenizer, "some ▁", max_tokens=5)
    assert isinstance(written, str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 1.0}, "needs a key"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_generation_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        generate(TINY, {}, Letters(), "x", **options)


def test_an_empty_prompt_needs_a_begin_mark():
    with pytest.raises(ValueError, match="empty"):
        generate(TINY, {}, Letters(bos_id=None), "")

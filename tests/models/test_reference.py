"""Quality on the trained reference model: held-out text, never random weights."""

import contextlib
import hashlib
import lzma
from importlib import resources

import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.evaluation import Apply, divergence, windows
from jaxcompress.models.bundled_text import heldout_text
from jaxcompress.tree.paths import entries

HELDOUT_SHA256 = "1b43338678fff55e110b0793364566110064094350ede6e62cd331e017e6082e"
LENGTH, BATCH = 256, 4
KERNELS, MLP = r"layers/.*kernel", r"layers/mlp/.*kernel"


@pytest.fixture(scope="module")
def reference():
    """Scanned model, its parameters, layouts, and windows of text to measure on."""
    model, params, tokenizer = jc.models.load("reference", scan=True)
    text = heldout_text()
    ids = tokenizer.encode(text[len(text) // 2 :])
    batches = list(
        windows(ids, LENGTH, BATCH, token_bytes=tokenizer.token_bytes(ids), limit=24)
    )
    layout = jc.find_layouts(model, params, batches[0]["tokens"])
    return model, params, tokenizer, layout, batches


@pytest.fixture(scope="module")
def moments(reference):
    """From the first half of the held-out text, which nothing here is measured on."""
    model, params, tokenizer, _, _ = reference
    text = heldout_text()
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
            small = jc.compress(params, rules, moments, layouts=layout)
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


@pytest.mark.slow
def test_it_predicts_held_out_text_far_better_than_xz(reference):
    model, params, _, _, batches = reference
    report = jc.compare(Apply(model), params, params, batches)
    text = heldout_text().encode()
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert report.kl == 0
    assert report.dense.bits_per_byte < 0.75 * xz


@pytest.mark.slow
def test_every_bit_counts(kl):
    costs = [kl(f"symmetric(bits={bits}, block=64, search=True)") for bits in (8, 4, 3)]
    costs.append(kl("symmetric(bits=2, block=64, search=True, full_range=True)"))
    assert costs[0] < 1e-3
    assert costs == sorted(costs)
    # A bit multiplies the squared error by four, and the KL by about as much.
    assert 2.5 < costs[2] / costs[1] < 8


@pytest.mark.slow
def test_full_range_helps_at_two_bits(kl):
    plain = kl("symmetric(bits=2, block=64, search=True)")
    assert kl("symmetric(bits=2, block=64, search=True, full_range=True)") < plain


@pytest.mark.slow
def test_data_helps(kl, moments):
    nearest = kl("symmetric(bits=3, block=64, search=True)")
    fed = kl("gptq(bits=3, block=64)", moments)
    learned = kl("learned(bits=3, block=64, steps=40)", moments)
    assert fed < 0.8 * nearest
    assert learned < fed


@pytest.mark.slow
def test_rates_beat_widths_at_equal_bytes(reference, kl, moments):
    """Coded levels against packed codes; the file's bytes, scales included."""
    _, params, _, layout, _ = reference
    packed = "gptq(bits=3, block=64)"
    small = jc.compress(params, [(KERNELS, packed)], moments, layouts=layout)
    weights = sum(x.size for x in params["layers"]["mlp"].values() for x in x.values())
    weights += sum(
        x.size for x in params["layers"]["attention"].values() for x in x.values()
    )
    before = jc.nbytes(params["layers"]) - jc.nbytes(small["layers"])
    rate = 32 - 8 * before / weights
    assert 3.2 < rate < 3.3
    coded = kl(f"rate_distortion(rate={rate}, states=8)", moments)
    fed = kl(packed, moments)
    assert coded < 0.5 * fed
    assert fed < kl("symmetric(bits=3, block=64, search=True)")


@pytest.mark.slow
def test_rounding_that_knows_of_outliers(kl, moments):
    nearest = kl("asymmetric(bits=3, block=64)", where=MLP)
    assert kl("hqq(bits=3, block=64)", where=MLP) < 0.97 * nearest
    assert kl("awq(bits=3, block=64)", moments, where=MLP) < 0.97 * nearest


@pytest.mark.slow
def test_number_formats(kl):
    assert kl("nf4(block=64)") < 0.9 * kl("symmetric(bits=4, block=64)")
    four = kl("nvfp4(search=True)")
    assert four < 0.7 * kl("mxfp4(search=True)")
    assert kl("fp8()") < 0.1 * four


@pytest.mark.slow
def test_block_by_block(reference, kl, moments):
    model, params, tokenizer, _, batches = reference
    ids = np.array(tokenizer.encode(heldout_text()[:60_000])[: 16 * LENGTH])
    small = jc.compress_blockwise(
        model, params, [(MLP, "gptq(bits=3, block=64)")], list(ids.reshape(-1, 8, 256))
    )
    dense = jax.jit(jc.materialize)(small)
    found = jc.compare(Apply(model), params, dense, batches).kl
    assert found < 0.8 * kl("symmetric(bits=3, block=64, search=True)", where=MLP)
    assert found < 1.1 * kl("gptq(bits=3, block=64)", moments, where=MLP)


@pytest.mark.slow
def test_planned_bits_beat_uniform_bits_at_equal_bytes(reference):
    """Sensitivities on the first half of the text, divergence on the second."""
    model, stacked, tokenizer, _, batches = reference
    params = jc.models.unstack_layers(stacked)
    text = heldout_text()
    ids = np.array(tokenizer.encode(text[: len(text) // 2])[: 4 * LENGTH])
    target = jax.jit(Apply(model))(stacked, ids.reshape(4, LENGTH))

    @jax.jit
    def loss(tree, target):
        logits = Apply(model)(jc.models.stack_layers(tree), ids.reshape(4, LENGTH))
        return divergence(target, logits).mean()

    kernels = r"layer_\d+/.*kernel"
    sensitivities = jc.measure_sensitivities(
        lambda tree: loss(tree, target),
        params,
        sizes=(0.15,),
        where=kernels,
        key=jax.random.key(0),
    )
    method = "symmetric(bits={}, block=64, full_range=True)".format
    uniform = jc.compress(params, [(kernels, method(3))])
    names = [name for name in sensitivities]
    held = lambda tree: sum(jc.nbytes(tree[n[:7]]) for n in {n[:7] for n in names})  # noqa: E731
    float_bytes = held(params) - sum(
        x.nbytes for n, x in flat(params) if n in sensitivities
    )
    planned = jc.planning.plan_bits(
        params,
        nbytes=held(uniform) - float_bytes,
        sensitivities=sensitivities,
        candidates=[method(bits) for bits in (2, 3, 4, 5)],
        where=kernels,
    )
    small = jc.compress(params, planned)
    assert held(small) <= held(uniform)
    costs = [
        jc.compare(
            Apply(model),
            stacked,
            jc.models.stack_layers(jax.jit(jc.materialize)(tree)),
            batches,
        ).kl
        for tree in (small, uniform)
    ]
    assert costs[0] < 0.9 * costs[1]


@pytest.mark.slow
@pytest.mark.parametrize("data", [False, True])
def test_a_plan_is_no_worse_than_one_width_for_all(reference, data):
    """At three budgets in bytes, held-out KL, within a standard error."""
    model, stacked, tokenizer, _, batches = reference
    params, moments = jc.models.unstack_layers(stacked), None
    if data:
        looped = model.clone(scan=False)
        text = heldout_text()
        ids = np.array(tokenizer.encode(text[: len(text) // 2])[: 16 * LENGTH])
        seen = [{"tokens": part} for part in ids.reshape(16, 1, LENGTH)]
        moments = jc.collect_moments(looped, params, [one["tokens"] for one in seen])
        moments = jc.measure_curvatures(
            Apply(looped), params, seen, moments, key=jax.random.key(0)
        )

    def measure(recipe):
        small = jc.models.stack_layers(jax.jit(jc.materialize)(recipe))
        return jc.compare(Apply(model), stacked, small, batches[:4])

    width = "symmetric(bits={}, block=64, full_range=True)".format
    for bits in (3, 4, 5):
        uniform = jc.compress(params, width(bits))
        spare = 1.0 if data else 1.06  # without data, equal bytes make equal widths
        budget = int(spare * planned_bytes(params, uniform))
        with contextlib.nullcontext() if data else pytest.warns(match="neither"):
            plan = jc.planning.plan_bits(params, nbytes=budget, moments=moments)
        small = jc.compress(params, plan)
        assert planned_bytes(params, small) <= budget
        found, wanted = measure(small), measure(uniform)
        assert found.kl < wanted.kl + found.kl_standard_error
        if not data:
            with pytest.warns(match="neither"):
                plan = jc.planning.plan_bits(
                    params, nbytes=planned_bytes(params, uniform)
                )
            assert {method for _, method in plan} == {width(bits)}


def planned_bytes(params, small):
    """Bytes of the leaves of a compressed tree that are planned by default."""
    dense = sum(x.nbytes for _, x in flat(params) if x.ndim < 2)
    return jc.nbytes(small) - dense


def flat(params):
    """Names and arrays."""
    return [(entry.name, entry.value) for entry in entries(params)]


@pytest.mark.slow
def test_mixed_channels_beat_uniform_bits_where_there_are_outliers(reference):
    """Some channels are made large by rescaling that leaves the function as it is."""
    model, params, tokenizer, layout, batches = reference
    factors = np.ones(256, np.float32)
    factors[[5, 80, 133, 210]] = 32
    layers = params["layers"]
    norms = {
        "attention_norm": ("attention", ("q_proj", "k_proj", "v_proj")),
        "mlp_norm": ("mlp", ("gate_proj", "up_proj")),
    }
    changed = dict(layers)
    for norm, (part, kernels) in norms.items():
        changed[norm] = {"scale": layers[norm]["scale"] * factors[None]}
        changed[part] = dict(layers[part])
        for name in kernels:
            kernel = layers[part][name]["kernel"] / factors[None, :, None]
            changed[part][name] = {"kernel": kernel}
    rescaled = params | {"layers": changed}
    assert jc.compare(Apply(model), params, rescaled, batches[:1]).kl < 1e-6
    text = heldout_text()
    ids = np.array(tokenizer.encode(text[: len(text) // 2])[: 8 * LENGTH])
    pattern = r"layers/.*(q|k|v|gate|up)_proj/kernel"
    found = jc.collect_moments(
        model, rescaled, ids.reshape(-1, 8, LENGTH), where=pattern
    )
    results = []
    for method in (
        "symmetric(bits=3, block=32)",
        "mixed_channels(bits=3, block=64, fraction=0.02, fine_bits=8)",
    ):
        small = jc.compress(rescaled, [(pattern, method)], found, layouts=layout)
        dense = jax.jit(jc.materialize)(small)
        cost = jc.compare(Apply(model), params, dense, batches).kl
        results.append((jc.nbytes(small), cost))
    (uniform, uniform_cost), (mixed, mixed_cost) = results
    assert mixed <= uniform and mixed_cost < 0.7 * uniform_cost

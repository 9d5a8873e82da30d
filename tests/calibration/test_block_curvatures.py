"""Curvatures by blocks: those of the whole model, resumed, from a file, in a metric."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_for_tests import ROWS, Language

import jaxcompress as jc
from jaxcompress.calibration.activations import Streams
from jaxcompress.calibration.moment_files import in_memory
from jaxcompress.tracing.metric_gradients import find_uses, run_in_metric

KEY = jax.random.key(2)
TOKENS = jax.random.randint(jax.random.key(1), (3, 8), 0, ROWS)
OPTIONS = {"where": ".*(kernel|embedding)", "key": KEY}


def fresh(kind):
    model = Language(kind)
    return model, jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]


def whole(model, params, **options):
    batches = [{"tokens": row[None]} for row in TOKENS]
    where = OPTIONS["where"]
    moments = jc.collect_moments(model, params, batches, where=where)
    apply = lambda params, tokens: model.apply({"params": params}, tokens)  # noqa: E731
    return jc.measure_curvatures(apply, params, batches, moments, **OPTIONS, **options)


def close(a, b):
    assert a.keys() == b.keys()
    for name, one in a.items():
        other = b[name]
        assert one.layout == other.layout, name
        for field in ("count", "mean", "second", "tokens", "curvatures"):
            x, y = getattr(one, field), getattr(other, field)
            assert (x is None) == (y is None), (name, field)
            if x is not None:
                scale = float(np.abs(x).max())
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.filterwarnings("ignore:too few")
@pytest.mark.parametrize(
    "kind", [pytest.param("loop", marks=pytest.mark.slow), "scan_remat"]
)
def test_they_are_those_of_the_whole_model(kind, tmp_path):
    model, params = fresh(kind)
    wanted = whole(model, params)
    batches = [{"tokens": TOKENS[:2]}, {"tokens": TOKENS[2:]}]
    close(wanted, jc.measure_curvatures_blockwise(model, params, batches, **OPTIONS))
    jc.save(tmp_path / "model.safetensors", params)
    found = jc.measure_curvatures_blockwise(
        model, tmp_path / "model.safetensors", batches, **OPTIONS, moments=wanted
    )
    close(wanted, found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:too few")
def test_sequences_take_turns_on_devices(monkeypatch):
    model, params = fresh("scan_remat")
    batches, used = [{"tokens": TOKENS}], set()
    one = jc.measure_curvatures_blockwise(model, params, batches, **OPTIONS)
    run = Streams.run

    def watched(self, *args):
        for result in run(self, *args):
            used.update(x.device for x in jax.tree.leaves(result))
            yield result

    monkeypatch.setattr(Streams, "run", watched)
    two = jc.measure_curvatures_blockwise(
        model, params, batches, devices=jax.devices()[:2], **OPTIONS
    )
    assert used == set(jax.devices()[:2])
    close(one, two)


@pytest.mark.filterwarnings("ignore:too few")
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    model, params = fresh("loop")
    batches = [{"tokens": TOKENS}]

    def run(folder, progress=False):
        return jc.measure_curvatures_blockwise(
            model, params, batches, store=folder, progress=progress, **OPTIONS
        )

    def killed_at(number):
        def stretches(items):
            for i, item in enumerate(items):
                if i == number:
                    raise KeyboardInterrupt
                yield item

        return stretches

    wanted = run(tmp_path / "whole")
    stretches = []
    run(tmp_path / "count", lambda items: stretches.extend(items) or stretches)
    count = len(stretches)
    assert count >= 6 and count % 2 == 0
    for number in (1, count // 2, count // 2 + 1, count - 1):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", killed_at(number))
    found = run(tmp_path / "killed")
    for name, one in wanted.items():
        for x, y in zip(
            jax.tree.leaves(one), jax.tree.leaves(found[name]), strict=True
        ):
            np.testing.assert_array_equal(x, y)
    scaled = {**params, "conv": jax.tree.map(lambda x: 2 * x, params["conv"])}
    for weights, key in ((params, jax.random.key(5)), (scaled, KEY)):
        with pytest.raises(ValueError, match="another run"):
            jc.measure_curvatures_blockwise(
                model,
                weights,
                batches,
                store=tmp_path / "killed",
                **OPTIONS | {"key": key},
            )


def skipping(params, batch):
    """Logits of blocks that all read the first value, and a head that is the table."""
    table = params["embed"]["embedding"]
    first = x = table[batch["tokens"]]
    for i in range(3):
        block = params[f"layers_{i}"]
        x = x + jnp.tanh((x + first * (i + 1)) @ block["up"]["kernel"])
        x = x @ block["down"]["kernel"]
    return x @ table.T


@pytest.mark.filterwarnings("ignore:too few")
def test_a_value_that_many_blocks_read_has_all_their_cotangents():
    keys = jax.random.split(KEY, 7)
    square = [{"kernel": jax.random.normal(k, (8, 8)) / 3} for k in keys]
    params = {
        f"layers_{i}": {"up": square[2 * i], "down": square[2 * i + 1]}
        for i in range(3)
    }
    params["embed"] = {"embedding": jax.random.normal(keys[6], (ROWS, 8))}
    batches = [{"tokens": TOKENS}]
    moments = jc.collect_moments(skipping, params, batches, where=OPTIONS["where"])
    apply = lambda params, tokens: skipping(params, {"tokens": tokens})  # noqa: E731
    wanted = jc.measure_curvatures(apply, params, batches, moments, **OPTIONS)
    options = OPTIONS | {"blocks": r"layers_\d+"}
    close(wanted, jc.measure_curvatures_blockwise(skipping, params, batches, **options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:too few")
def test_moments_on_disk_serve_plans_and_methods(tmp_path):
    model, params = fresh("scan_remat")
    batches = [{"tokens": TOKENS}]
    options = OPTIONS | {"where": ".*(up|down)/kernel"}
    found = jc.measure_curvatures_blockwise(
        model, params, batches, store=tmp_path, **options
    )
    assert all(isinstance(x.second, np.memmap) for x in found.values())
    plan = {"where": options["where"], "bits_per_weight": 5.0}
    recipe = jc.planning.plan_rates(params, found, states=0, **plan)
    for moments in found.values():
        read = in_memory(moments).second
        assert type(read) is np.ndarray
        np.testing.assert_array_equal(read, moments.second)
    memory = {
        name: jax.tree.map(jnp.asarray, moments) for name, moments in found.items()
    }
    assert recipe == jc.planning.plan_rates(params, memory, states=0, **plan)
    gptq = [(options["where"], "gptq(bits=4)")]
    one, other = (jc.compress(params, gptq, x) for x in (found, memory))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.filterwarnings("ignore:too few")
def test_padding_does_not_count():
    model, params = fresh("loop")

    def apply(params, batch):
        return model.apply({"params": params}, batch["tokens"])

    options = OPTIONS | {"where": ".*up/kernel"}
    mask = jnp.ones_like(TOKENS).at[1:].set(0)
    masked = [{"tokens": TOKENS, "mask": mask}]
    found = jc.measure_curvatures_blockwise(apply, params, masked, **options)
    first = [{"tokens": TOKENS[:1]}]
    close(jc.measure_curvatures_blockwise(apply, params, first, **options), found)


def test_what_has_no_logits_is_told():
    def pooled(params, batch):
        x = params["layers_0"]["kernel"][batch["tokens"]]
        return x.mean(axis=1)

    params = {"layers_0": {"kernel": jnp.ones((ROWS, 4))}}
    with pytest.raises(ValueError, match="logits"):
        jc.measure_curvatures_blockwise(pooled, params, [{"tokens": TOKENS}], **OPTIONS)
    with pytest.raises(ValueError, match="no batches"):
        jc.measure_curvatures_blockwise(pooled, params, [], **OPTIONS)


def test_gradients_in_a_metric_are_factors_times_gradients():
    keys = iter(jax.random.split(KEY, 12))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    shapes = {"q": (8, 2, 3), "o": (2, 3, 8), "d": (5, 8), "twice": (8, 4)}
    weights = {name: draw(*shape) for name, shape in shapes.items()}
    weights["looked"], weights["own"] = draw(6, 8), draw(3, 2)
    inputs = {"q": 8, "o": 6, "d": 8, "twice": 8}
    factors = {name: draw(size, size) for name, size in inputs.items()}

    @jax.custom_jvp
    def own(x):
        return x

    own.defjvp(lambda x, dx: (own(*x), 3 * dx[0]))

    def function(w, x):
        q = jnp.einsum(
            "btd,dhk->bthk", x + w["looked"][None, :4], jnp.bfloat16(1) * w["q"]
        )
        q = q + own(w["own"]).reshape(2, 3)[None, None]
        o = jax.nn.relu(jnp.einsum("bthk,hkd->btd", jnp.tanh(q), w["o"]))
        both = (x @ w["twice"]).sum() + (jnp.sin(x) @ w["twice"]).var()
        return ((o @ w["d"].T) ** 2).sum() + both + (o @ w["looked"].T).std()

    x = draw(2, 4, 8)
    uses = find_uses(function, weights, x)
    assert uses.plain == set(inputs)
    plain = jax.grad(function)(weights, x)
    found = jax.jit(jax.grad(lambda w: run_in_metric(function, w, x, factors)))(weights)
    for name, size in inputs.items():
        matrix = {"d": lambda g: g.T}.get(name, lambda g, n=size: g.reshape(n, -1))
        wanted = factors[name] @ matrix(plain[name])
        np.testing.assert_allclose(matrix(found[name]), wanted, rtol=1e-4, atol=1e-4)
    for name in ("looked", "own"):
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_those_of_the_reference_model(scan):
    model, params, tokenizer = jc.models.load("reference", scan=scan)
    ids = tokenizer.encode("def read(path):\n    with open(path) as file:\n" * 8)
    batches = [{"tokens": np.array(ids[:64]).reshape(2, 32)}]
    apply = lambda params, tokens: model.apply({"params": params}, tokens)  # noqa: E731
    with pytest.warns(UserWarning, match="too few"):
        moments = jc.collect_moments(model, params, batches)
    wanted = jc.measure_curvatures(apply, params, batches, moments, key=KEY)
    close(
        wanted,
        jc.measure_curvatures_blockwise(
            model, params, batches, moments=moments, key=KEY
        ),
    )

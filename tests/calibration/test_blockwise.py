"""Block by block: cut from the traced program, against moments collected whole."""

import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibration.test_moments import (
    assert_same,
    check,
    dense_inputs,
    make_params,
    random,
)
from models_for_tests import Language

import jaxcompress as jc
from jaxcompress.calibration import blockwise
from jaxcompress.calibration.block_moments import group_by_input
from jaxcompress.calibration.moments import Moments
from jaxcompress.storage.stored_params import StoredParams
from jaxcompress.tracing.block_names import find_blocks, guess_blocks
from jaxcompress.tracing.blocks import cut
from jaxcompress.tracing.layouts import flat_weights, model_function
from jaxcompress.tree.paths import entries

KERNELS = r".*kernel"


def seen(record):
    """A method that notes the moments it gets, and keeps the weight as it is."""

    def note(x, moments=None):
        record.append((x.shape, moments))
        return x

    return note


def nudged(x, moments=None):
    """A visible change, as compression makes one."""
    del moments
    return x * 1.25 + 0.01


class Stream(nn.Module):
    """Embed, blocks (looped, scanned, remat), a head: its inputs are easy to see."""

    kind: str = "loop"
    layers: int = 3

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        block = nn.remat(StreamBlock) if "remat" in self.kind else StreamBlock
        if "scan" in self.kind:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(self.layers):
                x, _ = block(name=f"layer_{i}")(x)
                x = jnp.tanh(2 * x)  # what lies between blocks is run as well
        return nn.Dense(11, name="head")(nn.LayerNorm(name="norm")(x))


class StreamBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(16, name="up")(nn.LayerNorm(name="norm")(x))
        y = x + nn.Dense(8, name="down")(nn.gelu(y))
        return y, None


TOKENS = [np.arange(24).reshape(4, 6) % 11, (np.arange(24).reshape(4, 6) * 7) % 11]


@pytest.fixture(scope="module")
def stream():
    return make_params(Stream(), TOKENS[0])


def stacked(params):
    layers = [params[f"layer_{i}"] for i in range(3)]
    rest = {k: v for k, v in params.items() if not k.startswith("layer_")}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def test_moments_are_those_of_both_models(stream):
    """Original, drifted and cross moments, from inputs seen by interception."""
    model, record = Stream(), []
    rules = [(r"layer_0/(up|down)/kernel", nudged), (KERNELS, seen(record))]
    small = jc.compress_blockwise(model, stream, rules, TOKENS, drift=1)
    assert len(record) == 5  # up and down of two layers, the head
    names = [f"layer_{i}/{n}/kernel" for i in (1, 2) for n in ("up", "down")]
    for name, (_, moments) in zip([*names, "head/kernel"], record, strict=True):
        before = [dense_inputs(model, stream, t)[name] for t in TOKENS]
        behind = [dense_inputs(model, small, t)[name] for t in TOKENS]
        x, y = (np.concatenate(rows).reshape(48, -1) for rows in (before, behind))
        assert np.abs(x - y).max() > 0.01
        check(moments, x)
        x, y = x.astype(np.float64), y.astype(np.float64)
        np.testing.assert_allclose(moments.drifted, y.T @ y / 48, atol=1e-4)
        np.testing.assert_allclose(moments.cross, x.T @ y / 48, atol=1e-4)
    np.testing.assert_array_equal(
        small["layer_0"]["up"]["kernel"], nudged(stream["layer_0"]["up"]["kernel"])
    )
    assert small["norm"]["scale"] is stream["norm"]["scale"]


def test_drift_is_that_behind_the_weights_before_in_the_same_block(stream):
    """Else two weights in a row would make up for the same drift."""
    model, record = Stream(), []
    rules = [(r"layer_0/up/kernel", nudged), (r"layer_0/down/kernel", seen(record))]
    small = jc.compress_blockwise(model, stream, rules, TOKENS, drift=1)
    before, behind = (
        np.concatenate(
            [dense_inputs(model, p, t)["layer_0/down/kernel"] for t in TOKENS]
        ).reshape(48, -1)
        for p in (stream, small)
    )
    ((_, moments),) = record
    assert np.abs(before - behind).max() > 0.01
    np.testing.assert_allclose(moments.second, before.T @ before / 48, atol=1e-4)
    np.testing.assert_allclose(moments.drifted, behind.T @ behind / 48, atol=1e-4)
    np.testing.assert_allclose(moments.cross, before.T @ behind / 48, atol=1e-4)


def test_weights_of_one_input_are_compressed_together():
    """Alike is not enough where others lie between."""
    one, other = (Moments(jnp.ones(()), second=k * jnp.eye(3)) for k in (1, 2))
    known = {"query": one, "value": one, "up": other, "gate": one}
    known["table"] = Moments(jnp.ones(()))
    order = ["table", "query", "unmeasured", "value", "up", "gate"]
    wanted = [{"table"}, {"query", "value"}, {"up"}, {"gate"}]
    assert group_by_input(known, order) == wanted


def test_targets_make_up_for_a_part_of_the_drift(stream):
    """The target is linear in the cross moments, so that they are mixed."""
    records = {0.25: [], 1: []}
    for drift, record in records.items():
        rules = [(r"layer_0/up/kernel", nudged), (r"head/kernel", seen(record))]
        jc.compress_blockwise(Stream(), stream, rules, TOKENS, drift=drift)
    (_, part), (_, whole) = (record[0] for record in records.values())
    assert_same(part.drifted, whole.drifted)
    wanted = 0.75 * whole.drifted + 0.25 * whole.cross
    assert_same(part.cross, wanted, 1e-6)
    assert jnp.abs(whole.cross - whole.drifted).max() > 1e-3
    with pytest.raises(ValueError, match="0 to 1"):
        jc.compress_blockwise(Stream(), stream, rules, TOKENS, drift=2)


def test_without_drift_the_moments_are_those_behind_the_prefix(stream):
    model, record = Stream(), []
    rules = [(r"layer_0/up/kernel", nudged), (r"head/kernel", seen(record))]
    small = jc.compress_blockwise(model, stream, rules, TOKENS)
    rows = [dense_inputs(model, small, t)["head/kernel"] for t in TOKENS]
    check(record[0][1], np.concatenate(rows))
    assert record[0][1].drifted is None


def curved(params, pattern):
    """Curvatures that tell every output of every layer apart, and nothing else."""
    found = {}
    for entry in entries(params):
        if re.fullmatch(pattern, entry.name):
            x = entry.value
            known = np.abs(random(*x.shape[:-2], x.shape[-1], seed=len(found)))
            fields = {
                "curvatures": known,
                "joint_curvatures": known[..., None] * np.eye(x.shape[-1]),
            }
            fields = {k: jnp.asarray(v, jnp.float32) for k, v in fields.items()}
            found[entry.name] = jc.Moments(jnp.zeros(x.shape[:-2]), **fields)
    return found


@pytest.mark.parametrize("kind", ["loop", "scan"])
def test_curvatures_join_the_moments_of_the_blocks(stream, kind):
    params = stacked(stream) if kind == "scan" else stream
    model, record = Stream(kind), []
    known = curved(params, KERNELS)
    rules = [(KERNELS, seen(record))]
    jc.compress_blockwise(model, params, rules, TOKENS, drift=1, moments=known)
    looped = {
        name: known[f"layers/{name[8:]}"].curvatures[int(name[6])]
        if kind == "scan" and name.startswith("layer_")
        else known[name].curvatures
        for name in curved(stream, KERNELS)
    }
    layers = [f"layer_{i}/{n}/kernel" for i in range(3) for n in ("up", "down")]
    for name, (_, moments) in zip([*layers, "head/kernel"], record, strict=True):
        np.testing.assert_array_equal(moments.curvatures, looped[name])
        alone = jnp.diagonal(moments.joint_curvatures)
        np.testing.assert_array_equal(alone, looped[name])
        assert moments.cross is not None
    coded = [(r"head/kernel", jc.rate_distortion(rate=6.0, states=8))]
    plain, finer = (
        jc.compress_blockwise(model, params, coded, TOKENS, moments=m)["head"]["kernel"]
        for m in (None, {"head/kernel": known["head/kernel"]})
    )
    assert not np.asarray(plain.scales).any() and np.asarray(finer.scales).any()
    with pytest.raises(ValueError, match="moments without curvatures"):
        plain = {"head/kernel": jc.Moments(jnp.zeros(()))}
        jc.compress_blockwise(model, params, rules, TOKENS, moments=plain)
    with pytest.raises(ValueError, match="'nowhere', which the tree does not have"):
        known = {"nowhere": known["head/kernel"]}
        jc.compress_blockwise(model, params, rules, TOKENS, moments=known)


@pytest.mark.parametrize("kind", ["scan", "remat", "scan_remat"])
def test_scanned_and_remat_equal_looped(stream, kind):
    class Plain(Stream):  # the scanned model has nothing between its blocks
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 8, name="embed")(tokens)
            for i in range(3):
                x, _ = StreamBlock(name=f"layer_{i}")(x)
            return nn.Dense(11, name="head")(nn.LayerNorm(name="norm")(x))

    rules = [(KERNELS, jc.gptq(bits=3))]
    model = Plain() if "scan" in kind else Stream()
    looped = jc.compress_blockwise(model, stream, rules, TOKENS, drift=0.5)
    params = stacked(stream) if "scan" in kind else stream
    report = []
    small = jc.compress_blockwise(
        Stream(kind), params, rules, TOKENS, drift=0.5, record=report
    )
    wanted = stacked(looped) if "scan" in kind else looped
    assert jax.tree.structure(small) == jax.tree.structure(wanted)
    found, wanted = jc.materialize(small), jc.materialize(wanted)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.mean(np.abs(a - b) > 1e-4) < 0.05  # ties fall either way
    names = [row.name for row in report if row.method]
    first = "layers[0]/down/kernel" if "scan" in kind else "layer_0/down/kernel"
    assert names[0] == first and len(names) == 7
    if "scan" in kind:
        assert small["layers"]["norm"]["scale"] is params["layers"]["norm"]["scale"]
    run = jax.jit(Stream(kind).apply)
    assert np.isfinite(run({"params": small}, TOKENS[0])).all()


def test_equal_blocks_are_compiled_once(monkeypatch):
    compiled = []
    original = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered,
        "compile",
        lambda self, *a, **k: compiled.append(1) or original(self, *a, **k),
    )
    model = Stream(layers=6)
    params = make_params(model, TOKENS[0])
    jc.compress_blockwise(model, params, [(KERNELS, nudged)], TOKENS)
    # Measured and run: what comes first, the first block, the others; the last: once.
    assert len(compiled) <= 7


def test_a_tied_embedding_comes_first_with_all_its_uses():
    model, tokens = Language(layers=2), np.arange(12).reshape(2, 6) % 7
    params, record = make_params(Language(layers=2), tokens), []
    rules = [("embed/embedding", seen(record)), (r"block_0/up/kernel", seen(record))]
    jc.compress_blockwise(model, params, rules, [tokens], drift=1)
    whole = jc.collect_moments(model, params, [tokens], where="embed/embedding")
    assert_same(record[0][1], whole["embed/embedding"])
    assert record[0][0] == (16, 32)  # features are the inputs of an embedding
    assert record[1][1].cross is not None


def test_attention_einsum_and_padding():
    model, tokens = Language(layers=2), np.arange(12).reshape(2, 6) % 7
    params, record = make_params(Language(layers=2), tokens), []
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    batch = {"tokens": tokens, "mask": mask}
    rules = [(r"block_1/.*kernel", seen(record))]
    jc.compress_blockwise(model, params, rules, [batch], drift=1)
    whole = jc.collect_moments(model, params, [batch], where=r"block_1/.*kernel")
    assert len(record) == 7
    shapes = sorted(m.second.shape for _, m in record)
    assert shapes == sorted(m.second.shape for m in whole.values())
    by_mean = {float(jnp.sum(m.second)): m for m in whole.values()}
    for _, moments in record:  # nothing was compressed before: no drift
        key = min(by_mean, key=lambda k: abs(k - float(jnp.sum(moments.second))))
        assert_same(moments.second, by_mean[key].second, 1e-4)
        assert_same(moments.drifted, moments.second)
        assert float(moments.count) == mask.sum()


def test_any_function_of_parameters_and_batch_is_a_model(stream):
    """Jitted as a whole, weights cast beforehand, batches of two shapes."""

    @jax.jit
    def call(params, batch):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        return Stream().apply({"params": params}, batch)

    rules = [(KERNELS, jc.gptq(bits=3))]
    batches = [TOKENS[0], TOKENS[1], TOKENS[0][:2]]
    plain = jc.compress_blockwise(Stream(), stream, rules, batches)
    with pytest.warns(UserWarning, match=r"cannot take .*arithmetic over the tree"):
        jitted = jc.compress_blockwise(call, stream, rules, batches)
    for a, b in zip(*map(jax.tree.leaves, (plain, jitted)), strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) < 0.02


def test_the_corrected_target_pays_where_there_is_drift():
    """Output error on the drifted inputs, against not knowing of the drift."""
    rng = np.random.default_rng(0)
    model, batches = Stream(layers=3), [rng.integers(0, 11, (32, 32)) for _ in range(2)]
    params = make_params(model, batches[0])
    rules = [(r"layer_0/.*kernel", jc.symmetric(bits=2)), (r"head/kernel", None)]
    wide = {"grid": "symmetric", "bits": 8}
    aware = jc.compress_blockwise(
        model, params, [*rules, (KERNELS, jc.gptq(**wide))], batches, drift=1
    )
    blind = jc.compress_blockwise(
        model, params, [*rules, (KERNELS, jc.symmetric(bits=8))], batches
    )
    run = jax.jit(model.apply)

    def error(small):
        change = [
            run({"params": small}, b) - run({"params": params}, b) for b in batches
        ]
        return float(sum(jnp.sum(jnp.square(x)) for x in change))

    assert error(aware) < 0.93 * error(blind)


# From disk, and after a kill.


def test_straight_from_a_file_and_one_block_at_a_time(stream, tmp_path, monkeypatch):
    jc.save(tmp_path / "p.safetensors", {"params": stream, "tokenizer": np.zeros(3)})
    rules = [(KERNELS, jc.gptq(bits=3))]
    reads = []
    read = StoredParams.read
    monkeypatch.setattr(
        StoredParams,
        "read",
        lambda self, name, **k: reads.append(name) or read(self, name, **k),
    )
    small = jc.compress_blockwise(Stream(), tmp_path / "p.safetensors", rules, TOKENS)
    whole = jc.compress_blockwise(Stream(), stream, rules, TOKENS)
    assert jax.tree.structure(small) == jax.tree.structure(whole)
    for a, b in zip(*map(jax.tree.leaves, (small, whole)), strict=True):
        np.testing.assert_array_equal(a, b)
    order = [name.split("/")[1] for name in reads]
    assert order[0] == "embed" and set(order[-4:]) == {"head", "norm"}
    assert order[1:-4] == sorted(order[1:-4])
    assert len(reads) == len(set(reads)) == len(jax.tree.leaves(stream))


@pytest.mark.parametrize("kind", ["ours", "huggingface"])
def test_models_are_compressed_from_disk(kind, tmp_path):
    model, params, tokenizer = jc.models.load("reference")
    model = model.clone(layers=2)
    params = {k: v for k, v in params.items() if k[-1:] not in "2345"}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    path = tmp_path / "model.safetensors"
    if kind == "ours":
        jc.models.save(path, model, params, tokenizer)
    else:
        path = tmp_path
        jc.export.huggingface(path, model, params, tokenizer)
    tokens = np.arange(400).reshape(2, 200) % 2048
    rules = [(".*down_proj/kernel", jc.gptq(bits=3, block=64))]
    found, weights, _ = jc.models.open_weights(path)
    if kind == "ours":
        with weights:
            small = jc.compress_blockwise(found, weights, rules, [tokens])
    else:
        small = jc.compress_blockwise(found, weights, rules, [tokens])
    whole = jc.compress_blockwise(model, params, rules, [tokens])
    assert jax.tree.structure(small) == jax.tree.structure(whole)
    for a, b in zip(*map(jax.tree.leaves, (small, whole)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["loop", "scan"])
def test_a_killed_run_goes_on_to_the_same_bytes(stream, kind, tmp_path):
    params = stacked(stream) if kind == "scan" else stream
    calls = []

    def rounded(x, moments=None, *, limit=99):
        if len(calls) >= limit:
            raise Killed
        calls.append(x.shape)
        return jc.symmetric(x, bits=3)

    def run(store, limit):
        calls.clear()
        rounded.__defaults__, rounded.__kwdefaults__ = (None,), {"limit": limit}
        rules = [(r".*(up|down|head)/kernel", rounded)]
        return jc.compress_blockwise(
            Stream(kind), params, rules, TOKENS, drift=0.5, store=store
        )

    jc.save(tmp_path / "a", run(None, 99))
    total = len(calls)
    with pytest.raises(Killed):
        run(tmp_path / "store", 3)
    files = sorted(p.name for p in (tmp_path / "store").iterdir())
    assert files == ["part-0000.safetensors", "part-0001.safetensors"]
    jc.save(tmp_path / "b", run(tmp_path / "store", 99))
    assert len(calls) == total - 2  # the first block was not done again
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    run(tmp_path / "store", 99)
    assert not calls
    with pytest.raises(ValueError, match=r"another run .* the model, recipe, options"):
        jc.compress_blockwise(
            Stream(kind),
            params,
            [(KERNELS, nudged)],
            TOKENS,
            drift=0.5,
            store=tmp_path / "store",
        )
    params = jax.tree.map(lambda x: 2 * x, params)
    with pytest.raises(ValueError, match="another run"):
        run(tmp_path / "store", 99)


def test_progress_says_errors_and_the_time_left(stream, capsys):
    jc.compress_blockwise(
        Stream(), stream, [(KERNELS, jc.gptq(bits=3))], TOKENS[:1], progress=True
    )
    text = capsys.readouterr().err
    assert re.search(r"layer_1 \(3 of 5, \d+:\d\d left\): output errors down/", text)


def test_reports_say_why_a_leaf_is_left_alone(stream):
    rules = [("head/kernel", None), (KERNELS, jc.symmetric(bits=8))]
    report = []
    jc.compress_blockwise(Stream(), stream, rules, TOKENS[:1], record=report)
    rows = {row.name: row for row in report}
    assert rows.keys() == set(jc.leaf_names(stream))
    assert rows["head/kernel"].reason == "kept by the rule 'head/kernel'"
    assert rows["embed/embedding"].reason == "no rule matches it"
    error = rows["layer_0/up/kernel"].output_error
    x = np.concatenate([dense_inputs(Stream(), stream, TOKENS[0])["layer_0/up/kernel"]])
    old = stream["layer_0"]["up"]["kernel"]
    new = jc.symmetric(old, bits=8).materialize()
    x = x.reshape(-1, 8).astype(np.float64)
    wanted = np.linalg.norm(x @ np.asarray(new - old)) / np.linalg.norm(x @ old)
    assert error == pytest.approx(wanted, rel=1e-3)


def test_later_stages_of_a_chain_see_the_names_that_earlier_ones_left():
    model = Stream(layers=2)
    params = make_params(model, TOKENS[0])
    record = []
    jc.compress_blockwise(model, params, [("layer_1/up/kernel", seen(record))], TOKENS)
    with pytest.raises(ValueError, match="takes no leaf of this tree by default"):
        jc.compress_blockwise(model, params, jc.gptq(bits=4), TOKENS)
    chained = jc.chain(
        [("layer_1/up/kernel", jc.gptq(bits=3)), (KERNELS, None)],
        [(r".*kernel/scale", nudged)],
    )
    small = jc.compress_blockwise(model, params, chained, TOKENS)
    once = jc.gptq(params["layer_1"]["up"]["kernel"], record[0][1], bits=3)
    np.testing.assert_array_equal(
        small["layer_1"]["up"]["kernel"].scale, nudged(once.scale)
    )


# Bad input.


def test_blocks_that_cannot_be_found_or_cut(stream):
    rules = [(KERNELS, nudged)]
    with pytest.raises(
        ValueError, match=r"'blocks_.*'.* the model has embed, head, lay"
    ):
        jc.compress_blockwise(Stream(), stream, rules, TOKENS, blocks=r"blocks_\d+")

    def twice(params, batch):
        x = batch
        for name in ("layer_0", "layer_1", "layer_0"):
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    params = {f"layer_{i}": {"kernel": jnp.eye(4)} for i in range(2)}
    with pytest.raises(
        ValueError, match="layer_0 and layer_1 do not follow one another"
    ):
        jc.compress_blockwise(twice, params, rules, [random(3, 4)], blocks=r"layer_\d")
    record = []
    jc.compress_blockwise(twice, params, [(KERNELS, seen(record))], [random(3, 4)])
    # No block: the first, used twice, has moments of both uses.
    assert [float(moments.count) for _, moments in record] == [6, 3]


def test_weights_in_a_loop_inside_a_block():
    def model(params, batch):
        def turn(x, _):
            return jnp.tanh(x @ params["layer_0"]["kernel"]), None

        return jax.lax.scan(turn, batch, length=3)[0] @ params["layer_1"]["kernel"]

    params = {f"layer_{i}": {"kernel": jnp.eye(4)} for i in range(2)}
    record, rules = [], [(r"layer_0/kernel", nudged)]
    with pytest.raises(ValueError, match=r"in a loop .*drift=0"):
        jc.compress_blockwise(model, params, rules, [random(3, 4)], drift=1)
    rules = [(r"layer_0/kernel", seen(record))]
    jc.compress_blockwise(model, params, rules, [random(3, 4)])
    assert float(record[0][1].count) == 9


def test_nan_in_activations_names_the_block(stream):
    broken = jax.tree.map(lambda x: x, stream)
    broken["layer_1"]["norm"] = jax.tree.map(lambda x: x * jnp.nan, stream["norm"])
    rules = [(KERNELS, jc.gptq(bits=3))]
    with pytest.raises(ValueError, match=r"layer_1: layer_1/.*NaN or infinite"):
        jc.compress_blockwise(Stream(), broken, rules, TOKENS)


def test_too_few_tokens_say_how_many_are_needed(stream):
    rules = [(KERNELS, jc.gptq(bits=3))]
    few = "layer_0/down/kernel has 16 inputs and saw 4 tokens. .*needs 16 .* 160 to be"
    with pytest.warns(UserWarning, match=few):
        jc.compress_blockwise(Stream(), stream, rules, [TOKENS[0][:1, :4]])
    with pytest.warns(UserWarning, match=few):
        jc.collect_moments(Stream(), stream, [TOKENS[0][:1, :4]], where=KERNELS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: ([("nope", nudged)], TOKENS), ValueError, "'nope' matches no leaf"),
        (lambda p: ([(KERNELS, nudged)], []), ValueError, "there are no batches"),
        (lambda p: ([(KERNELS, nudged)], {"x": 1}), TypeError, "one dict"),
    ],
)
def test_errors_say_what_to_do(stream, call, error, message):
    recipe, batches = call(stream)
    with pytest.raises(error, match=message):
        jc.compress_blockwise(Stream(), stream, recipe, batches)


def test_layers_that_do_not_stack(stream):
    def uneven(x, moments=None):
        return jc.symmetric(x, bits=2 if float(x[0, 0]) > 0 else 3)

    rules = [(r"layers/up/kernel", uneven)]
    signs = jnp.array([1.0, -1.0, 1.0])
    params = stacked(stream)
    kernel = jnp.abs(params["layers"]["up"]["kernel"]) * signs[:, None, None]
    params["layers"]["up"]["kernel"] = kernel
    with pytest.raises(
        ValueError, match=r"layers/up/kernel: its layers .* cannot be sta"
    ):
        jc.compress_blockwise(Stream("scan"), params, rules, TOKENS)


# Cutting.


BY_NAME = {  # kernels of a model, and the paths of its blocks
    "numbers": (["embed", "h_0/a", "h_1/a", "head"], ["h_0", "h_1"]),
    "flax": (["TransformerBlock_0/Dense_0", "TransformerBlock_1/Dense_0"], None),
    "lists": (["blocks/0/mlp/1", "blocks/1/mlp/0", "norm"], ["blocks/0", "blocks/1"]),
    "dots": (["blocks.0/a/q", "blocks.1/a/q"], ["blocks.0", "blocks.1"]),
    "outermost": (["e/block/0/layer/0/q", "e/block/1/layer/0/q"], None),
    "one family inside one": (["Vit_0/block_0/Dense_0", "Vit_0/block_1/Dense_0"], None),
    "words": (["encoderblock/Dense_0", "head"], ["encoderblock"]),
    "none": (["encoder/fc1", "decoder/fc1"], ["encoder/fc1", "decoder/fc1"]),
    "layers of norms": (["LayerNorm_0", "LayerNorm_1", "layer_0"], ["layer_0"]),
    "statistics": (["params/layer_0/a", "batch_stats/layer_0/a"], ["params/layer_0"]),
}


@pytest.mark.parametrize("case", BY_NAME)
def test_blocks_by_name(case):
    modules, paths = BY_NAME[case]
    found = guess_blocks([f"{module}/kernel" for module in modules])
    if paths is None:  # all but the last module
        paths = [module.rsplit("/", 1)[0] for module in modules]
        paths = ["e/block/0", "e/block/1"] if case == "outermost" else paths
    assert list(found) == paths
    names = ["layers/0/a/kernel", "layers/1/a/kernel", "head/kernel"]
    assert find_blocks(names, r"(.*/)?layers/\d+") == {
        "layers/0": ["a/kernel"],
        "layers/1": ["a/kernel"],
    }


@pytest.mark.parametrize("kind", ["loop", "scan_remat"])
def test_segments_run_one_after_the_other_are_the_model(stream, kind):
    params = stacked(stream) if "scan" in kind else stream
    shapes, rebuild = flat_weights(params)
    function = model_function(Stream(kind))
    run = lambda weights, batch: function(rebuild(weights), batch)  # noqa: E731
    segments, inputs = cut(run, shapes, TOKENS[0], None)
    labels = [s.block.label if s.block else None for s in segments]
    name = "layers[{}]" if "scan" in kind else "layer_{}"
    assert labels == [None, *(name.format(i) for i in range(3)), None]
    # Between blocks only the residual stream is carried on.
    for segment in segments[:-1]:
        assert [v.aval.shape for v in segment.alive] == [(4, 6, 8)]
    held = dict(zip(inputs, [TOKENS[0]], strict=True))
    flat = dict(zip(shapes, jax.tree.leaves(params), strict=True))
    for segment in segments[:-1]:
        weights = {}
        if segment.block:
            path, index = segment.block.path, segment.block.index
            for short in segment.block.names:
                x = flat[f"{path}/{short}"]
                weights[short] = x if index is None else x[index]
        weights |= {f"/{n}": flat[n] for n in segment.outer}
        results = segment(weights, [held[v] for v in segment.reads])
        held |= zip(segment.writes, results, strict=True)
    x = held[next(iter(segments[-2].alive))]
    x = jnp.tanh(2 * x) if kind == "loop" else x

    class Tail(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(11, name="head")(nn.LayerNorm(name="norm")(x))

    rest = {k: params[k] for k in ("head", "norm")}
    found = Tail().apply({"params": rest}, x)
    wanted = Stream(kind).apply({"params": params}, TOKENS[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


# What other people's models have.


class Foreign(nn.Module):
    """Flax's own names, batch statistics, a weight that no layer of Flax reads."""

    rest: bool = False

    @nn.compact
    def __call__(self, inputs, targets):
        x = inputs
        for _ in range(2):
            y = nn.BatchNorm(use_running_average=True)(Inner()(x))
            x = x + nn.tanh(y) * targets
        if self.rest or self.is_initializing():
            x = nn.Dense(64, name="rest")(x)
        return x @ self.param("w_out", nn.initializers.lecun_normal(), (64, 64))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64)(nn.gelu(nn.Dense(64)(x)))


def test_a_model_of_somebody_else_is_compressed_by_default():
    """Batch statistics, inputs called targets, a layer at rest, a weight by trace."""
    batch = {"inputs": random(80, 64), "targets": random(80, 64)}
    variables = jax.jit(Foreign().init)(jax.random.key(0), **batch)
    params = variables.pop("params")
    model, kept = Foreign(), {"w_out": jc.Layout((), (0,), (1,))}
    record = []
    unseen = pytest.warns(UserWarning, match=r"16% of the bytes .*: rest/kernel\.")
    with unseen, pytest.warns(UserWarning, match=r"rest/kernel: not .* without data"):
        small = jc.compress_blockwise(
            model, params, "gptq(bits=4)", [batch], variables=variables,
            layouts=kept, record=record,
        )  # fmt: skip
    methods = {row.name: row.method for row in record if row.method}
    kernels = [f"Inner_{i}/Dense_{j}/kernel" for i in (0, 1) for j in (0, 1)]
    assert methods == dict.fromkeys([*kernels, "w_out"], "gptq(bits=4)") | {
        "rest/kernel": methods["rest/kernel"]
    }
    assert "gptq" not in methods["rest/kernel"]
    (row,) = (row for row in record if row.name == "rest/kernel")
    assert row.reason.startswith("its inputs were not seen")
    want = model.apply({"params": params, **variables}, **batch)
    have = model.apply({"params": small, **variables}, **batch)
    assert jnp.linalg.norm(have - want) < 0.2 * jnp.linalg.norm(want)
    wrong = {"w_out": jc.Layout((), (1,), (0,))}
    with unseen, pytest.raises(ValueError, match="w_out: the layout given"):
        jc.compress_blockwise(
            model, params, "gptq(bits=4)", [batch], variables=variables, layouts=wrong
        )
    with pytest.raises(ValueError, match="'w_in', which the tree does not have"):
        jc.compress_blockwise(
            model, params, "gptq(bits=4)", [batch], layouts={"w_in": kept["w_out"]}
        )


def test_memory_is_returned_after_each_block(monkeypatch):
    returned = []
    monkeypatch.setattr(blockwise, "give_back_memory", lambda **kw: returned.append(kw))
    part = types.SimpleNamespace(reports=(), label="layer_0")
    for number, _ in enumerate(blockwise._shown(iter([part] * 3), 3, False), start=1):
        assert returned == [{"programs": False}] * number

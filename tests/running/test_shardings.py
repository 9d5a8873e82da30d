"""Compressed weights laid over devices: the same logits, cut where weights are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.evaluation import Apply, LanguageModelMetrics, evaluate, windows
from jaxcompress.models import Transformer
from jaxcompress.tree.leaf import is_leaf

MODEL = Transformer(
    vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_size=8, mlp_width=64
)
TOKENS = jnp.arange(24).reshape(4, 6) % 64
CUT = {  # Megatron: outputs of the first product, inputs of the second
    "q_proj": P(None, "model"),
    "k_proj": P(None, "model"),
    "v_proj": P(None, "model"),
    "o_proj": P("model", None),
    "gate_proj": P(None, "model"),
    "up_proj": P(None, "model"),
    "down_proj": P("model", None),
}
RECIPES = {
    "8 bits": [(".*(kernel|embedding)", "symmetric(bits=8)")],
    "4 bits in blocks": [(".*(kernel|embedding)", "asymmetric(bits=4, block=8)")],
    "3 bits": [(".*(q_proj|up_proj)/kernel", "sign_split(bits=(2, 2), block=16)")],
    "low rank": [(".*mlp.*kernel", "svd(rank=4)")],
}


def mesh():
    devices = np.array(jax.devices())
    devices = devices[: 4 if len(devices) >= 4 else 2].reshape(-1, 2)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]


def specs():
    layer = {
        "attention": {n: {"kernel": CUT[n]} for n in CUT if len(n) == 6},
        "mlp": {n: {"kernel": CUT[n]} for n in CUT if len(n) != 6},
    }
    return {f"layer_{i}": layer for i in range(2)} | {
        "embed": {"embedding": P("model", None)}
    }


@pytest.mark.parametrize("name", RECIPES)
def test_an_unmodified_model_runs_in_data_and_tensor_parallel(name, params):
    small = jc.compress(params, RECIPES[name])
    over = mesh()
    placed = jax.device_put(small, jc.shardings(small, over, specs()))
    tokens = jax.device_put(TOKENS, NamedSharding(over, P("data")))
    apply = jax.jit(MODEL.apply)
    want = apply({"params": small}, TOKENS)
    got = apply({"params": placed}, tokens)
    np.testing.assert_allclose(got, want, atol=2e-5)
    cut = [x for x in jax.tree.leaves(placed) if not x.is_fully_replicated]
    assert sum(x.nbytes for x in cut) > 0.8 * jc.nbytes(placed), "weights are cut"
    for x in cut:
        assert x.addressable_shards[0].data.nbytes * 2 == x.nbytes


def test_stacked_layers_are_cut_too(params):
    model = MODEL.clone(scan=True)
    stacked = jc.models.stack_layers(params)
    recipe = [(".*kernel", "symmetric(bits=4, block=8)")]
    layouts = jc.find_layouts(model, stacked, TOKENS)
    small = jc.compress(stacked, recipe, layouts=layouts)
    one = specs()["layer_0"]
    longer = lambda spec: P(None, *spec)  # noqa: E731
    layers = jax.tree.map(longer, one, is_leaf=lambda x: isinstance(x, P))
    placed = jax.device_put(small, jc.shardings(small, mesh(), {"layers": layers}))
    apply = jax.jit(model.apply)
    want = apply({"params": small}, TOKENS)
    np.testing.assert_allclose(apply({"params": placed}, TOKENS), want, atol=2e-5)
    codes = placed["layers"]["mlp"]["down_proj"]["kernel"].codes.packed
    assert codes.sharding.shard_shape(codes.shape) == (2, 16, 32)


def test_cuts_through_blocks_and_bytes_are_refused():
    weight = {"kernel": jnp.ones((24, 8))}
    wanted = {"kernel": P("model", None)}

    def place(recipe):
        return jc.shardings(jc.compress(weight, [("kernel", recipe)]), mesh(), wanted)

    with pytest.raises(ValueError, match=r"24 inputs .* after input 12, inside"):
        place("symmetric(bits=4, block=8)")
    with pytest.raises(ValueError, match="kernel: 24 codes of 3 bits over 2 devices"):
        place("symmetric(bits=3)")
    with pytest.raises(ValueError, match="not cut evenly into 2"):
        jc.shardings({"kernel": jnp.ones((3, 8))}, mesh(), wanted)
    with pytest.raises(ValueError, match="a Sparse cannot be cut"):
        place("magnitude(sparsity=0.9)")
    with pytest.raises(ValueError, match="specs for no weight of the tree: other"):
        jc.shardings(weight, mesh(), {"other": P()})
    with pytest.raises(ValueError, match="for a weight of shape"):
        jc.shardings(weight, mesh(), {"kernel": P(None, None, "model")})


def test_folded_axes_are_cut_along_the_first():
    kernel = {"kernel": jnp.arange(8.0 * 4 * 6).reshape(8, 4, 6)}
    layouts = {"kernel": jc.Layout((), (0,), (1, 2))}
    small = jc.compress(kernel, [("kernel", "symmetric(bits=8)")], layouts=layouts)
    placed = jc.shardings(small, mesh(), {"kernel": P(None, "model", None)})
    assert placed["kernel"].inner.codes.packed.spec == P(None, "model")
    with pytest.raises(ValueError, match=r"kernel: .*folded into another"):
        jc.shardings(small, mesh(), {"kernel": P(None, None, "model")})


def test_what_has_no_spec_is_everywhere(params):
    small = jc.compress(params, [(".*kernel", "symmetric(bits=8)")])
    placed = jc.shardings(small, mesh(), {})
    assert jax.tree.structure(placed) == jax.tree.structure(small)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(placed))
    assert any(map(is_leaf, jax.tree.leaves(placed, is_leaf=is_leaf)))


def test_pmap_evaluates_as_a_mesh_does(params):
    """Copies on each device, examples over a mesh, and weights cut over a mesh."""
    small = jc.compress(params, RECIPES["4 bits in blocks"])
    metrics = LanguageModelMetrics(Apply(MODEL))
    batches = windows(np.arange(60) % 64, 9, 4)
    copied = evaluate(metrics, small, batches)  # pmap over the devices
    over = mesh()
    same = evaluate(metrics, small, batches, mesh=over)
    placed = jax.device_put(small, jc.shardings(small, over, specs()))
    cut = evaluate(metrics, placed, batches, mesh=over)
    for name, value in copied.items():
        assert same[name] == pytest.approx(value, rel=1e-5)
        assert cut[name] == pytest.approx(value, rel=1e-5)


def test_boxes_of_flax_tell_where_a_loaded_tree_lies(tmp_path):
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model, x = nn.Dense(64, kernel_init=init), jnp.ones((4, 64))
    params = model.init(jax.random.key(0), x)["params"]
    jc.save(tmp_path / "a", jc.compress(params, "symmetric(bits=8)"))
    small = jc.load(tmp_path / "a")
    specs = nn.logical_to_mesh(nn.get_partition_spec(small), [("out", "model")])
    placed = jax.device_put(small, jc.shardings(small, mesh(), specs))
    (codes,) = jax.tree.leaves(placed["kernel"].value.codes)
    assert placed["kernel"].names == ("in", "out")
    assert codes.sharding.spec == P(None, "model")
    assert codes.addressable_shards[0].data.shape == (64, 32)
    want = model.apply({"params": small}, x)
    np.testing.assert_allclose(model.apply({"params": placed}, x), want, rtol=1e-5)

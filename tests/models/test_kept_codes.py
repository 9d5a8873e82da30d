"""Foreign codes as `Quantized` leaves: the values of their own readers, exactly."""

import json
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exports_for_tests import MODEL, dense_params, small_params
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, quants

import jaxcompress as jc
from jaxcompress.export import compressed_tensors, gguf
from jaxcompress.models.gguf_blocks import pack_q8_0
from jaxcompress.models.kept_codes import gguf_leaf, symmetric_leaf
from jaxcompress.models.loading import load, open_weights
from jaxcompress.models.packed_words import pack_words
from jaxcompress.tree.paths import roots

WEIGHTS = ".*/(kernel|embedding)"


def rewrite(path, out, kind):
    """The same file with every matrix quantized by the gguf package."""
    reader = GGUFReader(path)
    writer = GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if data.ndim == 2:
            data, stored = quants.quantize(np.array(data), kind), kind
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same(a, b):
    """Leaf by leaf the same classes, static fields and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_codes_have_the_values_of_the_gguf_package(kind, tmp_path):
    gguf(tmp_path / "a.gguf", MODEL, dense_params(), dtype="float32")
    rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", Type[kind])
    _, dense, _ = load(tmp_path / "b.gguf")
    model, kept, _ = load(tmp_path / "b.gguf", keep_quantized=True)
    assert model == MODEL
    bits = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}[kind]
    table, kernel = kept["embed"]["embedding"], kept["layer_0"]["attention"]["k_proj"]
    assert table.inner.bits == kernel["kernel"].bits == bits
    assert jc.nbytes(kept) < (bits + 1.5) / 32 * jc.nbytes(dense)
    for name, value in roots(kept):
        wanted = dict(roots(dense))[name]
        values = jc.materialize(value)
        assert values.dtype == wanted.dtype == jnp.float32
        np.testing.assert_array_equal(values, wanted)
        np.testing.assert_array_equal(jax.jit(jc.materialize)(value), wanted)
    stacked = load(tmp_path / "b.gguf", keep_quantized=True, scan=True)[1]
    up = stacked["layers"]["mlp"]["up_proj"]["kernel"]
    wanted = [dense[f"layer_{i}"]["mlp"]["up_proj"]["kernel"] for i in range(2)]
    np.testing.assert_array_equal(up.materialize(), np.stack(wanted))


@pytest.mark.parametrize("bits", [4, 8])
def test_gguf_round_trip_keeps_every_bit(bits, tmp_path):
    method = f"symmetric(bits={bits}, block=32, scale_dtype='float16')"
    small = small_params(method, WEIGHTS, np.float32)
    gguf(tmp_path / "a.gguf", MODEL, small)
    _, again, _ = load(tmp_path / "a.gguf", keep_quantized=True)
    assert_same(again, small)
    gguf(tmp_path / "b.gguf", MODEL, again)
    files = [(tmp_path / x).read_bytes() for x in ("a.gguf", "b.gguf")]
    assert files[0] == files[1]


def test_gguf_types_without_a_leaf_are_named(tmp_path):
    gguf(tmp_path / "a.gguf", MODEL, dense_params(), dtype="float32")
    rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", Type.Q5_0)
    with pytest.warns(UserWarning, match=r"have no leaf \(15 of Q5_0\)"):
        kept = load(tmp_path / "b.gguf", keep_quantized=True)[1]
    assert isinstance(kept["layer_0"]["mlp"]["up_proj"]["kernel"], jax.Array)


@pytest.mark.parametrize(
    ("method", "activations"),
    [
        ("symmetric(bits=4, block=32)", None),
        ("symmetric(bits=8)", None),
        ("symmetric(bits=8)", "dynamic"),
        ("fp8()", None),
    ],
)
def test_compressed_tensors_round_trip_keeps_every_bit(method, activations, tmp_path):
    small = small_params(method)
    compressed_tensors(tmp_path / "a", MODEL, small, activations=activations)
    with pytest.raises(ValueError, match="keep_quantized=True"):
        load(tmp_path / "a")
    model, again, _ = load(tmp_path / "a", keep_quantized=True)
    assert model == MODEL
    assert_same(again, small)
    _, lazy, _ = open_weights(tmp_path / "a", keep_quantized=True)
    compressed_tensors(tmp_path / "b", MODEL, lazy, activations=activations)
    files = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert files[0] == files[1]


def test_nvfp4_comes_back_to_the_last_place_of_its_divisor(tmp_path):
    small = small_params("nvfp4()")
    compressed_tensors(tmp_path / "a", MODEL, small)
    _, again, _ = load(tmp_path / "a", keep_quantized=True)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    names = [
        jax.tree_util.keystr(x) for x, _ in jax.tree_util.tree_leaves_with_path(small)
    ]
    pairs = zip(names, *map(jax.tree.leaves, (again, small)), strict=True)
    for name, x, y in pairs:
        assert x.dtype == y.dtype
        rtol = 2**-23 if "scale.scale" in name else 0
        np.testing.assert_allclose(x, y, rtol=rtol)
    compressed_tensors(tmp_path / "b", MODEL, again)
    files = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert files[0] == files[1]


def test_mixed_schemes_come_back(tmp_path):
    small = jc.compress(
        dense_params(),
        [
            ("layer_0/attention/.*_proj/kernel", "symmetric(bits=4, block=32)"),
            ("layer_1/mlp/.*/kernel", "fp8()"),
        ],
    )
    compressed_tensors(tmp_path / "a", MODEL, small)
    assert_same(load(tmp_path / "a", keep_quantized=True)[1], small)


def change(directory, **tensors):
    """Replace or add tensors, and give back the configuration to change."""
    from safetensors.numpy import load_file, save_file

    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file)


def test_asymmetric_codes_are_read(tmp_path):
    """(q - zero) scale, zeros packed along outputs, as compressed-tensors has them."""
    small = small_params("symmetric(bits=4, block=32)", dtype=np.float32)
    compressed_tensors(tmp_path / "a", MODEL, small)
    module = "model.layers.0.mlp.up_proj"
    zero = (np.arange(128 * 2) * 5 % 16).astype(np.uint8).reshape(128, 2)  # + 8
    packed = np.ascontiguousarray(pack_words(zero.T, 4).T)
    change(tmp_path / "a", **{f"{module}.weight_zero_point": packed})
    _, again, _ = load(tmp_path / "a", keep_quantized=True)
    leaf = again["layer_0"]["mlp"]["up_proj"]["kernel"]
    old = small["layer_0"]["mlp"]["up_proj"]["kernel"]
    codes = np.asarray(old.codes.materialize(), np.float64)
    scale = np.repeat(np.asarray(old.scale, np.float64), 32, axis=0)
    wanted = (codes - np.repeat(zero.T, 32, axis=0)) * scale
    np.testing.assert_array_equal(leaf.materialize(), wanted)


def test_codes_that_are_not_understood_are_refused(tmp_path):
    small = small_params("symmetric(bits=4, block=32)")

    def refused(match, edit=lambda settings: None, **tensors):
        path = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        compressed_tensors(path, MODEL, small)
        if tensors:
            change(path, **tensors)
        config = json.loads((path / "config.json").read_text())
        edit(config["quantization_config"])
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=match):
            load(path, keep_quantized=True)

    group = "group_0"
    module = "model.layers.0.mlp.up_proj"
    refused("codes of 'awq'", lambda x: x.update(quant_method="awq"))
    refused(
        "of 3 bits", lambda x: x["config_groups"][group]["weights"].update(num_bits=3)
    )
    refused(
        "is marlin-24 of 4 bits",
        lambda x: x["config_groups"][group].update(format="marlin-24"),
    )
    refused(
        "no group of the configuration",
        lambda x: x["config_groups"][group].update(targets=["re:.*q_proj"]),
    )
    refused(
        "inputs in another order",
        **{f"{module}.weight_g_idx": np.zeros(64, np.int32)},
    )
    refused("surplus: odd.weight", **{"odd.weight": np.zeros(4, ml_dtypes.bfloat16)})
    refused(
        r"up_proj.weight holds codes of shape \(128, 32\)",
        **{
            f"{module}.weight_shape": np.array([128, 32]),
            f"{module}.weight_packed": np.zeros((128, 4), np.int32),
            f"{module}.weight_scale": np.ones((128, 1), ml_dtypes.bfloat16),
        },
    )


def test_the_offset_grid_rounds_to_the_nearest_value():
    from jaxcompress.quantization.grids import Steps, decode, encode

    x = np.linspace(-1, 2, 301, dtype=np.float32)[:, None]
    steps = Steps(jnp.full((1, 1), 0.125), jnp.full((1, 1), -0.75))
    codes = encode(x, steps, grid="offset", bits=4)
    values = np.asarray(decode(codes, steps, grid="offset", bits=4))
    levels = -0.75 + 0.125 * np.arange(16)
    nearest = np.abs(x - levels).min(axis=1)
    np.testing.assert_allclose(np.abs(values - x)[:, 0], nearest, atol=1e-7)
    flat = Steps(jnp.zeros((1, 1)), jnp.full((1, 1), 0.5))
    codes = encode(np.full((3, 1), 0.5, np.float32), flat, grid="offset", bits=4)
    np.testing.assert_array_equal(decode(codes, flat, grid="offset", bits=4), 0.5)


def test_a_block_of_scale_zero_has_no_zero_step():
    codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    scale = np.array([[0, 0.5], [0.25, 0]], np.float16)
    leaf = symmetric_leaf(codes, scale, "kernel", bits=4, block=4, dtype=np.float32)
    wanted = codes * np.repeat(scale, 4, axis=1)
    np.testing.assert_array_equal(leaf.materialize(), wanted.T)
    assert (np.asarray(leaf.scale) != 0).all()


def test_stacks_of_experts_keep_their_axes():
    codes = np.arange(-96, 96, dtype=np.int8).reshape(2, 3, 32)
    scale = np.arange(1, 7, dtype=np.float16).reshape(2, 3, 1)
    packed = pack_q8_0(codes.reshape(6, 32), scale.reshape(6, 1))
    tensor = types.SimpleNamespace(tensor_type=Type.Q8_0, data=packed.reshape(2, 3, -1))
    leaf = gguf_leaf(tensor, "layer_0/experts/up_proj/kernel", np.float32)
    wanted = (codes * scale.astype(np.float32)).swapaxes(1, 2)
    np.testing.assert_array_equal(leaf.materialize(), wanted)

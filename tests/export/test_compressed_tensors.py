"""compressed-tensors directories, against a reader written from the format."""

import contextlib
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from exports_for_tests import (
    MODEL,
    array_of,
    dense_params,
    small_params,
    tensors_of,
)

import jaxcompress as jc
from jaxcompress.export import compressed_tensors
from jaxcompress.export.compressed_tensors_layout import store
from jaxcompress.models.packed_words import pack_words, unpack_words
from jaxcompress.models.saved import open_saved, save
from jaxcompress.models.stacking import stack_layers

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def config_of(directory):
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def read_weight(tensors, module, scheme):
    """The float64 weight [outputs, inputs] of one layer, from the format's definition.

    Codes are read as one big integer per row: another way than the package's.
    """
    scale = array_of(tensors[f"{module}.weight_scale"]).astype(np.float64)
    kind = scheme["format"]
    if kind == "pack-quantized":
        words = array_of(tensors[f"{module}.weight_packed"])
        outputs, inputs = array_of(tensors[f"{module}.weight_shape"])
        bits = scheme["weights"]["num_bits"]
        codes = np.empty((outputs, inputs))
        for row, numbers in enumerate(words):
            stream = int.from_bytes(numbers.astype("<i4").tobytes(), "little")
            for column in range(inputs):
                code = stream >> (column * bits) & (2**bits - 1)
                codes[row, column] = code - 2 ** (bits - 1)
    elif kind == "nvfp4-pack-quantized":
        pairs = array_of(tensors[f"{module}.weight_packed"])
        codes = np.empty((pairs.shape[0], 2 * pairs.shape[1]))
        for i in range(2):
            nibble = pairs >> (4 * i) & 15
            sign = np.where(nibble & 8, -1, 1)
            codes[:, i::2] = sign * np.array(E2M1)[nibble & 7]
        scale = scale / array_of(tensors[f"{module}.weight_global_scale"])
    else:
        codes = array_of(tensors[f"{module}.weight"]).astype(np.float64)
    return codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)


LEAVES = {
    "layer_0/attention/q_proj/kernel": "model.layers.0.self_attn.q_proj",
    "layer_0/mlp/up_proj/kernel": "model.layers.0.mlp.up_proj",
    "layer_1/mlp/down_proj/kernel": "model.layers.1.mlp.down_proj",
}
NV = "nvfp4-pack-quantized"
CASES = {
    "symmetric(bits=4, block=32)": (None, "pack-quantized", 4, 32),
    "symmetric(bits=4, block=64, full_range=True)": (None, "pack-quantized", 4, 64),
    "symmetric(bits=4)": (None, "pack-quantized", 4, None),
    "symmetric(bits=1, block=32)": (None, "pack-quantized", 4, 32),
    "symmetric(bits=3, block='tensor')": (None, "pack-quantized", 4, None),
    "symmetric(bits=6, block=64)": (None, "pack-quantized", 8, 64),
    "symmetric(bits=8)": ("dynamic", "int-quantized", 8, None),
    "fp8()": ("dynamic", "float-quantized", 8, None),
    "fp8(scale_dtype='float32')": (None, "float-quantized", 8, None),
    "nvfp4()": (None, NV, 4, 16),
}


def leaf(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return tree


@pytest.mark.parametrize("method", CASES)
def test_codes_and_scales_go_over_unchanged(method, tmp_path):
    activations, kind, bits, group = CASES[method]
    small = small_params(method)
    rows = compressed_tensors(
        tmp_path / "out", MODEL, small, activations=activations, dtype="bfloat16"
    )
    tensors = tensors_of(tmp_path / "out")
    settings = config_of(tmp_path / "out")["quantization_config"]
    assert settings["format"] == kind
    (scheme,) = settings["config_groups"].values()
    assert scheme["weights"]["num_bits"] == bits
    assert scheme["weights"]["group_size"] == group
    assert (scheme["input_activations"] is None) == (activations is None)
    for name, module in LEAVES.items():
        value = leaf(small, name)
        # The reader's numbers in float64, so that only the last rounding is left.
        weight = read_weight(tensors, module, scheme)
        wanted = np.asarray(value.materialize()).T
        if kind == NV:  # the divisor is a float32
            exact = jc.materialize(value).astype(np.float32).T
            np.testing.assert_allclose(weight, exact, rtol=2**-8)
            spread = np.repeat(np.asarray(value.scale.materialize()), 16, axis=0)
            codes = np.asarray(value.codes.materialize())
            levels = np.array([*E2M1, *(-x for x in E2M1)])[codes]
            np.testing.assert_allclose(weight, (levels * spread).T, rtol=2**-23)
        else:
            np.testing.assert_array_equal(weight.astype(ml_dtypes.bfloat16), wanted)
    assert {row.error for row in rows} == {0.0}
    assert sum(row.nbytes for row in rows) == sum(len(x[2]) for x in tensors.values())


def test_words_are_those_of_compressed_tensors():
    # pack_to_int32 of compressed-tensors 0.20.1
    codes = (np.arange(22).reshape(2, 11) * 7 % 16).astype(np.uint8)
    words = [[440163952, 1784], [-418829491, 965]]
    np.testing.assert_array_equal(pack_words(codes, 4), words)
    np.testing.assert_array_equal(unpack_words(np.array(words), 4, 11), codes)
    codes = (np.arange(22).reshape(2, 11) * 37 % 256).astype(np.uint8)
    words = [[1867130112, 64928148, 7490856], [115457175, -1703587797, 648383]]
    np.testing.assert_array_equal(pack_words(codes, 8), words)
    np.testing.assert_array_equal(unpack_words(np.array(words), 8, 11), codes)
    with pytest.raises(ValueError, match="3 bits per code"):
        pack_words(codes, 3)


def test_pairs_of_nvfp4_are_those_of_compressed_tensors():
    # pack_fp4_to_uint8 of compressed-tensors 0.20.1, of all levels in two orders
    levels = np.array([*E2M1, *(-x for x in E2M1)])
    x = np.stack([levels, levels[np.arange(16) * 5 % 16]]).T.astype(np.float32)
    leaf = jc.nvfp4(x)  # the largest of 16 is 6: the codes are the levels themselves
    scheme, tensors = store(leaf, dynamic=False)
    assert scheme.format == NV
    wanted = bytes.fromhex("1032547690badcfe50fa943ed0721cb6")
    assert tensors["weight_packed"].tobytes() == wanted
    # 448 is the largest scale of e4m3: the global scale, a divisor, makes it 1.
    assert tensors["weight_scale"].astype(np.float32).tolist() == [[448], [448]]
    np.testing.assert_allclose(tensors["weight_global_scale"], [448], rtol=2**-22)


def test_tensors_have_the_names_shapes_and_dtypes_of_the_format(tmp_path):
    compressed_tensors(
        tmp_path / "out", MODEL, small_params("symmetric(bits=4, block=32)")
    )
    tensors = tensors_of(tmp_path / "out")
    module = "model.layers.1.self_attn.k_proj"
    found = {k: v[:2] for k, v in tensors.items() if k.startswith(f"{module}.")}
    assert found == {
        f"{module}.weight_packed": ("I32", (64, 8)),
        f"{module}.weight_scale": ("BF16", (64, 2)),
        f"{module}.weight_shape": ("I64", (2,)),
    }
    assert tensors["model.embed_tokens.weight"][:2] == ("BF16", (96, 64))
    assert "lm_head.weight" not in tensors
    config = config_of(tmp_path / "out")
    assert config["dtype"] == "bfloat16"
    settings = config["quantization_config"]
    assert settings["ignore"] == ["lm_head"]
    assert settings["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_scales_are_written_in_a_dtype_that_holds_them(tmp_path):
    small = small_params("fp8(scale_dtype='float32')")
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    compressed_tensors(tmp_path / "a", MODEL, small, dtype="bfloat16")
    assert tensors_of(tmp_path / "a")[name][0] == "F32"  # bfloat16 would round them
    small = small_params("symmetric(bits=4, block=32)")
    compressed_tensors(tmp_path / "b", MODEL, small, dtype="float32")
    assert tensors_of(tmp_path / "b")[name][0] == "F32"  # exact, and read in float32


def test_scales_of_larger_blocks_are_repeated(tmp_path):
    small = small_params("symmetric(bits=4, block=96)")
    compressed_tensors(tmp_path / "out", MODEL, small)
    groups = config_of(tmp_path / "out")["quantization_config"]["config_groups"]
    assert [x["weights"]["group_size"] for x in groups.values()] == [32, 64]
    scheme = groups["group_0"]
    tensors = tensors_of(tmp_path / "out")
    for name, module in LEAVES.items():
        weight = read_weight(tensors, module, scheme).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(weight.T, leaf(small, name).materialize())


def test_one_group_size_may_be_asked_for(tmp_path):
    small = small_params("symmetric(bits=4, block=128)")
    compressed_tensors(tmp_path / "a", MODEL, small)
    groups = config_of(tmp_path / "a")["quantization_config"]["config_groups"]
    assert [x["weights"]["group_size"] for x in groups.values()] == [128, 64]
    compressed_tensors(tmp_path / "b", MODEL, small, group=64)
    (scheme,) = config_of(tmp_path / "b")["quantization_config"][
        "config_groups"
    ].values()
    assert scheme["weights"]["group_size"] == 64
    for name, module in LEAVES.items():
        weight = read_weight(tensors_of(tmp_path / "b"), module, scheme)
        weight = weight.astype(ml_dtypes.bfloat16).T
        np.testing.assert_array_equal(weight, leaf(small, name).materialize())
    with pytest.raises(ValueError, match="group must be 32, 64 or 128, not 48"):
        compressed_tensors(tmp_path / "c", MODEL, small, group=48)


def test_mixed_schemes_list_their_layers(tmp_path):
    small = jc.compress(
        dense_params(),
        [
            ("layer_0/attention/.*_proj/kernel", "symmetric(bits=4, block=32)"),
            ("layer_1/mlp/.*/kernel", "fp8()"),
        ],
    )
    compressed_tensors(tmp_path / "out", MODEL, small)
    settings = config_of(tmp_path / "out")["quantization_config"]
    assert settings["format"] == "mixed-precision"
    targets = {
        scheme["format"]: scheme["targets"]
        for scheme in settings["config_groups"].values()
    }
    assert targets == {
        "pack-quantized": [f"model.layers.0.self_attn.{x}_proj" for x in "koqv"],
        "float-quantized": [
            f"model.layers.1.mlp.{x}_proj" for x in ("down", "gate", "up")
        ],
    }
    ignored = [f"model.layers.0.mlp.{x}_proj" for x in ("down", "gate", "up")]
    ignored += [f"model.layers.1.self_attn.{x}_proj" for x in "koqv"]
    assert settings["ignore"] == sorted([*ignored, "lm_head"])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["scanned", "file", "file, scanned", "coded"])
def test_the_same_tensors_from_every_kind_of_parameters(source, tmp_path):
    small = small_params("symmetric(bits=4, block=32)")
    compressed_tensors(tmp_path / "want", MODEL, small)
    model, params = MODEL, small
    if "scanned" in source:
        model, params = MODEL.clone(scan=True), stack_layers(params)
    if source == "coded":
        params = jc.compress(params, "entropy_code()")
    if "file" in source:
        save(tmp_path / "small.safetensors", model, params)
        model, params, _ = open_saved(tmp_path / "small.safetensors")
    with params if "file" in source else contextlib.nullcontext():
        compressed_tensors(tmp_path / "out", model, params)
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "want")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "want")


def test_what_has_no_counterpart_is_refused_by_name(tmp_path):
    def refused(recipe, match, **options):
        small = jc.compress(dense_params(), recipe)
        with pytest.raises(ValueError, match=match):
            compressed_tensors(tmp_path / "out", MODEL, small, **options)
        assert list(tmp_path.iterdir()) == []

    kernel = "layer_1/mlp/down_proj/kernel"
    refused([(kernel, "svd(rank=4)")], f"{kernel} is a LowRank.*requantize=")
    refused([(kernel, "nf4()")], f"{kernel}: the grid 'nf4'.*no counterpart")
    refused([(kernel, "mxfp4()")], f"{kernel}: the grid 'e2m1' with blocks of 32")
    refused([(kernel, "asymmetric(bits=4)")], "grid 'asymmetric'")
    refused([(kernel, "symmetric(bits=4, block=16)")], "blocks of 16 along 128 inputs")
    refused([(kernel, "symmetric(bits=4, block=48)")], "blocks of 48 along 128 inputs")
    refused(
        [(kernel, "symmetric(bits=8, block=32)")],
        "int8 products",
        activations="dynamic",
    )
    refused([(kernel, "fp8(block=32)")], "one scale per output")
    refused([(kernel, "nvfp4()")], "input scale", activations="dynamic")
    refused([(".*norm/scale", None)], "no leaf is compressed")
    refused([(kernel, "symmetric(bits=4)")], "not 'int8'", activations="int8")


@pytest.mark.parametrize(
    "where, layers",
    [("layer_0/attention/k_proj/kernel", "q_proj: dense; .*k_proj: pack-quantized"),
     ("layer_1/mlp/gate_proj/kernel", "gate_proj: pack-quantized.*up_proj: dense")],
)  # fmt: skip
def test_layers_that_readers_fuse_need_one_scheme(where, layers, tmp_path):
    small = jc.compress(dense_params(), [(where, "symmetric(bits=4, block=32)")])
    with pytest.raises(ValueError, match=layers):
        compressed_tensors(tmp_path / "out", MODEL, small)
    assert list(tmp_path.iterdir()) == []


def test_requantizing_is_asked_for_and_measured(tmp_path):
    kernel = "layer_1/mlp/down_proj/kernel"
    small = jc.compress(
        small_params("symmetric(bits=4, block=32)", "layer_0/.*/kernel"),
        [(kernel, "svd(rank=8)")],
    )
    rows = compressed_tensors(
        tmp_path / "out",
        MODEL,
        small,
        requantize=[(kernel, "symmetric(bits=4, block=32)")],
    )
    (row,) = [row for row in rows if row.error]
    old = np.asarray(leaf(small, kernel).materialize(), np.float64)
    scheme = {"format": "pack-quantized", "weights": {"num_bits": 4}}
    module = "model.layers.1.mlp.down_proj"
    new = read_weight(tensors_of(tmp_path / "out"), module, scheme).T
    assert row.name == kernel
    error = np.linalg.norm(new - old) / np.linalg.norm(old)
    np.testing.assert_allclose(row.error, error, rtol=1e-2)
    assert 0.05 < row.error < 0.2


def test_dense_is_asked_for(tmp_path):
    small = small_params("symmetric(bits=4, block=32)", ".*/(kernel|embedding)")
    with pytest.raises(ValueError, match=r"embed/embedding is compressed.*dense='"):
        compressed_tensors(tmp_path / "out", MODEL, small)
    compressed_tensors(tmp_path / "out", MODEL, small, dense="(embed|head)/.*")
    table = array_of(tensors_of(tmp_path / "out")["model.embed_tokens.weight"])
    np.testing.assert_array_equal(table, small["embed"]["embedding"].materialize())


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    small = small_params("symmetric(bits=4, block=32)")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists; remove it"):
        compressed_tensors(tmp_path / "out", MODEL, small)
    with pytest.raises(FileNotFoundError, match="no directory"):
        compressed_tensors(tmp_path / "absent" / "out", MODEL, small)
    with pytest.raises(ValueError, match=r"heads is \(4, 2\)"):
        compressed_tensors(tmp_path / "b", MODEL.clone(heads=(4, 2)), small)
    with pytest.raises(ValueError, match="head/kernel is in one of them only"):
        compressed_tensors(tmp_path / "b", MODEL.clone(tied=False), small)
    other = jax.tree.map(lambda x: x, small)
    other["embed"] = {"embedding": np.zeros((95, 64), np.float32)}
    with pytest.raises(ValueError, match=r"embed/embedding has shape \(95, 64\)"):
        compressed_tensors(tmp_path / "b", MODEL, other)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["note"]


def test_big_models_are_written_in_shards(tmp_path):
    small = small_params("symmetric(bits=4, block=32)")
    compressed_tensors(tmp_path / "one", MODEL, small)
    compressed_tensors(tmp_path / "many", MODEL, small, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = (tmp_path / "many" / "model.safetensors.index.json").read_text()
    index = json.loads(index)
    whole = tensors_of(tmp_path / "one")
    assert tensors_of(tmp_path / "many") == whole
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(len(x[2]) for x in whole.values())
    sizes = [path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors")]
    assert max(sizes) < 20_000 + 4_000  # and a header
    with pytest.raises(ValueError, match="shard_bytes must be positive"):
        compressed_tensors(tmp_path / "none", MODEL, small, shard_bytes=0)

"""GGUF files, against the gguf package's reader and bytes written from the format."""

import json

import jax
import numpy as np
import pytest
from exports_for_tests import MODEL, dense_params, small_params
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, quants

import jaxcompress as jc
from jaxcompress import tokenization
from jaxcompress.export import gguf
from jaxcompress.models.assembly import foreign_name
from jaxcompress.models.gguf_blocks import (
    pack_q4_0,
    pack_q4_1,
    pack_q8_0,
    unpack_q4_0,
    unpack_q4_1,
    unpack_q8_0,
)
from jaxcompress.models.gguf_settings import MODULES
from jaxcompress.models.gguf_tokenizers import PRE_TOKENIZERS
from jaxcompress.models.loading import load
from jaxcompress.models.saved import open_saved, save
from jaxcompress.models.stacking import stack_layers
from jaxcompress.tree.paths import roots

WEIGHTS = ".*/(kernel|embedding)"
F16 = "scale_dtype='float16'"


def read(path):
    """Arrays and type names by tensor, dequantized by the gguf package."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            quants.dequantize(tensor.data, tensor.tensor_type),
        )
        for tensor in GGUFReader(path).tensors
    }


def pairs(array):
    """Rows (2i, 2i + 1) of a head from (i, i + D/2), one by one."""
    half = MODEL.head_size // 2
    rows = [
        array[start + i + j * half]
        for start in range(0, len(array), MODEL.head_size)
        for i in range(half)
        for j in range(2)
    ]
    return np.stack(rows)


def same_values(path, params):
    tensors = read(path)
    names = dict(roots(params))
    assert set(tensors) == {foreign_name(name, MODULES) for name in names}
    for name, value in names.items():
        wanted = np.asarray(jc.materialize(value), np.float32)
        wanted = wanted.T if name.endswith("/kernel") else wanted
        if "/q_proj/" in name or "/k_proj/" in name:
            wanted = pairs(wanted)
        np.testing.assert_array_equal(tensors[foreign_name(name, MODULES)][1], wanted)
    return {name: kind for name, (kind, _) in tensors.items()}


# What gguf 0.19 writes for x = (7 i mod 23 - 11) / 8, i below 32.
X = ((np.arange(32) * 7 % 23 - 11) / 8).astype(np.float32)
GOLDEN = {
    "Q8_0": "8b2181d22373bb0c5ca4f4458ddd2e7fc61768af005198e93a81d22373bb0c5ca4f4",
    "Q4_0": "8031f0358adf1479ce0257acf1469bef2479",
    "Q4_1": "de3180bde0358ace1368bd0257ace1358adf2479",
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_blocks_are_those_of_the_gguf_package(kind):
    pack, unpack = {
        "Q8_0": (pack_q8_0, unpack_q8_0),
        "Q4_0": (pack_q4_0, unpack_q4_0),
        "Q4_1": (pack_q4_1, unpack_q4_1),
    }[kind]
    data = np.frombuffer(bytes.fromhex(2 * GOLDEN[kind]), np.uint8)[None]
    codes, scale, *offset = unpack(data)
    assert codes.shape == (1, 64) and scale.shape == (1, 2)
    np.testing.assert_array_equal(pack(codes, scale, *offset), data)
    values = codes * np.repeat(scale.astype(np.float32), 32, axis=1)
    for x in offset:
        values += np.repeat(x.astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(values, quants.dequantize(data, Type[kind]))
    step = float(np.abs(scale).max())
    np.testing.assert_allclose(values[0], [*X, *X], atol=step)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (f"symmetric(bits=4, block=32, full_range=True, {F16})", "Q4_0"),
        (f"symmetric(bits=8, block=32, {F16})", "Q8_0"),
        ("symmetric(bits=3, block=64)", "Q4_0"),
        ("symmetric(bits=6)", "Q8_0"),
    ],
)
def test_codes_and_scales_go_over_unchanged(method, kind, tmp_path):
    small = small_params(method, WEIGHTS, np.float32)
    rows = gguf(tmp_path / "a.gguf", MODEL, small)
    types = same_values(tmp_path / "a.gguf", small)
    weights = {name: x for name, x in types.items() if "norm" not in name}
    assert set(weights.values()) == {kind}
    assert {x for name, x in types.items() if "norm" in name} == {"F32"}
    assert {row.tensor: row.stored for row in rows} == types
    assert {row.error for row in rows} == {0.0}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", None])
def test_dense_weights_keep_their_bits(dtype, tmp_path):
    params = dense_params()
    gguf(tmp_path / "a.gguf", MODEL, params, dtype=dtype)
    wanted = jax.tree.map(
        lambda x: x.astype(dtype or x.dtype) if x.ndim > 1 else x, params
    )
    types = same_values(tmp_path / "a.gguf", wanted)
    names = {"float32": "F32", "float16": "F16"}
    assert types["blk.0.ffn_up.weight"] == names.get(dtype, "BF16")
    assert types["blk.0.attn_norm.weight"] == "F32"
    model, read_back, _ = load(tmp_path / "a.gguf")
    assert model == MODEL
    for a, b in zip(*map(jax.tree.leaves, (read_back, wanted)), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b, np.float32))


@pytest.mark.parametrize("source", ["scanned", "file"])
def test_the_same_file_from_every_kind_of_parameters(source, tmp_path):
    small = small_params("symmetric(bits=3, block=64)", WEIGHTS, np.float32)
    gguf(tmp_path / "want.gguf", MODEL, small)
    if source == "scanned":
        model = MODEL.clone(scan=True)
        gguf(tmp_path / "out.gguf", model, stack_layers(small))
    else:
        save(tmp_path / "small.safetensors", MODEL, small)
        model, params, _ = open_saved(tmp_path / "small.safetensors")
        with params:
            gguf(tmp_path / "out.gguf", model, params)
    same_values(tmp_path / "out.gguf", small)
    sizes = [(tmp_path / x).stat().st_size for x in ("want.gguf", "out.gguf")]
    assert sizes[0] == sizes[1]


def byte_level(pre_tokenizer):
    """A tokenizer.json of all bytes, one merge, and two added tokens."""
    from jaxcompress.tokenization.huggingface import BYTE_OF

    letters = sorted(BYTE_OF)
    vocab = {x: i for i, x in enumerate([*letters, "th"])}
    added = [
        {"id": 257 + i, "content": text, "special": special, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for i, (text, special) in enumerate([("<|end|>", True), ("<tool>", False)])
    ]  # fmt: skip
    model = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab,
             "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "merges": [["t", "h"]]}  # fmt: skip
    return json.dumps(
        {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
         "post_processor": None, "added_tokens": added, "model": model,
         "pre_tokenizer": pre_tokenizer,
         "decoder": {"type": "ByteLevel", "add_prefix_space": True,
                     "trim_offsets": True, "use_regex": True}}
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokenizers_come_back(name, tmp_path):
    steps = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[name]}
    words = tokenization.from_huggingface_json(byte_level(steps), eos="<|end|>")
    model = MODEL.clone(vocab_size=words.vocab_size)
    params = dict(dense_params())
    params["embed"] = {"embedding": np.zeros((259, 64), np.float32)}
    gguf(tmp_path / "a.gguf", model, params, words)
    fields = GGUFReader(tmp_path / "a.gguf").fields
    contents = {key: field.contents() for key, field in fields.items()}
    assert contents["tokenizer.ggml.pre"] == name
    assert contents["tokenizer.ggml.merges"] == ["t h"]
    assert contents["tokenizer.ggml.token_type"][-3:] == [1, 3, 4]
    assert contents["tokenizer.ggml.eos_token_id"] == 257
    assert contents["tokenizer.ggml.add_bos_token"] is False
    assert contents["llama.attention.head_count_kv"] == 2
    assert contents["llama.context_length"] == 8192
    again = load(tmp_path / "a.gguf")[2]
    text = "The 12345 things <tool> that\n\n are thé best<|end|>"
    assert again.encode(text) == words.encode(text)
    assert again.eos_id == words.eos_id and again.bos_id is None


def train(kind):
    text = "the cat that sat there, 1969 " * 9
    return tokenization.train([text], kind=kind, vocab_size=272)


def test_sentencepiece_tokenizers_come_back(tmp_path):
    words = train("bpe")
    model = MODEL.clone(vocab_size=words.vocab_size)
    params = dict(dense_params())
    table = np.zeros((words.vocab_size, 64), np.float32)
    params["embed"] = {"embedding": table}
    gguf(tmp_path / "a.gguf", model, params, words, metadata={"general.name": "cat"})
    fields = GGUFReader(tmp_path / "a.gguf").fields
    contents = {key: field.contents() for key, field in fields.items()}
    assert contents["tokenizer.ggml.model"] == "llama"
    assert contents["general.name"] == "cat"
    again = load(tmp_path / "a.gguf")[2]
    text = "that cat was there in 1970"
    assert again.encode(text) == words.encode(text)
    assert (again.bos_id, again.eos_id) == (words.bos_id, words.eos_id)


def test_sentencepiece_tokenizers_of_json_come_back(tmp_path):
    """As Gemma's: pieces and merges; their ranks are scores."""
    words = train("bpe")
    model = MODEL.clone(vocab_size=words.vocab_size)
    params = dict(dense_params(), embed={"embedding": np.zeros((272, 64), np.float32)})
    gguf(tmp_path / "a.gguf", model, params, words)
    merged = load(tmp_path / "a.gguf")[2]
    assert b"byte_fallback" in merged.to_bytes()
    gguf(tmp_path / "b.gguf", model, params, merged)
    first, second = (
        {k: v.contents() for k, v in GGUFReader(tmp_path / x).fields.items()}
        for x in ("a.gguf", "b.gguf")
    )
    for key in ("tokens", "token_type", "model", "add_space_prefix", "add_bos_token"):
        key = f"tokenizer.ggml.{key}"
        assert first[key] == second[key]
    assert second["tokenizer.ggml.unknown_token_id"] == 0
    again = load(tmp_path / "b.gguf")[2]
    assert again.to_bytes() == merged.to_bytes()
    contents = json.loads(merged.to_bytes())
    described = json.loads(contents["tokenizer"])
    del described["model"]["merges"][0]
    odd = tokenization.from_huggingface_json(json.dumps(described))
    with pytest.raises(ValueError, match="not those that scores of pieces give"):
        gguf(tmp_path / "c.gguf", model, params, odd)
    described["normalizer"] = {"type": "NFC"}
    odd = tokenization.from_huggingface_json(json.dumps(described))
    with pytest.raises(ValueError, match=r"NFC.* has no counterpart; llama"):
        gguf(tmp_path / "c.gguf", model, params, odd)


GEMMA = MODEL.clone(
    layers=7,
    qk_norm=True,
    post_norms=True,
    scaled_embedding=True,
    activation="gelu_tanh",
    rope_theta=1e6,
    sliding_rope_theta=1e4,
    sliding_window=(8, 8, 8, 8, 8, None, 8),
)


def test_gemma_comes_back(tmp_path):
    shapes = jax.eval_shape(GEMMA.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), shapes["params"]
    )
    small = jc.compress(params, [(".*/kernel", f"symmetric(bits=4, block=32, {F16})")])
    gguf(tmp_path / "a.gguf", GEMMA, small, context=2048)
    model, again, _ = load(tmp_path / "a.gguf", keep_quantized=True)
    assert model == GEMMA
    assert jax.tree.structure(again) == jax.tree.structure(small)
    for a, b in zip(*map(jax.tree.leaves, (again, small)), strict=True):
        np.testing.assert_array_equal(a, b)
    for changes in (
        {"sliding_window": (8, 8, 8, 8, None, 8, 8)},
        {"sliding_rope_theta": 2e4},
        {"attention_scale": 0.5},
    ):
        name = next(iter(changes))
        with pytest.raises(ValueError, match=f"{name}=.*computes gemma3 models with"):
            gguf(tmp_path / "b.gguf", GEMMA.clone(**changes), params)


def test_what_has_no_counterpart_is_refused_by_name(tmp_path):
    def refused(match, recipe=None, model=MODEL, params=None, **options):
        params = dense_params() if params is None else params
        params = params if recipe is None else jc.compress(params, recipe)
        with pytest.raises((ValueError, FileExistsError), match=match):
            gguf(tmp_path / "out.gguf", model, params, **options)
        assert [x.name for x in tmp_path.iterdir()] in ([], ["out.gguf"])

    kernel = "layer_1/mlp/down_proj/kernel"
    refused(f"{kernel} is a LowRank.*requantize=", [(kernel, "svd(rank=4)")])
    refused("'asymmetric' has no counterpart", [(kernel, "asymmetric(bits=4)")])
    refused("blocks of 48 along 128", [(kernel, "symmetric(bits=4, block=48)")])
    tiny = jax.tree.map(
        lambda x: (x * np.float32(1e-9)).astype(x.dtype), dense_params()
    )
    refused("no float16 numbers", [(kernel, "symmetric(bits=4)")], params=tiny)
    refused("as F32|float32, float16", dtype="float64")
    big = dict(dense_params(), embed={"embedding": np.full((96, 64), 1e5, np.float32)})
    refused("overflow in float16", params=big, dtype="float16")
    refused("sliding_window=8", model=MODEL.clone(sliding_window=8))
    refused(r"heads is \(4, 2\)", model=MODEL.clone(heads=(4, 2)))
    words = train("bpe")
    refused("272 tokens and the model 96 rows", tokenizer=words)
    words = train("unigram")
    refused("of kind unigram has no counterpart", tokenizer=words)
    odd = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated",
           "invert": False}  # fmt: skip
    words = tokenization.from_huggingface_json(byte_level(odd))
    refused("none of those that are known", tokenizer=words)
    (tmp_path / "out.gguf").write_text("mine")
    refused("out.gguf exists; remove it")
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_requantizing_and_dense_are_asked_for(tmp_path):
    kernel = "layer_1/mlp/down_proj/kernel"
    up = "layer_1/mlp/up_proj/kernel"
    small = jc.compress(dense_params(), [(f"{kernel}|{up}", "svd(rank=8)")])
    method = f"symmetric(bits=8, block=32, {F16})"
    rows = gguf(
        tmp_path / "a.gguf", MODEL, small, dense=up, requantize=[(kernel, method)]
    )
    stored = {row.name: (row.stored, row.error > 0) for row in rows}
    assert stored[kernel] == ("Q8_0", True)
    assert stored[up] == ("BF16", False)


def test_scaled_rotations_come_back(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for options in (
        scaling,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0,
         "original_max_position_embeddings": 64},
    ):  # fmt: skip
        model = MODEL.clone(rope_scaling=tuple(sorted(options.items())))
        path = tmp_path / f"{options['rope_type']}.gguf"
        gguf(path, model, dense_params())
        assert load(path)[0] == model
    odd = {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0,
           "original_max_position_embeddings": 64}  # fmt: skip
    with pytest.raises(ValueError, match="no counterpart in GGUF"):
        gguf(
            tmp_path / "b.gguf",
            MODEL.clone(rope_scaling=tuple(sorted(odd.items()))),
            dense_params(),
        )

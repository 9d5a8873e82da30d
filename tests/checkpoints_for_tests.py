"""Checkpoints of other projects that tests read: recorded ones, and written ones."""

from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcompress.models.assembly import foreign_name, parameter_shapes
from jaxcompress.models.gguf_settings import MODULES

GOLDEN = Path(__file__).parent / "data" / "golden"
NAMES = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3")
PIECES = ["<|end|>", *"abcdefgh ", *"0123456789", "Ġ", "ab", "Ġab", "12", "à", "Ã", "ł"]
BYTE_METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.token_type": [3] + [1] * (len(PIECES) - 1),
    "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
    "tokenizer.ggml.eos_token_id": 0,
}


def golden(name):
    recorded = np.load(GOLDEN / name / "golden.npz")
    return recorded["tokens"], recorded["logits"]


def logits_of(model, params, tokens):
    return jax.jit(model.apply)({"params": params}, tokens)


def shapes_of(params):
    flat = flatten_dict(params, sep="/")
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}


def trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [
        x.dtype for x in jax.tree.leaves(b)
    ]


def random_params(model):
    generator = np.random.default_rng(1)
    shapes = parameter_shapes(model)
    flat = {x: generator.normal(size=shapes[x]).astype(np.float32) for x in shapes}
    return unflatten_dict(flat, sep="/")


def interleaved(kernel, head_size):
    """[outputs, inputs] with each head's rows i and i + D/2 side by side."""
    rows = []
    for head in range(kernel.shape[0] // head_size):
        for i in range(head_size // 2):
            rows.append(kernel[head * head_size + i])
            rows.append(kernel[head * head_size + head_size // 2 + i])
    return np.stack(rows)


def write_gguf(path, kind, model, params, type_of, *, extra=None, tokens=True):
    """A GGUF file of these parameters, each stored as `type_of(name)` says."""
    import gguf

    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(model.layers)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.mlp_width)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(PIECES)
        writer.add_token_types(BYTE_METADATA["tokenizer.ggml.token_type"])
        writer.add_token_merges(BYTE_METADATA["tokenizer.ggml.merges"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages }}")
    for name, array in flatten_dict(params, sep="/").items():
        array = np.asarray(array, np.float32)
        if name.endswith("/kernel"):
            array = np.ascontiguousarray(array.T)
        if kind == "llama" and ("/q_proj/" in name or "/k_proj/" in name):
            array = interleaved(array, model.head_size)
        stored = type_of(name)
        data = gguf.quants.quantize(array, stored)
        writer.add_tensor(foreign_name(name, MODULES), data, raw_dtype=stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

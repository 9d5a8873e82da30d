"""A tiny model that every export can hold, and readers written from the formats."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open

from jaxcompress.models.transformer import Transformer
from jaxcompress.tree.compress import compress

MODEL = Transformer(
    vocab_size=96,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=32,
    mlp_width=128,
)
KERNELS = "layer_.*/kernel"


@functools.cache
def dense_params():
    """bfloat16 weights `[..., inputs, outputs]`, a block of zeros among them."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.normal(0, 0.1, x.shape).astype(ml_dtypes.bfloat16),
        shapes["params"],
    )
    params["layer_0"]["mlp"]["up_proj"]["kernel"][:64, :3] = 0
    return params


@functools.cache
def small_params(method, where=KERNELS, dtype=ml_dtypes.bfloat16):
    """The weights compressed; `dtype` is the one they come back in."""
    params = jax.tree.map(lambda x: x.astype(dtype), dense_params())
    return compress(params, [(where, method)])


def tensors_of(directory):
    """Raw tensors by name: (dtype of the header, shape, bytes)."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        for name, entry in header.items():
            start, end = (8 + length + x for x in entry["data_offsets"])
            found[name] = (entry["dtype"], tuple(entry["shape"]), data[start:end])
        with safe_open(path, framework="np") as file:  # the official reader agrees
            assert set(file.keys()) == set(header)
    return found


NUMPY = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
}


def array_of(tensor):
    dtype, shape, data = tensor
    return np.frombuffer(data, NUMPY[dtype]).reshape(shape)

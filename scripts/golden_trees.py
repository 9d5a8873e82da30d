"""The trees that the golden files of format 3 hold, by the name of their file.

Arrays come from a seeded generator and leaves are put together from arrays, so that
neither JAX's arithmetic nor a method decides a byte.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

import jaxcompress as jc
from jaxcompress.coding.floats import leaf as float_leaf
from jaxcompress.coding.floats.code_floats import CodedFloats
from jaxcompress.coding.integers.leaf import entropy_code
from jaxcompress.coding.levels import trellis
from jaxcompress.coding.levels.leaf import code_levels
from jaxcompress.coding.levels.rate_coded import RateCoded, packed_scales
from jaxcompress.coding.packing import pack_bits
from jaxcompress.quantization.awq import Scaled
from jaxcompress.quantization.grids import GRIDS, REAL_ZEROS, Quantized
from jaxcompress.storage.static_json import DTYPES
from jaxcompress.training.qat_leaf import FakeQuantized


def every_dtype(rng):
    """Arrays of every dtype with any bits, scalars and empty ones among them."""

    def bits(name, shape):
        kind = jnp.dtype(name)
        if name in ("bool", "int2", "int4", "uint2", "uint4"):
            return rng.integers(0, 2, shape).astype(kind)
        if name == "float4_e2m1fn":
            return rng.integers(0, 16, shape, np.uint8).view(kind)
        raw = rng.integers(0, 256, int(np.prod(shape)) * kind.itemsize, np.uint8)
        return raw.view(kind).reshape(shape)

    shapes = (3, 5), (), (0, 2)
    return {name: [bits(name, shape) for shape in shapes] for name in sorted(DTYPES)}


def containers(rng):
    """Dicts of strings and of integers, lists, tuples, None, boxes, shared arrays."""
    shared = rng.normal(size=(4, 8)).astype("f4")
    low_rank = jc.LowRank(whole(rng, (4, 2)), whole(rng, (2, 3)))
    return {
        "containers": [None, (), {}, [], (np.ones(2, "f4"), [np.zeros(1, "f4")])],
        "numbered": {2: np.ones(1, "i4"), 10: np.zeros(1, "i4")},
        "odd/names~here ü": {"": np.arange(2), "a/b": {"~": np.arange(3)}},
        "shared": [shared, {"again": shared}, low_rank, low_rank],
        "boxes": {
            "array": nn.Partitioned(np.ones((2, 3, 4), "f4"), ("x", None, ("y", "z"))),
            "leaf": nn.LogicallyPartitioned(low_rank, names=("in", "out")),
        },
    }


def frozen(rng):
    """Flax's frozen dicts, within a dict and by themselves."""
    inner = FrozenDict({"kernel": rng.normal(size=(2, 3)).astype("f4")})
    return {"a": [inner, {"bias": np.zeros(3, "f4")}], "b": FrozenDict({"c": inner})}


def whole(rng, shape, dtype="float32"):
    """Small integers as floats: their products are exact in any order."""
    return rng.integers(-4, 5, shape).astype(jnp.dtype(dtype))


def quantized_leaves(rng):
    """One leaf on every grid, of every kind of block, and fake-quantized ones."""
    out = {}
    for i, (name, grid) in enumerate(GRIDS.items()):
        bits = {"sign_split": (2, 3), "e2m1": 4, "nf4": 4}.get(name, 3)
        bits = 8 if grid.width(bits) == 8 else bits
        # Few shapes: JAX compiles each operation for each.
        block, stack = {1: None, 2: "tensor"}.get(i, 4), (2,) * (name == "nf4")
        shape = (*stack, {4: 3}.get(block, 1), 1 if block == "tensor" else 6)
        scale = rng.uniform(0.5, 2, shape).astype(jnp.bfloat16)
        codes = rng.integers(0, 1 << grid.width(bits), (*stack, 10, 6), np.uint8)
        zero = negative = None
        if name == "asymmetric":
            zero = pack_bits(rng.integers(0, 8, shape, np.uint8), 3)
        elif name in REAL_ZEROS:
            zero = rng.uniform(-1, 3, shape).astype(jnp.bfloat16)
        elif name == "sign_split":
            negative = rng.uniform(0.5, 2, shape).astype(jnp.bfloat16)
        packed = pack_bits(codes, grid.width(bits))
        static = name, bits, block
        kind = jnp.dtype(("float32", "bfloat16", "float16")[i % 3])
        out[name] = Quantized(packed, scale, zero, negative, *static, kind)
        if name == "e8m0":
            continue
        weight = rng.normal(0, 2, codes.shape).astype("f4")
        real = None if zero is None else np.asarray(jc.materialize(zero), "f4")
        zero = zero if name == "asymmetric" else real
        zero = np.asarray(jc.materialize(zero)) if name == "asymmetric" else zero
        parts = (None if x is None else x.astype("f4") for x in (scale, negative))
        scale, negative = parts
        scale = scale * np.float32(1.001)
        out[f"fake_{name}"] = FakeQuantized(
            *(weight, scale, zero, negative, *static, kind),
            scale_dtype=("bfloat16", "float16", "float32")[i % 3],
        )
    scale = Quantized(
        pack_bits(rng.integers(120, 130, (1, 6), np.uint8), 8),
        *(np.ones((1, 1), "f4"), None, None, "e8m0", 8, "tensor", np.dtype("f4")),
    )
    codes = pack_bits(rng.integers(0, 16, (10, 6), np.uint8), 4)
    bf16 = jnp.dtype("bfloat16")
    out["mxfp4"] = Quantized(codes, scale, None, None, "e2m1", 4, 32, bf16)
    return out


def other_leaves(rng):
    """Leaf types that are neither quantized nor entropy-coded."""
    mask = rng.integers(0, 2, (5, 4), np.uint8)
    most = int(mask.sum())
    blocks = np.repeat(np.array([[1, 0], [0, 1], [1, 1]], np.uint8), 2, 1)
    inner = jc.LowRank(whole(rng, (2, 12, 2)), whole(rng, (2, 2, 10)))
    return {
        **{f"packed_{n}": packed(rng, n) for n in (1, 3, 7, 12, 29, 32)},
        "packed_along_outputs": pack_bits(rng.integers(0, 8, (3, 9), np.uint8), 3),
        "packed_vector": pack_bits(rng.integers(0, 2, 11) > 0, 1),
        "low_rank": jc.LowRank(whole(rng, (6, 2), "bfloat16"), whole(rng, (2, 5))),
        "cp": jc.CP(tuple(whole(rng, (2, n, 3)) for n in (2, 3, 4)), 2),
        "tucker": jc.Tucker(
            whole(rng, (2, 3, 2)), (whole(rng, (5, 2)), None, whole(rng, (4, 2))), 1
        ),
        "stacked_tucker": jc.Tucker(
            *(whole(rng, (3, 2, 2)), (whole(rng, (3, 4, 2)), whole(rng, (3, 5, 2)))), 1
        ),
        "sparse_flat": jc.Sparse(whole(rng, (most, 1)), pack_bits(mask, 1)),
        "sparse_by_output": jc.Sparse(whole(rng, (4, 4)), blocks[[0, 1, 2]], (2, 1)),
        "mixed_outputs": jc.Mixed(
            whole(rng, (4, 2)), whole(rng, (4, 3)), np.array([3, 0, 4, 1, 2], "u1")
        ),
        "mixed_inputs": jc.Mixed(
            whole(rng, (1, 4)), whole(rng, (2, 4)), np.array([2, 0, 1], "u1"), -2
        ),
        "sum": jc.Sum((whole(rng, (3, 4), "bfloat16"), whole(rng, (3, 4)))),
        "reshaped": jc.Reshaped(inner, (3, 4, 2, 5), (-3, -1, -4, -2)),
        "restacked": jc.Reshaped(inner, (3, 4, 10), (-3, -1, -2), (1,)),
        "scaled": Scaled(
            *(whole(rng, (5, 4)), rng.uniform(0.5, 2, 5).astype(jnp.bfloat16)),
            jnp.dtype("bfloat16"),
        ),
    }


def packed(rng, bits):
    kind = np.uint8 if bits <= 8 else np.uint32
    return pack_bits(rng.integers(0, 1 << bits, (10, 3), np.uint64).astype(kind), bits)


def coded_integers(rng):
    """Integers at their entropy: bytes, several codes to one, lists, escapes."""
    wide = np.rint(rng.laplace(0, 40, (2, 64, 48)))
    wide[:, 0, :3] = 30_000, -30_000, 12_345
    kinds = rng.integers(0, 3, (64, 1))
    rows = rng.normal(size=(64, 96)) * 4.0**kinds
    huge = np.rint(rng.normal(0, 2e6, (64, 48)))
    few = np.where(
        rng.random((64, 64)) < 0.97, 5, rng.integers(-(2**31), 2**31, (64, 64))
    )
    runs = {
        n: rng.integers(0, 1 << n, (8 * n, 64)).repeat(8 // n, 0) for n in (1, 2, 4)
    }
    return {
        "constant": entropy_code(np.full((2, 64, 64), -3, "i1")),
        "bits": entropy_code(rng.random((64, 128)) < 0.02),
        **{f"runs_{n}": entropy_code((x - n).astype("i1")) for n, x in runs.items()},
        "stack": entropy_code(np.rint(rng.normal(0, 3, (3, 64, 48))).astype("i1")),
        "rows": entropy_code(np.rint(rows).astype("i2"), contexts=kinds),
        "lists": entropy_code(wide.astype("i4")),
        "low_bits": entropy_code(huge.astype("i4")),
        "unsigned": entropy_code(few.astype("i4").view("u4")),
        "many_lanes": entropy_code(rng.binomial(9, 0.2, (160, 128)).astype("u1")),
    }


def coded_floats(rng):
    """Floats by every split, with exceptions, short tails, classes; and as integers."""
    numbers = rng.normal(0, 0.02, (2, 64, 40)).astype("f4")
    numbers[0, 0, :4] = 0, np.inf, 1e30, -1e-30
    wide = numbers.copy()
    wide.view("u4")[...] &= np.uint32(0xFFFFFFF0)
    wide[1, 60:] = rng.normal(0, 0.02, (4, 40))
    scales = np.exp2(rng.normal(size=(256, 1)))
    many = (rng.normal(size=(256, 128)) * scales).astype(jnp.float8_e5m2)
    with np.errstate(over="ignore"):
        half = numbers.astype("f2")
    made = {
        "bfloat16": (numbers.astype(jnp.bfloat16), "bfloat16"),
        "pairs": (numbers.astype(jnp.bfloat16), "bfloat16 pairs"),
        "float16": (half, "float16"),
        "float8": (numbers.astype(jnp.float8_e4m3fn), "float8"),
        "short_tails": (wide, "bfloat16"),
        "classes": (many, "float8"),
    }
    out = {}
    for name, (x, split) in made.items():
        words, _ = float_leaf.code_words(x.view(f"u{x.itemsize}"), split, x.ndim - 2)
        out[name] = CodedFloats(words, jnp.dtype(x.dtype), jnp.dtype(x.dtype).name)
    halves = numbers.astype(jnp.bfloat16).view("u2")
    words, _ = float_leaf.code_words(halves, "bfloat16", 1)
    out["halves"] = CodedFloats(words, np.dtype("f4"), "bfloat16")
    whole = entropy_code(np.rint(rng.normal(0, 3, (64, 64))).astype("i4"))
    out["integers"] = CodedFloats(whole, np.dtype("f2"), "float16", -3)
    out["integers_raw"] = CodedFloats(np.arange(4, dtype="i4"), np.dtype("f4"), "", 2)
    return out


def coded_levels(rng):
    """Levels with and without a trellis, in groups, with column scales and stacks."""

    def levels(states, inputs, outputs, groups=1):
        x = np.rint(rng.laplace(0, 2, (inputs, outputs)) * 2.0 ** rng.integers(0, 4))
        x = x.astype("i4")
        places = trellis.walks(outputs)[1]
        state, order = np.zeros((inputs, 1), "i4"), np.arange(outputs)
        if groups > 1:
            order = order.reshape(-1, places // groups, groups).swapaxes(1, 2).ravel()
        for i, column in enumerate(order if states else ()):
            state = np.zeros_like(state) if i % places == 0 else state
            level = x[:, column, None]
            level += (level ^ state) & 1
            state = np.asarray(trellis.advance(state, level, states))
            x[:, column] = level[:, 0]
        return x

    def leaf(x, states=0, groups=1, scales=None, dtype="bfloat16"):
        steps = rng.uniform(0.01, 0.1, x.shape[:-1]).astype(jnp.bfloat16)
        scales = None if scales is None else packed_scales(scales)
        return RateCoded(
            code_levels(x, states, groups), steps, scales, jnp.dtype(dtype)
        )

    escaped = levels(0, 40, 30)
    escaped[3, 4], escaped[5, 6] = 20_000, -300
    stack = np.stack([levels(8, 24, 20), levels(8, 24, 20)])
    return {
        "plain": leaf(levels(0, 40, 30), scales=rng.integers(0, 9, 30, np.uint8)),
        "escaped": leaf(escaped, dtype="float32"),
        "stack": leaf(stack, 8, scales=rng.integers(0, 5, (2, 20), np.uint8)),
        "two_walks": leaf(levels(256, 9, 602), 256),
        "groups": leaf(levels(32, 16, 24, 4), 32, 4),
    }


def arrays(rng):
    """Plain arrays that a file codes, in every coding there is."""
    normal = rng.normal(0, 0.02, (48, 64)).astype("f4")
    outliers = rng.normal(0, 0.02, (48, 64)).astype(jnp.bfloat16)
    outliers[0, :3] = np.inf, 1e38, 1e-38
    short = rng.normal(size=3000).astype("f2").astype("f4")
    short[1000:1500] = rng.normal(size=500)
    few = rng.choice(np.array([0.5, -1, 3, 1e9], "f8"), (50, 41))
    text = np.frombuffer(b"all the same words " * 200, np.uint8)
    mostly = np.zeros((1 << 20) + 999, np.int8)
    mostly[:: 1 << 12] = 7
    return {
        "float32": normal,
        "bfloat16": outliers,
        "float16": normal.astype("f2"),
        "float8": normal.astype(jnp.float8_e4m3fn),
        "halves": normal.astype(jnp.bfloat16).astype("f4"),
        "short_tails": short,
        "bytes": np.minimum(rng.poisson(2.5, 5000), 255).astype("u1") * np.uint8(3),
        "palette": few,
        "mask": rng.random((70, 80)) < 0.01,
        "two_chunks": mostly,
        "repeated": np.tile(rng.integers(0, 1 << 40, 40), 20),
        "text": text,
        "complex": np.tile(rng.normal(size=64).astype("c8"), 8),
    }


def float_arrays(rng):
    """Those that are coded otherwise where they are to be decoded sooner."""
    return {name: x for name, x in arrays(rng).items() if "float" in name}


def unmasked(rng):
    """A pruned weight that is whole again, zeros included."""
    values = whole(rng, (5, 4)) * (rng.uniform(size=(5, 4)) < 0.5)
    return {"sparse_whole": jc.Sparse(values.astype(np.float32), None)}


TREES = {
    "dtypes": (every_dtype, "none"),
    "containers": (containers, "none"),
    "frozen": (frozen, "none"),
    "unmasked": (unmasked, "none"),
    "quantized": (quantized_leaves, "none"),
    "leaves": (other_leaves, "none"),
    "integers": (coded_integers, "none"),
    "floats": (coded_floats, "none"),
    "levels": (coded_levels, "none"),
    "codings": (arrays, "size"),
    "fast_codings": (float_arrays, "decode"),
}

"""What the leaf types of docs/format.md stand for, in plain NumPy: for `read_file`.

Each function takes the parts of a leaf, dense, and its static fields, and returns an
array before it is rounded to the dtype of the leaf.
"""

import functools
import math

import numpy as np
from read_coded_leaves import read_integers, read_levels, read_words
from read_codings import cast, from_bits, unpack

# Quantized

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    "f4",
)
BYTES = np.arange(256, dtype="u1")
LEVELS = {  # what each code stands for
    **{"nf4": NF4, "e2m1": from_bits(BYTES[:16], "float4_e2m1fn")},
    **{
        "e4m3": from_bits(BYTES, "float8_e4m3fn"),
        "e5m2": from_bits(BYTES, "float8_e5m2"),
    },
    "e8m0": from_bits(BYTES, "float8_e8m0fnu"),
}


def spread(step, block, inputs):
    """Steps `[..., blocks, outputs]` of all inputs."""
    if step is None or step.shape[-2] == 1:
        return step
    return np.repeat(step, block, axis=-2)[..., :inputs, :]


def decode_grid(codes, scale, zero, negative, grid, bits):
    """Values of codes: one product of float32 each."""
    if grid in LEVELS:
        return LEVELS[grid][codes] * scale
    codes = codes.astype("i4")
    if grid == "symmetric":
        codes = 2 * codes - 1 if bits == 1 else codes - (1 << bits - 1)
    elif grid == "asymmetric":
        codes = codes - zero.astype("i4")
    elif grid == "sign_split":
        codes = codes - ((1 << bits[1]) - 1)
        scale = np.where(codes > 0, scale, negative)
    elif grid == "offset":
        return codes.astype("f4") * scale + zero
    elif grid == "affine":
        return (codes.astype("f4") - zero) * scale
    else:
        raise NotImplementedError(f"the grid {grid}")
    return codes.astype("f4") * scale


def encode_grid(x, scale, zero, negative, grid, bits):
    """The codes nearest to x, for `FakeQuantized`."""
    if grid in LEVELS:
        levels = np.where(np.isfinite(LEVELS[grid]), LEVELS[grid], 0)
        listed, first = np.unique(levels, return_index=True)
        middles, ratio = (listed[1:] + listed[:-1]) / 2, (x / scale).astype("f4")
        rank = np.searchsorted(middles, ratio)
        tie = (ratio == middles[np.minimum(rank, middles.size - 1)]) & (
            levels.size > 16
        )
        return first[rank + (tie & (first[rank] & 1 > 0))]
    if grid == "symmetric":
        half = 1 << bits - 1
        near = np.clip(np.rint(x / scale), -half, half - 1) + half
        return x >= 0 if bits == 1 else near
    if grid == "asymmetric":
        return np.clip(np.rint(x / scale) + zero, 0, (1 << bits) - 1)
    if grid == "affine":
        return np.clip(np.rint(x / scale + zero), 0, (1 << bits) - 1)
    if grid == "offset":
        near = np.rint((x - zero) / np.where(scale == 0, 1, scale))
        return np.clip(near, 0, (1 << bits) - 1)
    lowest, highest = 1 - (1 << bits[1]), (1 << bits[0]) - 1
    return (
        np.clip(np.rint(x / np.where(x > 0, scale, negative)), lowest, highest) - lowest
    )


def steps_of(parts, static, inputs):
    steps = (parts[k] for k in ("scale", "zero_point", "negative_scale"))
    return [spread(step, static["block"], inputs) for step in steps]


def quantized(parts, static):
    steps = steps_of(parts, static, parts["codes"].shape[-2])
    return decode_grid(parts["codes"], *steps, static["grid"], static["bits"])


def fake_quantized(parts, static):
    """The weight as it will be once its steps are stored, as `scale_dtype`."""
    kind, weight = static["scale_dtype"], parts["weight"]
    least = 2.0**-14 if kind == "float16" else 2.0**-120
    scale, zero, negative = steps_of(parts, static, weight.shape[-2])

    def stored(step):
        size = cast(np.maximum(np.abs(step), np.float32(least)), kind).astype("f4")
        return np.copysign(np.where(step == 0, np.float32(1), size), step)

    steps = [None if x is None else stored(x) for x in (scale, negative)]
    if zero is not None and zero.dtype.kind == "f":
        zero = cast(zero, kind).astype("f4")
    arguments = steps[0], zero, steps[1], static["grid"], static["bits"]
    return decode_grid(encode_grid(weight, *arguments).astype("i4"), *arguments)


# Other leaf types


def sparse(parts, static):
    if parts["mask"] is None:
        return parts["values"]
    mask = np.repeat(
        np.repeat(parts["mask"] > 0, static["block"][0], -2), static["block"][1], -1
    )
    values, flat = parts["values"], parts["values"].shape[-1] != mask.shape[-1]
    out = np.zeros(mask.shape, values.dtype)
    for i in np.ndindex(mask.shape[:-2]):
        for o in range(mask.shape[-1]):
            done = int(mask[i][:, :o].sum()) if flat else 0
            rows, column = np.flatnonzero(mask[i][:, o]), 0 if flat else o
            out[i][rows, o] = values[i][done : done + rows.size, column]
    return out


def mixed(parts, static):
    axis = static["axis"]
    both = np.concatenate([parts["kept"], parts["rest"]], axis)
    where = np.expand_dims(np.argsort(parts["order"], -1), -3 - axis)
    return np.take_along_axis(both, where, axis)


def reshaped(parts, static):
    inner, order, stack = parts["inner"], static["order"], static.get("stack", ())
    lead = inner.ndim - 2
    x = inner.reshape(*inner.shape[:-2], *static["sizes"])
    x = x.transpose(*range(lead), *(x.ndim + axis for axis in order))
    return np.moveaxis(x, range(lead), stack if len(stack) == lead else range(lead))


def product(factors, inputs):
    """Columns of factors `[..., size, rank]`, multiplied out for inputs and outputs."""
    sides = []
    for side in (factors[:inputs], factors[inputs:]):
        out = side[0].astype("f8")
        for factor in side[1:]:
            out = out[..., :, None, :] * factor[..., None, :, :]
            out = out.reshape(*out.shape[:-3], -1, out.shape[-1])
        sides.append(out)
    return sides[0] @ np.swapaxes(sides[1], -1, -2)


def tucker(parts, static):
    x, count = parts["core"].astype("f8"), len(parts["factors"])
    stack = x.shape[: x.ndim - count]
    for axis, factor in enumerate(parts["factors"]):
        if factor is not None:
            x = np.moveaxis(x, len(stack) + axis, -1)
            flat = x.reshape(*stack, -1, x.shape[-1]) @ np.swapaxes(factor, -1, -2)
            x = flat.reshape(*x.shape[:-1], flat.shape[-1])
            x = np.moveaxis(x, -1, len(stack) + axis)
    inputs = math.prod(x.shape[len(stack) :][: static["inputs"]])
    return x.reshape(*stack, inputs, -1)


def add_terms(parts, static):
    wide = np.promote_types(parts["terms"][0].dtype, "f4")
    return functools.reduce(np.add, (term.astype(wide) for term in parts["terms"]))


def scaled(parts, static):
    return parts["weight"] * parts["factors"][..., None].astype("f4")


def rate_coded(parts, static):
    x = parts["levels"].astype("f4") * parts["steps"][..., None].astype("f4")
    if parts["scales"] is not None:
        x = x * np.exp2(-parts["scales"].astype("f8") / 4).astype("f4")
    return x


def coded_floats(parts, static):
    bits, power = parts["bits"], static.get("power")
    if power is not None:
        return bits.astype("f8") * 2.0**power
    return from_bits(bits, static["coded"])


LEAVES = {
    "Packed": lambda p, s: unpack(p["packed"], s["bits"], s["length"], s["axis"]),
    "Coded": read_integers,
    "CodedWords": lambda p, s: read_words(p["stream"], s),
    "CodedFloats": coded_floats,
    "CodedLevels": read_levels,
    "RateCoded": rate_coded,
    "Quantized": quantized,
    "FakeQuantized": fake_quantized,
    "Scaled": scaled,
    "Sparse": sparse,
    "Mixed": mixed,
    "Reshaped": reshaped,
    "Sum": add_terms,
    "LowRank": lambda p, s: p["left"].astype("f8") @ p["right"].astype("f8"),
    "CP": lambda p, s: product(p["factors"], s["inputs"]),
    "Tucker": tucker,
}

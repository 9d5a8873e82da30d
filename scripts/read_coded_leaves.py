"""The entropy-coded leaf types of docs/format.md in plain NumPy: for `read_leaves`."""

import functools
import math

import numpy as np
from read_codings import Record, packing, read_stream, require, unpack


def read_words(stream, static):
    """The words of a `CodedWords`."""
    data, count = Record(stream), math.prod(static["trailing"])
    lead = data.numbers(data.numbers(1)[0] - 1)
    sizes, size = data.numbers(math.prod(lead)), np.dtype(static["dtype"]).itemsize
    out = [read_stream(data.take(n), static["split"], size, count) for n in sizes]
    return np.reshape(out, (*lead, *static["trailing"]))


# Asymmetric numeral systems


def read_lanes(data, slices, lanes, wide=None):
    """Words, lengths and states of each slice; `wide`: bytes of a length, if known."""
    if wide is not None:
        states = data.array("<u4", slices, lanes)
    size = wide or data.take(1)[0]
    lengths = data.array(f"<u{size}", slices, lanes).astype("i8")
    if wide is None:
        states = data.array("<u4", slices, lanes)
    words = [data.array("<u2", int(row.sum())) for row in lengths]
    return list(zip(words, lengths, states, strict=True))


def decode(lane, sizes, steps, tables, values, escape=0, follow=None):
    """Symbols `[steps, lanes]`; `tables[t]` are those of step t, plus `follow`'s."""
    words, lengths, x = lane
    words, x = np.append(words, [0, 0]).astype("i8"), x.astype("i8")
    sizes = sizes.astype("i8")
    starts, at = np.cumsum(sizes, 1) - sizes, np.cumsum(lengths) - lengths
    slots = np.stack([np.repeat(np.arange(row.size), row) for row in sizes])
    ends, out, extra = at + lengths, np.zeros((steps, x.size), "i8"), 0
    for t in range(steps):
        table, slot = tables[t] + extra, x & 4095
        column = slots[table, slot]
        x = sizes[table, column] * (x >> 12) + slot - starts[table, column]
        short = x < 1 << 16
        x = np.where(short, x << 16 | words[at], x)
        at = at + short
        symbol = values[table, column]
        if escape:
            escaped = column == sizes.shape[1] - 1
            raw = words[at].astype("i2") if escape == 1 else words[at]
            raw = raw if escape == 1 else (raw | words[at + 1] << 16).astype("i4")
            symbol, at = np.where(escaped, raw, symbol), at + escaped * escape
        out[t] = symbol
        extra = follow(symbol) if follow else 0
    require((x == 1 << 16).all() and (at == ends).all(), "a lane ends elsewhere")
    return out


def read_integers(parts, static):
    """The integers of a `Coded`."""
    data, trailing = Record(parts["stream"]), static["trailing"]
    width, escape, low = static["width"], static["escape"], static["low_bits"]
    lead = data.numbers(data.numbers(1)[0] - 1)
    lanes, contexts, columns, listed = data.numbers(4)
    lanes, slices, rows = lanes - 1, math.prod(lead), list(trailing)
    base = data.signed(slices) if width else None
    if width:
        axis, rows[axis] = packing(trailing, width)
    sizes = np.zeros((slices * contexts, columns), "i8")
    values = np.tile(np.arange(columns), (len(sizes), 1))
    for i in range(len(sizes)):
        if listed == 1:
            sizes[i] = data.numbers(columns)
            continue
        (count,) = data.numbers(1)
        numbers = data.numbers(2 * count + (escape > 0))
        first = [-(n + 1) // 2 if n & 1 else n // 2 for n in numbers[:1]]
        steps = [*first, *numbers[1:count]][:count]
        values[i, :count] = np.cumsum(steps) + np.arange(count)
        sizes[i, :count] = numbers[count : 2 * count]
        if escape:
            sizes[i, -1] = numbers[-1]
    count, out = math.prod(rows), np.zeros((slices, math.prod(rows)), "i8")
    kinds = np.broadcast_to(parts.get("contexts", np.uint8(0)), (*lead, *rows))
    streams = read_lanes(data, slices, lanes)
    for i, lane in enumerate(streams if lanes else ()):
        steps, own = -(-count // lanes), slice(i * contexts, (i + 1) * contexts)
        kind = np.zeros(steps * lanes, "i8")
        kind[:count] = kinds.reshape(slices, -1)[i]
        kind = kind.reshape(steps, lanes)
        found = decode(lane, sizes[own], steps, kind, values[own], escape)
        out[i] = found.reshape(-1)[:count]
    out = out.reshape(*lead, *rows)
    if width:
        out = out.astype("u1")
        out = unpack(out, width, trailing[axis], axis) if width < 8 else out
        out = out + np.reshape(base, (*lead, *[1] * len(trailing)))
    elif low:
        axis, _ = packing(trailing, low)
        out = out << low | unpack(parts["low"], low, trailing[axis], axis)
    return out.astype(static["dtype"])


# Levels of a trellis


def exp2(x):
    whole = np.floor(x + 0.5)
    part, series = (x - whole) * 0.6931471805599453, np.ones_like(x)
    for n in range(16, 0, -1):
        series = 1 + series * part / n
    return np.ldexp(series, whole.astype("i8"))


def log2(x):
    mantissa, exponent = np.frexp(x)
    ratio = (mantissa - 0.7071067811865476) / (mantissa + 0.7071067811865476)
    square, series = ratio * ratio, np.zeros_like(x)
    for n in range(25, 0, -2):
        series = series * square + 1 / n
    return exponent - 0.5 + 2 * ratio * series / 0.6931471805599453


SHAPES = (0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)


@functools.cache
def density(scale, shape, parities, parity):
    """Frequencies of the symbols -255 to 255, and of all others."""
    symbols = np.arange(-1020, 1021)
    levels = np.abs(parities * symbols + parity)
    logs = log2(np.maximum(levels, 1).astype("f8"))
    powers = exp2(SHAPES[shape] * (logs - (scale / 8 - 4)))
    powers = np.where(levels > 0, powers, 0.0)
    weights = exp2(-np.minimum(powers - powers.min(), 1000.0))
    total = np.float64(0)
    for weight in weights:  # in this order
        total += weight
    weights = weights[np.abs(symbols) <= 255]
    sizes = np.floor(weights * (4095 / total) + 0.5).astype("i8")
    rest = 4096 - int(sizes.sum())
    if rest < 1:
        sizes[np.argsort(-sizes, kind="stable")[: 1 - rest]] -= 1
        rest = 1
    return np.append(sizes, rest)


CHECKS = {  # by number of states of the trellis
    **{8: (0o13, 0o04), 16: (0o23, 0o04), 32: (0o45, 0o10), 64: (0o103, 0o024)},
    **{128: (0o235, 0o126), 256: (0o515, 0o362)},
}


def read_levels(parts, static):
    """The integers of a `CodedLevels`."""
    data, places, trellis = Record(parts["stream"]), static["places"], static["trellis"]
    lead = data.numbers(data.numbers(1)[0] - 1)
    inputs, outputs, lanes, kinds, *bits, wide = data.numbers(7)
    slices, parities = math.prod(lead), 2 if trellis else 1
    edges = data.array("u1", slices, kinds - 1)
    parameters = data.array("u1", slices, kinds, 2).tolist()
    rows, columns = (
        unpack(data.array("u1", slices, packing((size,), n)[1]), n, size, -1)
        for n, size in zip(bits, (inputs, outputs), strict=True)
    )
    walks = -(-outputs // places)
    each = -(-inputs * walks // lanes)
    streams = read_lanes(data, slices, lanes, wide)
    out = []
    for i, lane in enumerate(streams):
        both = ((r, parity) for parity in range(parities) for r in parameters[i])
        sizes = np.stack([density(*r, parities, parity) for r, parity in both])
        values = (
            parities * np.arange(-255, 257)
            + np.repeat(np.arange(parities), kinds)[:, None]
        )
        context = np.zeros((inputs, walks * places), "i8")
        sums = rows[i][:, None].astype("i8") + columns[i]
        context[:, :outputs] = (sums[..., None] >= edges[i]).sum(-1)
        tables = np.zeros((each * lanes, places), "i8")
        tables[: inputs * walks] = context.reshape(-1, places)
        tables = tables.reshape(lanes, -1).T
        state = {"of": np.zeros(lanes, "i8"), "place": 0}

        def follow(level, state=state):
            low, high = (check >> 1 for check in CHECKS[trellis])
            s = state["of"]
            s = s >> 1 ^ (s & 1) * low ^ (level >> 1 & 1) * high
            state["place"] = (state["place"] + 1) % places
            state["of"] = s if state["place"] else np.zeros_like(s)
            return (state["of"] & 1) * kinds

        found = decode(
            lane, sizes, each * places, tables, values, 1, trellis and follow
        )
        found = found.T.reshape(-1, places)[: inputs * walks].reshape(inputs, -1)[
            :, :outputs
        ]
        groups = static.get("groups", 1)
        if groups > 1:
            found = found.reshape(inputs, -1, groups, places // groups).swapaxes(-1, -2)
        out.append(found.reshape(inputs, outputs))
    return np.reshape(out, (*lead, inputs, outputs))

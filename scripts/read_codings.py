"""The codings of docs/format.md in plain NumPy: `read_file` uses them."""

import math
import zlib

import numpy as np
import zstandard


def require(fits, what):
    if not fits:
        raise ValueError(f"damaged, or not of format 3: {what}")


# Numbers

FLOATS = {  # bits of exponent and mantissa, bias, what the largest exponent means
    **{"float8_e3m4": (3, 4, 3, "inf"), "float8_e4m3": (4, 3, 7, "inf")},
    **{"float8_e4m3fn": (4, 3, 7, "nan"), "float8_e5m2": (5, 2, 15, "inf")},
    **{"float8_e4m3fnuz": (4, 3, 8, "uz"), "float8_e5m2fnuz": (5, 2, 16, "uz")},
    **{"float8_e4m3b11fnuz": (4, 3, 11, "uz"), "float4_e2m1fn": (2, 1, 1, "")},
}


def itemsize(dtype):
    return np.dtype(dtype).itemsize if hasattr(np, dtype) else 1 + (dtype == "bfloat16")


def from_bits(words, dtype):
    """The numbers whose bits are unsigned words."""
    if hasattr(np, dtype):
        return words.view(dtype)
    if dtype == "bfloat16":
        return (words.astype("u4") << 16).view("f4")
    codes = words.astype("i4")
    if dtype == "float8_e8m0fnu":
        return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127)).astype("f4")
    if dtype not in FLOATS:  # integers in the lowest 2 or 4 bits of a byte
        limit = 1 << int(dtype.lstrip("uint"))
        codes = codes % limit
        return np.where(2 * codes >= limit, codes - limit * (dtype[0] == "i"), codes)
    exponent, mantissa, bias, special = FLOATS[dtype]
    power, part = codes >> mantissa & (1 << exponent) - 1, codes & (1 << mantissa) - 1
    value = part + np.where(power > 0, 1 << mantissa, 0)
    value = np.ldexp(value.astype("f4"), np.maximum(power, 1) - bias - mantissa)
    last = power == (1 << exponent) - 1
    if special == "inf":
        value = np.where(last, np.where(part > 0, np.nan, np.inf), value)
    elif special == "nan":
        value = np.where(last & (part == (1 << mantissa) - 1), np.nan, value)
    value = np.where(codes >> exponent + mantissa, -value, value)
    lost = (codes == 128) & (special == "uz") | np.isnan(value)
    return np.where(lost, np.nan, value).astype("f4")


def cast(x, dtype):
    """Numbers rounded to a dtype, ties to even."""
    if hasattr(np, dtype) or dtype != "bfloat16":
        return x.astype(dtype) if hasattr(np, dtype) else x
    bits = np.ascontiguousarray(x, "f4").view("u4")
    bits = bits + np.uint32(0x7FFF) + (bits >> 16 & 1) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), bits.view("f4")).reshape(x.shape)


def plain(x):
    """A static field; a dtype is its name."""
    if type(x) is dict:
        return float(x["float"]) if "float" in x else x["dtype"]
    return tuple(map(plain, x)) if type(x) is list else x


class Record:
    """Bytes, read from the front."""

    def __init__(self, data):
        self.left = memoryview(data)

    def take(self, size):
        taken, self.left = self.left[:size], self.left[size:]
        require(len(taken) == size, "a record ends early")
        return taken

    def array(self, dtype, *shape):
        raw = self.take(math.prod(shape) * np.dtype(dtype).itemsize)
        return np.frombuffer(raw, dtype).reshape(shape)

    def number(self):
        number = shift = 0
        while True:
            (byte,) = self.take(1)
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    def numbers(self, count):
        """So many numbers; a run of zeros is a 0 and its length less one."""
        out = []
        while len(out) < count:
            number = self.number()
            out += [number] if number else [0] * (self.number() + 1)
        require(len(out) == count, "a run of zeros past its list")
        return out

    def signed(self, count):
        return [-(n + 1) // 2 if n & 1 else n // 2 for n in self.numbers(count)]

    def frame(self, size, out):
        data = zstandard.ZstdDecompressor().decompressobj().decompress(self.take(size))
        require(len(data) == out, f"a frame of {len(data)} bytes, not {out}")
        return np.frombuffer(data, "u1")


# Packed codes


def widths(bits):
    return (*[8] * (bits // 8), *(size for size in (4, 2, 1) if bits & size))


def fields(packed, size):
    """Codes of so many bits `[..., bytes, 8 / size]`, lowest bits first."""
    shifts = np.arange(0, 8, size, dtype="u1")
    return packed[..., None] >> shifts & np.uint8(255 >> 8 - size)


def unpack(packed, bits, length, axis):
    """Codes packed along an axis, uint32."""
    packed, start = np.moveaxis(packed, axis, -1), 0
    codes = np.zeros((*packed.shape[:-1], length), "u4")
    for size in widths(bits):
        rows = -(-length * size // 8)
        part = fields(packed[..., :rows], size).reshape(*codes.shape[:-1], -1)
        codes |= part[..., :length].astype("u4") << np.uint32(start)
        packed, start = packed[..., rows:], start + size
    return np.moveaxis(codes, -1, axis)


def packing(shape, bits):
    """The axis along which codes of this shape are packed, and its bytes."""
    rows = [sum(-(-n * size // 8) for size in widths(bits)) for n in shape]
    inputs, outputs = shape[-2:] if len(shape) > 1 else (0, shape[-1])
    many = inputs >= 8 or inputs * rows[-1] >= rows[-len(shape[-2:])] * outputs
    return (-2, rows[-2]) if len(shape) > 1 and many else (-1, rows[-1])


# Coded arrays

SPLITS = {  # bits of a word, low bits kept, whether it has a sign, window of symbols
    **{"bfloat16": (16, 5, 1, 255), "halves": (16, 5, 1, 255)},
    **{"bfloat16 pairs": (16, 7, 1, 15), "float16": (16, 7, 1, 0)},
    **{"float8": (8, 0, 1, 0), "bytes": (8, 0, 0, 0)},
}


def read_stream(data, coding, size, count):
    """The words of a stream of chunks."""
    end = len(data) - 4
    index = Record(data[end - int.from_bytes(data[end:], "little") : end])
    have, width, chunks = index.numbers(3)
    require(have == count, f"{have} words, not {count}")
    sizes, step = index.numbers(chunks), (1 << 20) // width * width
    out, chunk = np.empty(count, f"<u{size}"), Record(data)
    for i, crc in enumerate(index.array("<u4", chunks)):
        raw, part = chunk.take(sizes[i]), out[i * step : (i + 1) * step]
        require(zlib.crc32(raw) == crc, f"the checksum of chunk {i}")
        part[:] = read_chunk(Record(raw), coding, width, part.size, size)
    return out


def read_chunk(data, coding, width, count, size):
    if coding not in ("zstd", "palette"):
        return read_split(data, coding, width, count, size)
    listed, share = data.take(2) if coding == "palette" else (0, 0)
    if not share:
        return data.frame(len(data.left), count * size).view(f"<u{size}")
    words = data.array(f"<u{size}", listed + 1)
    places = read_split(data, "bytes", width, -(-count // share), 1)
    return words[fields(places, 8 // share).reshape(-1)[:count]]


def read_split(data, coding, width, count, size):
    """Words of coded symbols and of bits kept as they are."""
    bits, low, signed, window = SPLITS[coding]
    head = Record(data.take(int.from_bytes(data.take(2), "little")))
    _, base, classes, missed, frames, *tails = head.numbers(8)
    frames = np.reshape(head.numbers(2 * frames), (-1, 2)).tolist()
    blocks, paired = -(-count // width), window == 15
    kinds = data.frame(classes, blocks) if classes else np.zeros(blocks, "u1")
    symbols = [data.frame(n, held * width >> paired) for n, held in frames]
    symbols = np.concatenate(symbols).reshape(blocks, -1)
    symbols = symbols[np.argsort(np.argsort(kinds, kind="stable"))]
    spots, values = data.array("<u4", missed), data.array(f"<u{bits // 8}", missed)
    rests = data.array("u1", blocks, width * (low + signed) // 8)

    def spread(packed, size):  # codes of a byte lie a part of the block apart
        return fields(packed, size).swapaxes(1, 2).reshape(blocks, width).astype("u4")

    rest, at = np.zeros((blocks, width), "u4"), 0
    for field in widths(low + signed):
        part, rests = np.split(rests, [width * field // 8], axis=1)
        rest, at = rest | spread(part, field) << at, at + field
    words = spread(symbols, 4 if paired else 8)
    words = np.where(words > 0, words + base, 0) << low
    words |= rest & (1 << low) - 1 | rest >> low << bits - 1
    words = words.reshape(-1)[:count].astype(f"<u{size}")
    words[spots] = values
    return words << 16 | read_tails(data, tails, count) if size == 4 else words


def read_tails(data, sizes, count):
    """The lower halves of words of four bytes."""
    flags, packed, raw = sizes
    if not flags:
        return data.array("<u2", count)
    segments = count // 128
    short = np.unpackbits(data.frame(flags, -(-segments // 8)))[:segments] > 0
    short = np.append(np.repeat(short, 128), np.zeros(count % 128, bool))
    first, some = int.from_bytes(data.take(4), "little"), np.count_nonzero(short)
    out, lowest = np.empty(count, "<u2"), data.frame(first, some)
    out[short] = data.frame(packed - 4 - first, some).astype("<u2") << 8 | lowest
    out[~short] = data.array("<u2", raw // 2)
    return out

"""Frequency tables from two numbers: a generalized Gaussian at the integers.

A table is computed again where a file is read, so that every machine must find the same
frequencies: only sums, products and quotients of float64 are used, which IEEE 754
defines to the last bit, never a library's logarithm or exponential.
"""

import functools

import numpy as np

from jaxcompress.coding.rans import TOTAL

SCALES = 128  # eighths of an octave, from 2^-4
SHAPES = (0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)
REACH = 255  # columns to each side of zero
WIDTH = 2 * REACH + 2  # and one for what is outside
_HALF_ROOT = 0.7071067811865476
_LN2 = 0.6931471805599453


@functools.cache
def table(scale: int, shape: int, parities: int, parity: int) -> np.ndarray:
    """Return frequencies uint16 `[WIDTH]` of the symbols -255 to 255, then of all
    others.

    The symbol `m` is the level `parities * m + parity`, whose density is
    `exp2(-|level / s|^b)`, with `s = 2^(scale / 8 - 4)` and `b = SHAPES[shape]`. Those
    that would get less than half of 1 / 4096 get none: they are escaped.
    """
    symbols = np.arange(-4 * REACH, 4 * REACH + 1)
    levels = np.abs(parities * symbols + parity)
    logs = log2(np.maximum(levels, 1).astype(np.float64))
    powers = exp2(SHAPES[shape] * (logs - (scale / 8 - 4)))
    powers = np.where(levels > 0, powers, 0.0)
    density = exp2(-np.minimum(powers - powers.min(), 1000.0))
    total = np.float64(0)
    for term in density:  # in this order, whatever the machine
        total += term
    density = density[np.abs(symbols) <= REACH]
    sizes = np.floor(density * ((TOTAL - 1) / total) + 0.5).astype(np.int64)
    rest = TOTAL - int(sizes.sum())
    if rest < 1:  # rounded up too often: the likeliest give
        sizes[np.argsort(-sizes, kind="stable")[: 1 - rest]] -= 1
        rest = 1
    out = np.append(sizes, rest).astype(np.uint16)
    out.setflags(write=False)
    return out


def exp2(x: np.ndarray) -> np.ndarray:
    """Return two to the power of float64 `x`, to about 1e-15, the same on every
    machine.
    """
    whole = np.floor(x + 0.5)
    part = (x - whole) * _LN2
    series = np.ones_like(part)
    for n in range(16, 0, -1):
        series = 1 + series * part / n
    return np.ldexp(series, whole.astype(np.int64))


def log2(x: np.ndarray) -> np.ndarray:
    """Return logarithm to base 2 of float64 `x` > 0, likewise."""
    mantissa, exponent = np.frexp(x)
    ratio = (mantissa - _HALF_ROOT) / (mantissa + _HALF_ROOT)
    square, series = ratio * ratio, np.zeros_like(ratio)
    for n in range(25, 0, -2):
        series = series * square + 1 / n
    return exponent - 0.5 + 2 * ratio * series / _LN2

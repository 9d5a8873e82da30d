"""Round weights to integers, and prove that no dot product with them rounds.

A float32 sum of integers is exact, in any order and with or without fused
multiply-add, while no partial sum passes 2**24. For a column `w` of integer weights and
inputs of magnitude `bound` at most, no partial sum passes `bound * sum(|w|)`. The
proof therefore takes the largest bound that the rounded weights allow, and splits a
sum in parts where that bound would be too coarse.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

EXACT = (1 << 24) - 1  # float32 holds every integer up to here
LARGEST_WEIGHT = 127
WANTED_BOUND = 512  # inputs get ten bits or more ...
LEAST_BOUND = 64  # ... and never less than seven
MOST_PARTS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """An integer linear map: `x @ (weight * scale * 2**(exponent - 15)) + bias`.

    Invariant: for inputs of magnitude `bound`, the sum over each of the `parts` slices
    of the inputs stays within 2**24 - 1.

    Args:
      weight: int8 `[inputs, outputs]`, at most 127 in magnitude.
      scale: int32 `[outputs]`, from 1 to 2**15.
      exponent: int32 scalar.
      bound: int32 scalar; the inputs are rounded to integers of this magnitude.
      bias: None, or (int32 `[outputs]`, int32 scalar exponent).
      parts: slices of the inputs that are summed in float32; their sums in int32.
    """

    weight: Any
    scale: Any
    exponent: Any
    bound: Any
    bias: Any
    parts: int = dataclasses.field(metadata={"static": True})


def round_kernel(
    name: str, kernel: np.ndarray, bias: np.ndarray | None = None, parts: int = 1
) -> Linear:
    """Round a kernel `[inputs, outputs]` to int8 with a scale per output.

    Scales are rounded to Q15 first, and the weights to these scales. At least `parts`
    parts are taken. Raises ValueError where a weight is not finite, or where no number
    of parts allows inputs of seven bits; it names the leaf and the bound.
    """
    kernel = finite(name, kernel)
    largest = np.abs(kernel).max(axis=0)
    _, exponent = math.frexp(largest.max() / LARGEST_WEIGHT)
    step = np.ldexp(1.0, exponent - 15)
    scale = np.clip(np.ceil(largest / LARGEST_WEIGHT / step), 1, 1 << 15)
    weight = np.rint(kernel / (scale * step))
    weight = np.clip(weight, -LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.int8)
    parts, bound = prove(name, weight, parts)
    return Linear(
        weight,
        scale.astype(np.int32),
        np.int32(exponent),
        np.int32(bound),
        None if bias is None else round_vector(name, bias),
        parts,
    )


def prove(name: str, weight: np.ndarray, parts: int = 1) -> tuple[int, int]:
    """Return parts and the bound on inputs for which no float32 sum of a part can
    round.

    The bound is `(2**24 - 1) // max(sum(|weight|))` over outputs and parts. Raises
    ValueError, naming the leaf, where 64 parts do not allow a bound of 64.
    """
    magnitudes = np.abs(weight.astype(np.int64))
    while True:
        sums = [x.sum(axis=0).max() for x in split(magnitudes, parts)]
        bound = min(EXACT // max(1, int(max(sums))), 1 << 14)
        if bound >= WANTED_BOUND or 2 * parts > min(MOST_PARTS, weight.shape[0]):
            break
        parts *= 2
    if bound < LEAST_BOUND:
        raise ValueError(
            f"{name}: the absolute weights of one output sum to {int(max(sums))} in "
            f"one of {parts} parts of {weight.shape[0]} inputs, which allows inputs of "
            f"magnitude {bound} in exact float32 sums; {LEAST_BOUND} is wanted"
        )
    return parts, bound


def split(x: Any, parts: int, axis: int = 0) -> list[Any]:
    """Return slices along an axis, of equal length but for the last."""
    length = -(-x.shape[axis] // parts)
    index = [slice(None)] * x.ndim
    slices = []
    for start in range(0, x.shape[axis], length):
        index[axis] = slice(start, start + length)
        slices.append(x[tuple(index)])
    return slices


def round_vector(name: str, vector: np.ndarray) -> tuple[np.ndarray, np.int32]:
    """Return a vector as int32 in Q15, at most one in magnitude, and its exponent."""
    vector = finite(name, vector)
    _, exponent = math.frexp(np.abs(vector).max())
    values = np.rint(np.ldexp(vector, 15 - exponent))
    return values.astype(np.int32), np.int32(exponent - 15)


def rotary_table(speeds: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines in Q15, int32 `[count, pairs]`, of `position * speed`.

    Computed with integers of 96 bits, so that no mathematical library takes part.
    """
    one = 1 << 96
    cosines = np.zeros((count, len(speeds)), np.int32)
    sines = np.zeros_like(cosines)
    for pair, speed in enumerate(speeds):
        numerator, denominator = float(speed).as_integer_ratio()
        angle = (numerator * one) // denominator
        turn = [0, 0]  # cosine and sine of one step, by their series
        term = one
        for k in range(1, 40):
            turn[(k - 1) % 2] += term if (k - 1) % 4 < 2 else -term
            term = (term * angle >> 96) // k
        cosine, sine = one, 0
        for position in range(count):
            cosines[position, pair] = (cosine + (1 << 80)) >> 81
            sines[position, pair] = (sine + (1 << 80)) >> 81
            cosine, sine = (
                (cosine * turn[0] - sine * turn[1]) >> 96,
                (sine * turn[0] + cosine * turn[1]) >> 96,
            )
    return cosines, sines


def finite(name: str, x: Any) -> np.ndarray:
    """Return the array in float64; ValueError, naming the leaf, on NaN or infinity."""
    x = np.asarray(x, np.float64)
    bad = x.size - int(np.isfinite(x).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {x.size} weights are NaN or infinite; an integer model "
            "needs finite ones"
        )
    return x

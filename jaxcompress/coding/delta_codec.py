"""Words as differences from those of another array: small where the two are alike.

Floating-point numbers are put in their order first, as integers of a sign and a
magnitude, so that numbers next to each other differ by one. Differences are folded
(0, -1, 1, -2, ... as 0, 1, 2, 3, ...) and laid out byte by byte: upper bytes of small
differences are zeros, which cost nothing once coded. All of it modulo the size of a
word, so that any two arrays of bits, NaN included, have a difference.
"""

import jax.numpy as jnp
import numpy as np


def difference(array: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return the bytes of folded differences: uint8 `[bytes of a number, numbers]`.

    Args:
      array, base: flat, of one dtype and size.
    """
    number, other = _ordered(array), _ordered(base)
    np.subtract(number, other, out=number)
    top = number.dtype.type(8 * number.dtype.itemsize - 1)
    negative = (number >> top).astype(bool)
    np.left_shift(number, number.dtype.type(1), out=number)
    np.invert(number, out=number, where=negative)
    return np.ascontiguousarray(number.view(np.uint8).reshape(array.size, -1).T)


def restore(parts: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return the array whose `difference` from `base` has these bytes; flat, of its
    dtype.
    """
    number = np.ascontiguousarray(parts.T).reshape(-1).view(_unsigned(base.dtype))
    one = number.dtype.type(1)
    odd = (number & one).astype(bool)
    np.right_shift(number, one, out=number)
    np.invert(number, out=number, where=odd)
    np.add(number, _ordered(base), out=number)
    return _turned(number, base.dtype).view(base.dtype)


def _ordered(array: np.ndarray) -> np.ndarray:
    """Return bits as unsigned integers in the order of the numbers; a copy."""
    return _turned(array.view(_unsigned(array.dtype)).copy(), array.dtype)


def _turned(words: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return magnitudes below zero counted from the other end, in place; its own
    inverse.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        top = words.dtype.type(8 * words.dtype.itemsize - 1)
        negative = (words >> top).astype(bool)
        mask = words.dtype.type((1 << int(top)) - 1)
        np.bitwise_xor(words, mask, out=words, where=negative)
    return words


def _unsigned(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"<u{np.dtype(dtype).itemsize}")

"""What the definitions say, in NumPy float64, one weight and one block at a time."""

import itertools
import math

import numpy as np


def stretches(inputs, block):
    """`(start, stop)` of the consecutive inputs that share a step."""
    size = inputs if block in (None, "tensor") else block
    return [(i, min(i + size, inputs)) for i in range(0, inputs, size)]


def groups(shape, block):
    """Index pairs `(where in x, where in the steps)` of a matrix of this shape."""
    inputs, outputs = shape
    if block == "tensor":
        return [((slice(None), slice(None)), (0, 0))]
    return [
        ((slice(start, stop), output), (number, output))
        for output in range(outputs)
        for number, (start, stop) in enumerate(stretches(inputs, block))
    ]


def steps_shape(shape, block):
    if block == "tensor":
        return (1, 1)
    return (len(stretches(shape[0], block)), shape[1])


def symmetric_steps(x, bits, block, full_range=False):
    """max|x| / 2^(N-1) per block; with the sign that makes it reachable if asked."""
    scale = np.ones(steps_shape(x.shape, block))
    for where, at in groups(x.shape, block):
        values = np.asarray(x[where], np.float64).ravel()
        largest = max(values, key=abs)
        if bits == 1:
            scale[at] = sum(abs(v) for v in values) / len(values)
        elif largest != 0:
            sign = -math.copysign(1, largest) if full_range else 1
            scale[at] = sign * abs(largest) / 2 ** (bits - 1)
    return scale


def asymmetric_steps(x, bits, block):
    """(max - min) / (2^N - 1) of a range that holds zero, and the code of zero."""
    scale = np.ones(steps_shape(x.shape, block))
    zero = np.zeros(steps_shape(x.shape, block))
    for where, at in groups(x.shape, block):
        values = np.asarray(x[where], np.float64).ravel()
        low, high = min(0.0, values.min()), max(0.0, values.max())
        if high > low:
            scale[at] = (high - low) / (2**bits - 1)
            zero[at] = np.rint(-low / scale[at])
    return scale, zero


def sign_split_steps(x, bits, block):
    """Largest magnitude of each side over two to the power of its bits."""
    sides = []
    for n, sign in zip(bits, (1, -1), strict=True):
        scale = np.ones(steps_shape(x.shape, block))
        for where, at in groups(x.shape, block):
            side = [v for v in sign * np.asarray(x[where], np.float64).ravel() if v > 0]
            if side:
                scale[at] = max(side) / 2**n
        sides.append(scale)
    return sides


def grid_values(grid, bits, scale, zero=None, negative=None):
    """Every value that a code can stand for, in the order of the codes."""
    if grid == "symmetric" and bits == 1:
        return [-scale, scale]
    if grid == "symmetric":
        return [q * scale for q in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
    if grid == "asymmetric":
        return [(q - zero) * scale for q in range(2**bits)]
    positive, other = bits
    below = [-q * negative for q in range(2**other - 1, 0, -1)]
    return [*below, 0.0, *(q * scale for q in range(1, 2**positive))]


def nearest(x, grid, bits, block, scale, zero=None, negative=None):
    """Every weight replaced by the closest value of its grid (float64)."""
    result = np.empty(x.shape)
    for where, at in groups(x.shape, block):
        table = np.array(
            grid_values(
                grid,
                bits,
                float(scale[at]),
                None if zero is None else float(zero[at]),
                None if negative is None else float(negative[at]),
            )
        )
        values = np.asarray(x[where], np.float64)
        far = np.abs(values[..., None] - table)
        result[where] = table[far.argmin(-1)]
    return result


def first_largest(scores, kept):
    """Indices of the `kept` largest of a list, equal ones in order."""
    ranked = sorted(range(len(scores)), key=lambda i: -float(scores[i]))  # stable
    return ranked[:kept]


def oracle_mask(score, sparsity=None, nm=None, scope="leaf"):
    """The mask of one matrix of scores, by sorting whatever competes."""
    inputs, outputs = score.shape
    mask = np.zeros(score.shape, bool)
    if nm and ":" in nm:
        keep, group = map(int, nm.split(":"))
        for o, start in itertools.product(range(outputs), range(0, inputs, group)):
            for i in first_largest(score[start : start + group, o], keep):
                mask[start + i, o] = True
    elif nm:
        rows, columns = map(int, nm.split("x"))
        corners = list(
            itertools.product(range(0, inputs, rows), range(0, outputs, columns))
        )
        norms = [(score[i : i + rows, o : o + columns] ** 2).sum() for i, o in corners]
        for at in first_largest(norms, round((1 - sparsity) * len(corners))):
            i, o = corners[at]
            mask[i : i + rows, o : o + columns] = True
    elif scope == "row":
        for o in range(outputs):
            mask[first_largest(score[:, o], round((1 - sparsity) * inputs)), o] = True
    else:
        kept = first_largest(score.ravel(), round((1 - sparsity) * score.size))
        mask.ravel()[kept] = True
    return mask

"""Contexts of levels: kinds of rows and columns that choose a table."""

import dataclasses
import functools
import itertools

import numpy as np

from jaxcompress.coding import tables
from jaxcompress.coding.levels import generalized_gaussian
from jaxcompress.coding.rans import PRECISION

FINEST = 0.25  # octaves between kinds of rows, and of columns
MOST = 24  # contexts: more gain little, and their tables would not stay in a cache
ESCAPE_BITS = 16
CONTEXT_BITS = 24  # an edge, a scale and a shape


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Tables for levels `[rows, columns]`: the kinds of row and column add up.

    The context of a level is the number of `edges` not above the sum of its two kinds.

    Args:
      rows: uint8 `[rows]`; columns: uint8 `[columns]`.
      edges: uint8 `[contexts - 1]`, increasing.
      parameters: uint8 `[contexts, 2]`, scale and shape as `densities.table` has them.
      bits: what the levels take with these tables.
    """

    rows: np.ndarray
    columns: np.ndarray
    edges: np.ndarray
    parameters: np.ndarray
    bits: float


def fit(levels: np.ndarray, parities: int) -> Contexts:
    """Return the contexts that code levels cheapest.

    Rows and columns are sorted into kinds by the size of their levels. The scales that
    occur are merged, two neighbours at a time, where that loses little; each then gets
    the density that makes it smallest.

    Args:
      levels: int32 `[rows, columns]`.
      parities: 2 where odd and even levels have tables of their own, and the symbol is
        half the level, rounded down; else 1.
    """
    rows, columns = _kinds(levels)
    groups = list(_counts(levels, rows, columns, parities))
    edges = list(range(1, len(groups)))
    costs = [_entropy(group) for group in groups]
    both = [_entropy(a + b) for a, b in itertools.pairwise(groups)]
    while both:
        losses = [
            m - a - b for m, (a, b) in zip(both, itertools.pairwise(costs), strict=True)
        ]
        i = int(np.argmin(losses))
        if losses[i] > CONTEXT_BITS and len(groups) <= MOST:
            break
        groups[i : i + 2] = [groups[i] + groups[i + 1]]
        costs[i : i + 2] = [both[i]]
        del edges[i], both[i]
        for j in range(max(0, i - 1), min(i + 1, len(both))):
            both[j] = _entropy(groups[j] + groups[j + 1])
    parameters, bits = _densities(np.stack(groups))
    return Contexts(rows, columns, np.array(edges, np.uint8), parameters, bits)


def frequencies(parameters: np.ndarray, parities: int) -> np.ndarray:
    """Return tables uint16 `[parities * contexts, width]`: those of even levels, then
    odd.

    Raises ValueError where there is no such density.
    """
    scales, shapes = parameters[:, 0], parameters[:, 1]
    if (scales >= generalized_gaussian.SCALES).any() or (
        shapes >= len(generalized_gaussian.SHAPES)
    ).any():
        raise ValueError("a density with a scale or a shape that does not exist")
    return np.stack(
        [
            generalized_gaussian.table(int(scale), int(shape), parities, parity)
            for parity in range(parities)
            for scale, shape in parameters
        ]
    )


def columns_of(symbols: np.ndarray) -> np.ndarray:
    """Return the column of each symbol in a table that has all of them, or the last."""
    outside = np.abs(symbols) > generalized_gaussian.REACH
    return np.where(
        outside, generalized_gaussian.WIDTH - 1, symbols + generalized_gaussian.REACH
    )


def escaped(columns: np.ndarray, tables: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the columns, the last where a symbol has no place in its table.

    Args:
      columns, tables: integers of one shape.
      sizes: frequencies `[tables, columns]`.
    """
    return np.where(sizes[tables, columns] > 0, columns, generalized_gaussian.WIDTH - 1)


def _kinds(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return kinds of the rows and of the columns, on one scale of octaves."""
    square = np.square(levels.astype(np.float32))
    rows = np.log2(square.mean(axis=1) + 1 / 12) / 2
    columns = np.log2((square * np.exp2(-2 * rows)[:, None]).mean(axis=0) + 1e-3) / 2
    # Levels of 16 bits span 17 octaves by rows and fewer than 40 by columns: the sum
    # of two kinds stays far below 255, which means no edge.
    return tuple(
        np.rint((x - x.min()) / FINEST).astype(np.uint8) for x in (rows, columns)
    )


def _counts(
    levels: np.ndarray, rows: np.ndarray, columns: np.ndarray, parities: int
) -> np.ndarray:
    """Return symbols by scale, parity and column of a table: `[scales, parities,
    width]`.
    """
    scales = int(rows.max()) + int(columns.max()) + 1
    where = (rows[:, None].astype(np.int64) + columns[None]) * parities
    if parities == 2:
        where += levels & 1
    where = where * generalized_gaussian.WIDTH + columns_of(levels >> (parities - 1))
    size = scales * parities * generalized_gaussian.WIDTH
    counts = np.bincount(where.reshape(-1), minlength=size)
    return counts.reshape(scales, parities, generalized_gaussian.WIDTH)


def _entropy(group: np.ndarray) -> float:
    return sum(tables.entropy(counts) for counts in group)


def _densities(groups: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the densities that code each of the groups cheapest, and the bits of all.

    Args:
      groups: counts `[groups, parities, width]`.
    """
    flat = groups.reshape(len(groups), -1).astype(np.float64)
    bits = flat @ _costs(groups.shape[1])
    best = bits.argmin(axis=1)
    parameters = np.stack(np.divmod(best, len(generalized_gaussian.SHAPES)), axis=1)
    return parameters.astype(np.uint8), float(bits.min(axis=1).sum())


@functools.cache
def _costs(parities: int) -> np.ndarray:
    """Return bits of each symbol, escaped where it has no place: `[parities * width,
    tables]`.

    Tables by scale, then by shape.
    """
    every = itertools.product(
        range(generalized_gaussian.SCALES), range(len(generalized_gaussian.SHAPES))
    )
    sizes = np.array(
        [
            [
                generalized_gaussian.table(*one, parities, parity)
                for parity in range(parities)
            ]
            for one in every
        ],
        np.float64,
    )
    costs = PRECISION - np.log2(np.maximum(sizes, 1))
    escape = costs[..., -1:] + ESCAPE_BITS
    costs[..., :-1] = np.where(sizes[..., :-1] > 0, costs[..., :-1], escape)
    costs[..., -1:] = escape
    return costs.reshape(len(costs), -1).T.copy()

"""Integer frequencies of tokens from integer logits, in a tree of 64 children a node.

A vocabulary of V tokens is a tree: the leaves in order, 64 to a node, 64 nodes to a
node above, and so on; two levels to 4 096 tokens, three to 262 144. A token is coded as
the path to it. Each node divides 2**16 among its children:

1. The weight of a leaf is `2**(z - largest z of its node)` in Q15, `z` its logit. The
   weight of an inner node is the sum of its children's, times
   `2**(largest z below it - largest z below its parent)`, rounded.
2. Weights of one node are shifted right, with rounding, until the largest is at most
   2**15. The frequency of a child is `floor(weight * 2**16 / sum of weights)`, and 1
   where that is 0; children that hold no token get 0.
3. What the sum differs from 2**16 is taken from the first child of largest weight.

Small nodes make the ones of rule 2 cheap: at most 63 of 65 536 a level. (Two levels of
192 and 256 for 49 152 tokens would waste up to 446, three levels waste up to 137.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.textcoding import fixed_point as fp

FANOUT = 64
TOTAL = 1 << 16
MOST_TOKENS = FANOUT**3
_LOWEST = -(1 << 29)  # the logit of no token


class Nodes(NamedTuple):
    """One level of the tree: weights int32 `[..., nodes, children]`, and which exist.

    `valid` is a NumPy array `[nodes, children]`, one where a child holds tokens.
    """

    weights: jax.Array
    valid: np.ndarray


def depth_of(vocabulary: int) -> int:
    """Return levels of the tree.

    Raises ValueError on more than 262 144 tokens.
    """
    if vocabulary > MOST_TOKENS:
        raise ValueError(
            f"a vocabulary of {vocabulary} tokens; frequencies are defined for at most "
            f"{MOST_TOKENS}"
        )
    return next(d for d in (1, 2, 3) if vocabulary <= FANOUT**d)


def build_tree(logits: jax.Array) -> list[Nodes]:
    """Return weights of all nodes, from the root to the leaves, of logits `[...,
    V]`.
    """
    vocabulary = logits.shape[-1]
    depth = depth_of(vocabulary)
    valid = np.ones(vocabulary, np.int32)
    largest, sums, levels = logits, None, []
    for level in range(depth):
        root = level == depth - 1
        largest, valid = _in_nodes(largest, _LOWEST, root), _in_nodes(valid, 0, root)
        above = jnp.max(largest, axis=-1)
        weights = fp.power_of_half(above[..., None] - largest)
        if sums is not None:
            weights = fp.multiply(_in_nodes(sums, 0, root), weights)
        levels.append(Nodes(weights, valid))
        sums = jnp.sum(weights, axis=-1, dtype=jnp.int32)
        largest, valid = above, valid.max(axis=-1)
    return levels[::-1]


def frequencies(weights: jax.Array, valid: jax.Array) -> jax.Array:
    """Return frequencies of the children of a node, int32 `[..., children]`; rules 2
    and 3.
    """
    largest = jnp.max(weights, axis=-1, keepdims=True)
    weights = fp.shift_right(weights, jnp.maximum(17 - lax.clz(largest), 0))
    total = jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.int32)
    shares = (weights.astype(jnp.uint32) << 16) // total.astype(jnp.uint32)
    shares = jnp.maximum(shares.astype(jnp.int32), valid)
    excess = jnp.sum(shares, axis=-1, keepdims=True, dtype=jnp.int32) - TOTAL
    children = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    children = children.reshape((1,) * (weights.ndim - 1) + (-1,))
    first = jnp.argmax(weights, axis=-1, keepdims=True).astype(jnp.int32)
    return shares - jnp.where(children == first, excess, 0)


def find_intervals(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return starts and sizes of the intervals on the path to each token.

    Logits `[N, V]` and tokens `[N]` to int32 `[N, depth, 2]`, from the root down.
    """
    levels = build_tree(logits)
    intervals = []
    for level, nodes in enumerate(levels):
        below = FANOUT ** (len(levels) - 1 - level)
        child = tokens // below
        shares = _frequencies_of(nodes, child // nodes.weights.shape[-1])
        child = (child % nodes.weights.shape[-1])[:, None]
        size = jnp.take_along_axis(shares, child, axis=-1)
        end = jnp.take_along_axis(jnp.cumsum(shares, -1, jnp.int32), child, axis=-1)
        intervals.append(jnp.concatenate([end - size, size], axis=-1))
    return jnp.stack(intervals, axis=1)


def take_symbol(
    nodes: Nodes, node: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the child whose interval holds a slot: (child's index in its level, start,
    size).

    `node` int32 `[N]` is the node reached so far, `slot` int32 `[N]` below 2**16.
    """
    shares = _frequencies_of(nodes, node)
    ends = jnp.cumsum(shares, -1, jnp.int32)
    child = jnp.sum((ends <= slot[:, None]).astype(jnp.int32), axis=-1)
    size = jnp.take_along_axis(shares, child[:, None], axis=-1)[:, 0]
    end = jnp.take_along_axis(ends, child[:, None], axis=-1)[:, 0]
    return node * shares.shape[-1] + child, end - size, size


def _frequencies_of(nodes: Nodes, node: jax.Array) -> jax.Array:
    """Return frequencies `[N, children]` of one node of each row."""
    weights = jnp.take_along_axis(nodes.weights, node[:, None, None], axis=1)[:, 0]
    return frequencies(weights, jnp.asarray(nodes.valid)[node])


def _in_nodes(x: jax.Array, padding: int, root: bool) -> jax.Array:
    """Reshape `[..., n]` to nodes `[..., nodes, children]`; the root takes all of
    them.
    """
    n = x.shape[-1]
    if root:
        return x[..., None, :]
    numpy = np if isinstance(x, np.ndarray) else jnp
    room = [(0, 0)] * (x.ndim - 1) + [(0, -n % FANOUT)]
    x = numpy.pad(x, room, constant_values=padding)
    return x.reshape(*x.shape[:-1], -1, FANOUT)

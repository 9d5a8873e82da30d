"""Tokens of lanes to coded bytes and back, in overlapping windows of a model.

The encoder predicts all windows of all lanes in batches, as it knows the text; the
decoder steps through the lanes together, token by token, with a cache. Both get the
same integer logits, because those of an exact model depend on the tokens of a window
alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.storage import FileDamaged
from jaxcompress.textcoding import frequencies, lanes
from jaxcompress.textcoding.integer_transformer import ExactTransformer

_BATCH = 2048  # tokens predicted at once
_ROWS = 64  # hidden states whose logits are held at once
_SHORTEST = 16  # lengths are rounded up to powers of two from here


def cut_windows(count: int, window: int, overlap: int) -> list[tuple[int, int, int]]:
    """Yield (start, first, end) of windows over the first token and `count` others.

    A window predicts positions `first` to `end` from those that begin at `start`.
    """
    if count == 0:
        return []
    windows = [(0, 1, min(window, count) + 1)]
    while windows[-1][2] <= count:
        first = windows[-1][2]
        start = first - max(overlap, 1)
        windows.append((start, first, min(start + window, count) + 1))
    return windows


def _rounded(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())


@jax.jit
def _intervals(
    model: ExactTransformer, inputs: jax.Array, targets: jax.Array
) -> jax.Array:
    """Return intervals int32 `[B, T, depth, 2]` of targets `[B, T]` that follow the
    inputs.
    """
    x, _ = model.hidden(inputs)
    rows = _ROWS if x.values.shape[1] % _ROWS == 0 else _SHORTEST

    def some(piece: Any) -> jax.Array:
        x, tokens = piece
        x = jax.tree.map(lambda y: y[None], x)
        return frequencies.find_intervals(model.logits(x)[0], tokens)

    flat = jax.tree.map(lambda y: y.reshape(-1, rows, y.shape[-1]), x)
    intervals = jax.lax.map(some, (flat, targets.reshape(-1, rows)))
    return intervals.reshape(*targets.shape, -1, 2)


def encode_windows(
    model: ExactTransformer,
    ids: list[list[int]],
    first_token: int,
    window: int,
    overlap: int,
) -> list[bytes]:
    """Return the coded bytes of each lane."""
    texts = [np.array([first_token, *own], np.int32) for own in ids]
    work = [
        (lane, *spot)
        for lane, own in enumerate(ids)
        for spot in cut_windows(len(own), window, overlap)
    ]
    depth = frequencies.depth_of(model.model.vocab_size)
    intervals = [np.zeros((len(own), depth, 2), np.int32) for own in ids]
    longest = max((end - 1 - start for _, start, _, end in work), default=1)
    length = _rounded(longest) if longest < window else -(-window // 16) * 16
    rows = max(1, _BATCH // length)
    if len(work) < rows:
        rows = 1 << (len(work) - 1).bit_length() if work else 1
    for begin in range(0, len(work), rows):
        batch = work[begin : begin + rows]
        inputs = np.zeros((rows, length), np.int32)
        targets = np.zeros((rows, length), np.int32)
        for row, (lane, start, _, end) in enumerate(batch):
            inputs[row, : end - 1 - start] = texts[lane][start : end - 1]
            targets[row, : end - 1 - start] = texts[lane][start + 1 : end]
        by_row = np.asarray(_intervals(model, inputs, targets))
        for row, (lane, start, first, end) in enumerate(batch):
            own = by_row[row, first - 1 - start : end - 1 - start]
            intervals[lane][first - 1 : end - 1] = own
    return lanes.encode_lanes([x.reshape(-1, 2) for x in intervals])


@functools.partial(jax.jit, static_argnames="length")
def _prefill(model: ExactTransformer, tokens: jax.Array, count: Any, length: int):
    """Return a cache that has read the first `count` of tokens `[lanes, T]`."""
    cache = model.init_cache(tokens.shape[0], length)
    _, cache = model.hidden(tokens, cache)
    return cache | {"index": jnp.int32(count)}


@functools.partial(jax.jit, donate_argnames=("cache", "reader"))
def _steps(
    model: ExactTransformer,
    cache: Any,
    reader: lanes.Reader,
    token: jax.Array,
    left: jax.Array,
    count: jax.Array,
) -> tuple[Any, lanes.Reader, jax.Array]:
    """Decode `count` tokens of each lane; of lane `l`, the first `left[l]` only.

    `token` `[lanes]` precedes them. Returns the cache, the reader and tokens
    `[lanes, cache length]`.
    """
    room = jax.tree.leaves(cache["layers"])[0].shape[-2]
    out = jnp.zeros((token.shape[0], room), jnp.int32)

    def step(i: jax.Array, carry: Any) -> Any:
        cache, reader, token, out = carry
        x, cache = model.hidden(token[:, None], cache)
        after, node = reader, jnp.zeros_like(token)
        for nodes in frequencies.build_tree(model.logits(x)[:, 0]):
            slot = (after.state & 0xFFFF).astype(jnp.int32)
            node, start, size = frequencies.take_symbol(nodes, node, slot)
            after = lanes.advance(after, start, size)
        active = i < left
        reader = lanes.Reader(
            jnp.where(active, after.state, reader.state),
            jnp.where(active, after.position, reader.position),
            reader.words,
        )
        token = jnp.where(active, node, 0)
        return cache, reader, token, out.at[:, i].set(token)

    carry = (cache, reader, token, out)
    cache, reader, _, out = jax.lax.fori_loop(0, count, step, carry)
    return cache, reader, out


def decode_windows(
    model: ExactTransformer,
    payloads: list[bytes],
    counts: list[int],
    first_token: int,
    window: int,
    overlap: int,
) -> list[list[int]]:
    """Return the tokens of each lane.

    Raises FileDamaged where a lane does not end well.
    """
    if not payloads:
        return []
    longest = max(counts)
    texts = np.zeros((len(payloads), longest + 1), np.int32)
    texts[:, 0] = min(first_token, model.model.vocab_size - 1)
    try:
        reader = lanes.open_lanes(payloads)
    except ValueError as error:
        raise FileDamaged(str(error)) from error
    room = min(_rounded(min(longest, window)), -(-window // 16) * 16)
    for start, first, end in cut_windows(longest, window, overlap):
        # All but the last token of the context are read at once.
        context_length = first - 1 - start
        context = np.zeros(
            (len(payloads), max(1, -(-context_length // 16) * 16)), np.int32
        )
        context = context[:, :room]
        context[:, :context_length] = texts[:, start : first - 1]
        cache = _prefill(model, context, np.int32(context_length), room)
        left = np.array(counts, np.int32) - (first - 1)
        token = jnp.asarray(texts[:, first - 1])
        cache, reader, out = _steps(
            model, cache, reader, token, left, np.int32(end - first)
        )
        texts[:, first:end] = np.asarray(out)[:, : end - first]
    finished = lanes.is_finished(reader, payloads)
    if not finished.all():
        wrong = int(np.flatnonzero(~finished)[0])
        raise FileDamaged(f"lane {wrong} does not end where its coder began")
    if texts.max(initial=0) >= model.model.vocab_size:
        raise FileDamaged("a decoded token is not in the vocabulary")
    return [
        text[1 : count + 1].tolist() for text, count in zip(texts, counts, strict=True)
    ]

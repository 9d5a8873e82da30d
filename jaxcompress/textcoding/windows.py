"""Tokens of lanes to coded bytes and back, in overlapping windows of a model.

The encoder predicts all windows of all lanes in batches, as it knows the text; the
decoder steps through the lanes together, token by token, with a cache. Both get the
same integer logits, because those of an exact model depend on the tokens of a window
alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.storage import FileDamaged
from jaxcompress.textcoding import frequencies, lanes, mixing
from jaxcompress.textcoding.fixed_point import Rows
from jaxcompress.textcoding.integer_transformer import ExactTransformer
from jaxcompress.textcoding.mixing import Mixer

_BATCH = 2048  # tokens predicted at once
_ROWS = 64  # hidden states whose logits are held at once
_SHORTEST = 16  # lengths are rounded up to powers of two from here


def cut_windows(
    count: int, window: int, overlap: int, primer: int = 0
) -> list[tuple[int, int, int]]:
    """Return (start, first, end) of windows over the first token, a primer and `count`
    others.

    A window predicts positions `first` to `end` from those that begin at `start`. The
    tokens of the primer are not predicted.
    """
    if count == 0:
        return []
    total = primer + count
    windows = [(0, primer + 1, min(window, total) + 1)]
    while windows[-1][2] <= total:
        first = windows[-1][2]
        start = first - max(overlap, 1)
        windows.append((start, first, min(start + window, total) + 1))
    return windows


def _rounded(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())


@jax.jit
def _hidden(model: ExactTransformer, inputs: jax.Array) -> Rows:
    """Return hidden states of inputs `[B, T]`, one after another, `[B * T, width]`."""
    x, _ = model.hidden(inputs)
    return jax.tree.map(lambda y: y.reshape(-1, y.shape[-1]), x)


@functools.partial(jax.jit, donate_argnames="mixer")
def _intervals(
    model: ExactTransformer,
    x: Rows,
    order: jax.Array,
    targets: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    mixer: Mixer | None,
) -> tuple[Mixer | None, jax.Array]:
    """Return intervals of targets that follow hidden states, int32 `[N, depth, 2]`.

    Only those from `begin` to `end` are computed; the hidden state of target `i` is
    `x[order[i]]`. The mixer sees the targets in this order.
    """
    n = len(targets)
    depth = frequencies.depth_of(model.model.vocab_size)
    order, targets = (jnp.pad(y, (0, _ROWS)) for y in (order, targets))

    def some(carry: Any) -> Any:
        begin, mixer, out = carry
        rows = jax.lax.dynamic_slice(order, (begin,), (_ROWS,))
        tokens = jax.lax.dynamic_slice(targets, (begin,), (_ROWS,))
        logits = model.logits(jax.tree.map(lambda y: y[rows][None], x))[0]
        if mixer is None:
            intervals = frequencies.find_intervals(logits, tokens)
        else:
            count = jnp.minimum(end - begin, _ROWS)
            mixer, intervals = _mix_rows(mixer, logits, tokens, count)
        out = jax.lax.dynamic_update_slice(out, intervals, (begin, 0, 0))
        return begin + _ROWS, mixer, out

    out = jnp.zeros((n + _ROWS, depth, 2), jnp.int32)
    carry = (begin, mixer, out)
    _, mixer, out = jax.lax.while_loop(lambda carry: carry[0] < end, some, carry)
    return mixer, out[:n]


def _mix_rows(
    mixer: Mixer, logits: jax.Array, tokens: jax.Array, count: jax.Array
) -> tuple[Mixer, jax.Array]:
    """Return the mixer after the first `count` tokens, and the intervals of these."""

    def one(i: jax.Array, carry: Any) -> Any:
        mixer, out = carry
        mixed, matches = mixing.mix(mixer, logits[i])
        interval = frequencies.find_intervals(mixed[None], tokens[i][None])
        mixer = mixing.learn(mixer, logits[i], mixed, matches, tokens[i])
        return mixer, jax.lax.dynamic_update_slice(out, interval, (i, 0, 0))

    depth = frequencies.depth_of(logits.shape[-1])
    out = jnp.zeros((len(tokens), depth, 2), jnp.int32)
    return jax.lax.fori_loop(0, count, one, (mixer, out))


def encode_windows(
    model: ExactTransformer,
    ids: list[list[int]],
    first_token: int,
    window: int,
    overlap: int,
    primer: Sequence[int] = (),
    mix: bool = False,
) -> list[bytes]:
    """Return the coded bytes of each lane."""
    base = 1 + len(primer)
    texts = [np.array([first_token, *primer, *own], np.int32) for own in ids]
    work = [
        (lane, *spot)
        for lane, own in enumerate(ids)
        for spot in cut_windows(len(own), window, overlap, len(primer))
    ]
    vocabulary = model.model.vocab_size
    depth = frequencies.depth_of(vocabulary)
    intervals = [np.zeros((len(own), depth, 2), np.int32) for own in ids]
    longest = max((end - 1 - start for _, start, _, end in work), default=1)
    length = _rounded(longest) if longest < window else -(-window // 16) * 16
    rows = max(1, _BATCH // length)
    if len(work) < rows:
        rows = 1 << (len(work) - 1).bit_length() if work else 1
    positions = _rounded(max((len(own) for own in ids), default=1))
    mixer, mixed_lane = None, -1
    for begin in range(0, len(work), rows):
        batch = work[begin : begin + rows]
        inputs = np.zeros((rows, length), np.int32)
        order = np.zeros(rows * length, np.int32)
        targets = np.zeros(rows * length, np.int32)
        spans, at = [], 0
        for row, (lane, start, first, end) in enumerate(batch):
            inputs[row, : end - 1 - start] = texts[lane][start : end - 1]
            span = slice(at, at + end - first)
            order[span] = row * length + np.arange(first - 1 - start, end - 1 - start)
            targets[span] = texts[lane][first:end]
            spans.append((lane, slice(first - base, end - base), span))
            at += end - first
        x = _hidden(model, inputs)
        if not mix:
            _, batch_intervals = _intervals(model, x, order, targets, 0, at, None)
            batch_intervals = np.asarray(batch_intervals)
        for lane, own, span in spans:
            if mix:
                if lane != mixed_lane:
                    mixer, mixed_lane = mixing.start(vocabulary, positions), lane
                mixer, batch_intervals = _intervals(
                    model, x, order, targets, span.start, span.stop, mixer
                )
            intervals[lane][own] = batch_intervals[span]
    return lanes.encode_lanes([x.reshape(-1, 2) for x in intervals])


@functools.partial(jax.jit, static_argnames="length")
def _prefill(model: ExactTransformer, tokens: jax.Array, count: Any, length: int):
    """Return a cache that has read the first `count` of tokens `[lanes, T]`."""
    cache = model.init_cache(tokens.shape[0], length)
    _, filled = model.hidden(tokens, cache)
    assert filled is not None
    return filled | {"index": jnp.int32(count)}


@functools.partial(jax.jit, donate_argnames=("cache", "reader", "mixer"))
def _steps(
    model: ExactTransformer,
    cache: Any,
    reader: lanes.Reader,
    mixer: Mixer | None,
    token: jax.Array,
    left: jax.Array,
    count: jax.Array,
) -> tuple[Any, lanes.Reader, Mixer | None, jax.Array]:
    """Decode `count` tokens of each lane; of lane `l`, the first `left[l]` only.

    `token` `[lanes]` precedes them. Returns the cache, the reader, the mixers and
    tokens `[lanes, cache length]`.
    """
    room = jax.tree.leaves(cache["layers"])[0].shape[-2]
    out = jnp.zeros((token.shape[0], room), jnp.int32)

    def step(i: jax.Array, carry: Any) -> Any:
        cache, reader, mixer, token, out = carry
        x, cache = model.hidden(token[:, None], cache)
        logits = mixed = model.logits(x)[:, 0]
        if mixer is not None:
            mixed, matches = jax.vmap(mixing.mix)(mixer, logits)
        after, node = reader, jnp.zeros_like(token)
        for nodes in frequencies.build_tree(mixed):
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
        if mixer is not None:  # that of a lane at its end is not used again
            mixer = jax.vmap(mixing.learn)(mixer, logits, mixed, matches, token)
        return cache, reader, mixer, token, out.at[:, i].set(token)

    carry = (cache, reader, mixer, token, out)
    cache, reader, mixer, _, out = jax.lax.fori_loop(0, count, step, carry)
    return cache, reader, mixer, out


def decode_windows(
    model: ExactTransformer,
    payloads: list[bytes],
    counts: list[int],
    first_token: int,
    window: int,
    overlap: int,
    primer: Sequence[int] = (),
    mix: bool = False,
    limit: int | None = None,
) -> list[list[int]]:
    """Return the tokens of each lane; at most `limit` of each, unchecked, to time it.

    Raises FileDamaged where a lane does not end well.
    """
    if not payloads:
        return []
    longest, base = max(counts), 1 + len(primer)
    texts = np.zeros((len(payloads), base + longest), np.int32)
    texts[:, 0] = min(first_token, model.model.vocab_size - 1)
    texts[:, 1:base] = primer
    try:
        reader = lanes.open_lanes(payloads)
    except ValueError as error:
        raise FileDamaged(str(error)) from error
    total = base - 1 + longest
    room = min(_rounded(min(total, window)), -(-window // 16) * 16)
    mixer = None
    if mix:
        empty = mixing.start(model.model.vocab_size, _rounded(longest))
        mixer = jax.tree.map(lambda x: jnp.stack([x] * len(payloads)), empty)
    stop = longest if limit is None else min(limit, longest)
    for start, first, end in cut_windows(stop, window, overlap, len(primer)):
        # All but the last token of the context are read at once.
        context_length = first - 1 - start
        context = np.zeros(
            (len(payloads), max(1, -(-context_length // 16) * 16)), np.int32
        )
        context = context[:, :room]
        context[:, :context_length] = texts[:, start : first - 1]
        cache = _prefill(model, context, np.int32(context_length), room)
        left = np.array(counts, np.int32) - (first - base)
        token = jnp.asarray(texts[:, first - 1])
        cache, reader, mixer, out = _steps(
            model, cache, reader, mixer, token, left, np.int32(end - first)
        )
        texts[:, first:end] = np.asarray(out)[:, : end - first]
    if limit is not None:
        counts = [min(count, limit) for count in counts]
        return [
            text[base : base + count].tolist()
            for text, count in zip(texts, counts, strict=True)
        ]
    finished = lanes.is_finished(reader, payloads)
    if not finished.all():
        wrong = int(np.flatnonzero(~finished)[0])
        raise FileDamaged(f"lane {wrong} does not end where its coder began")
    if texts.max(initial=0) >= model.model.vocab_size:
        raise FileDamaged("a decoded token is not in the vocabulary")
    return [
        text[base : base + count].tolist()
        for text, count in zip(texts, counts, strict=True)
    ]

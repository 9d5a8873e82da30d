"""Byte-pair encoding as it is defined, small and readable: training and segmentation.

The reference that the fast trainers are compared with, and what sampling uses. Source:
Sennrich et al., 2016, arXiv 1508.07909; dropout: Provilkov et al., 2020, 1910.13267.
"""

import dataclasses
import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Order = Callable[[int, str, str], Any]


@dataclasses.dataclass(frozen=True)
class Merge:
    """Two pieces become one; `count` is how often they were neighbors then."""

    left: str
    right: str
    count: int

    @property
    def piece(self) -> str:
        return self.left + self.right


def most_frequent(count: int, left: str, right: str) -> Any:
    """Return the order of SentencePiece: among equals the shorter piece, then by its
    text.
    """
    return -count, len(left + right), left + right, len(left)


def learn_merges(
    words: Mapping[str, int],
    merges: int,
    *,
    min_frequency: int = 1,
    allowed: Callable[[str], bool] = lambda piece: True,
    order: Order = most_frequent,
) -> list[Merge]:
    """Return the merges of byte-pair encoding, first to last.

    Start with characters; count pairs of neighbors; make the most frequent pair one
    piece wherever it is; repeat. No piece arises twice: the merges inside a piece
    depend on its own text only. Neighbors that overlap ("aa" twice in "aaa") are
    counted twice. Pairs are kept in a heap with the counts they had when they changed
    last, and only the words that hold the pair are visited: time is that of all changes
    together, not merges times words.

    Args:
      words: how often each word occurs; no piece reaches from one into the next.
      merges: how many, at most; fewer where no pair is left.
      min_frequency: stop at a pair that is rarer.
      allowed: which pieces may arise.
      order: what is smallest for the pair to merge next.
    """
    parts = [list(word) for word in words]
    weights = list(words.values())
    counts: Counter[tuple[str, str]] = Counter()
    places = defaultdict(set)

    def change(i: int, sign: int, touched: set) -> None:
        for pair in zip(parts[i], parts[i][1:], strict=False):
            counts[pair] += sign * weights[i]
            if sign > 0:
                places[pair].add(i)
            touched.add(pair)

    touched: set[tuple[str, str]] = set()
    for i in range(len(parts)):
        change(i, +1, touched)
    heap = [(order(counts[pair], *pair), counts[pair], pair) for pair in touched]
    heapq.heapify(heap)
    learned: list[Merge] = []
    while heap and len(learned) < merges:
        _, count, pair = heapq.heappop(heap)
        if count != counts[pair] or count < 1:
            continue  # it changed since, and is in the heap again
        merge = Merge(*pair, count)
        if not allowed(merge.piece):
            continue
        if count < min_frequency:
            break
        learned.append(merge)
        touched = set()
        for i in sorted(places.pop(pair)):
            change(i, -1, touched)
            parts[i] = replace(parts[i], *pair)
            change(i, +1, touched)
        for pair in touched:
            if counts[pair] > 0:
                heapq.heappush(heap, (order(counts[pair], *pair), counts[pair], pair))
    return learned


def replace(parts: Sequence[str], left: str, right: str) -> list[str]:
    """Return the parts with each `left, right` made one, from left to right."""
    out, i = [], 0
    while i < len(parts):
        if i + 1 < len(parts) and parts[i] == left and parts[i + 1] == right:
            out.append(left + right)
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return out


def segment(
    parts: Sequence[str],
    rank: Callable[[str, str], float | None],
    *,
    dropout: float = 0.0,
    draw: random.Random | None = None,
    merged: list[str] | None = None,
) -> list[str]:
    """Return the parts (characters, at first) after all merges, best rank first.

    Among equal ranks the leftmost is merged first. Neighbors are a linked list and
    possible merges a heap: O(n log n), which matters for words of thousands of letters.

    Args:
      parts: what to merge.
      rank: the rank of a pair, smaller is earlier; None where it is never merged.
      dropout: probability that a merge is left out in its turn; it is tried
        again only if a neighbor changes. 0 is the plain segmentation, 1 merges nothing.
      draw: the source of chance, needed with dropout.
      merged: a list that receives every piece on the way.
    """
    parts = list(parts)
    after = [*range(1, len(parts)), -1]
    before = list(range(-1, len(parts) - 1))
    heap: list[tuple[float, int, str, str]] = []

    def offer(i: int, j: int) -> None:
        if i >= 0 and j >= 0 and (r := rank(parts[i], parts[j])) is not None:
            heapq.heappush(heap, (r, i, parts[i], parts[j]))

    for i in range(len(parts) - 1):
        offer(i, i + 1)
    while heap:
        _, i, left, right = heapq.heappop(heap)
        j = after[i]
        if j < 0 or parts[i] != left or parts[j] != right:
            continue  # one of them was merged with another
        if dropout and draw.random() < dropout:
            continue
        parts[i], parts[j] = left + right, ""
        if merged is not None:
            merged.append(parts[i])
        after[i] = after[j]
        if after[j] >= 0:
            before[after[j]] = i
        after[j] = -1
        offer(before[i], i)
        offer(i, after[i])
    return [part for part in parts if part]

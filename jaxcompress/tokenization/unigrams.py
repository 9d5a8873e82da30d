"""The unigram language model as it is defined: training, segmentation, sampling.

The reference that SentencePiece is compared with, and what sampling uses. A text's
probability is the product of its pieces'; of all segmentations the best is found by
dynamic programming. Source: Kudo, 2018, arXiv 1804.10959, and for what that leaves open
(seeds, the digamma step, the losses of pruning) google/sentencepiece.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

Scores = Mapping[str, float]  # log-probability of each piece, nats
UNKNOWN = -10.0  # nats that an unknown character is below the rarest piece


# Segmentation.


def viterbi(text: str, scores: Scores, *, longest: int = 0) -> list[str]:
    """Return the segmentation of highest probability; among equals, longer pieces at
    its end.

    A character that is no piece is alone and costs `UNKNOWN` below the worst score.
    """
    if not text:
        return []
    longest = longest or max(map(len, scores))
    unknown = min(scores.values()) + UNKNOWN
    best = [0.0] + [-math.inf] * len(text)
    begins = [0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - longest), end):
            score = scores.get(text[start:end])
            if score is None:
                if end - start > 1:
                    continue
                score = unknown
            if best[start] + score > best[end]:
                best[end], begins[end] = best[start] + score, start
    return _path(text, begins)


def greedy(text: str, pieces: Container[str], *, longest: int) -> list[str]:
    """Take the longest piece at each position; a character that begins none is a piece
    itself.
    """
    path, at = [], 0
    while at < len(text):
        end = min(len(text), at + longest)
        while end > at + 1 and text[at:end] not in pieces:
            end -= 1
        path.append(text[at:end])
        at = end
    return path


def sample(
    text: str, scores: Scores, *, alpha: float, draw: random.Random, longest: int = 0
) -> list[str]:
    """Return a segmentation drawn with a probability proportional to its own to the
    `alpha`.

    Sums over all segmentations forward, draws backward (1804.10959, section 3.2, with
    no limit on their number). `alpha` 0 draws evenly, a large one gives `viterbi`'s.
    """
    if not text:
        return []
    longest = longest or max(map(len, scores))
    unknown = min(scores.values()) + UNKNOWN
    total = [0.0]
    for end in range(1, len(text) + 1):
        total.append(
            _log_sum(
                [s for _, s in _ends(text, end, scores, unknown, longest, total, alpha)]
            )
        )
    begins, end = [0] * (len(text) + 1), len(text)
    while end:
        options = _ends(text, end, scores, unknown, longest, total, alpha)
        weights = [math.exp(s - total[end]) for _, s in options]
        begins[end] = draw.choices([start for start, _ in options], weights)[0]
        end = begins[end]
    return _path(text, begins)


def _ends(text, end, scores, unknown, longest, total, alpha):
    """Find where a piece that ends at this position may begin, with the log-weight of
    all before it.
    """
    options = []
    for start in range(max(0, end - longest), end):
        score = scores.get(text[start:end], unknown if end - start == 1 else None)
        if score is not None:
            options.append((start, total[start] + alpha * score))
    return options


def _path(text: str, begins: Sequence[int]) -> list[str]:
    path, end = [], len(text)
    while end:
        path.append(text[begins[end] : end])
        end = begins[end]
    return path[::-1]


# Training.


def learn_pieces(
    texts: Iterable[str],
    split: Callable[[str], list[str]],
    size: int,
    *,
    seeds: int = 1_000_000,
    longest: int = 16,
    shrink: float = 0.75,
    rounds: int = 2,
) -> dict[str, float]:
    """Compute `size` pieces (or fewer) with their log-probabilities, likeliest first.

    Start with all characters and the frequent substrings; re-estimate probabilities
    `rounds` times; drop the pieces whose loss would cost the text's likelihood least,
    down to a fraction `shrink`; repeat until 1.1 times the size is reached, then take
    the likeliest. Every character of the texts stays. The order of these steps is that
    of SentencePiece 0.2.3; older versions leave out the last pruning.

    Args:
      texts: the corpus.
      split: cuts a text into words, which segmentations and pieces respect.
      size: of the vocabulary.
      seeds: substrings to start with.
      longest: characters in a piece.
      shrink: what is kept in a round of pruning.
      rounds: of expectation and maximization, between two prunings.

    Raises ValueError on an empty corpus, and a size below its number of characters.
    """
    texts = list(texts)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(split(text))
    characters = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    if not characters or size < len(characters):
        raise ValueError(
            f"size is {size}, and the texts have {len(characters)} characters, which "
            "all stay; ask for more, or give more text"
        )
    scores = seed_pieces(texts, split, characters, seeds, longest)
    wanted = int(1.1 * size)
    while True:
        for _ in range(rounds):
            expected, _ = expect(words, scores, longest)
            scores = maximize(expected)
        scores = prune(words, scores, max(wanted, int(shrink * len(scores))), longest)
        if len(scores) <= wanted:
            break
    lowest = min(scores.values())
    ordered = sorted(characters, key=lambda c: (-characters[c], c))
    missing = [c for c in ordered if c not in scores]
    final = {c: scores[c] for c in ordered if c in scores}
    final |= {c: lowest + 0.0001 * i for i, c in enumerate(missing)}
    for piece in sorted(scores, key=lambda piece: (-scores[piece], piece)):
        if len(final) >= size:
            break
        final.setdefault(piece, scores[piece])
    return dict(sorted(final.items(), key=lambda item: (-item[1], item[0])))


def seed_pieces(
    texts: Sequence[str],
    split: Callable[[str], list[str]],
    characters: Mapping[str, int],
    size: int,
    longest: int,
) -> dict[str, float]:
    """Return characters and frequent substrings of words, log-probabilities by
    coverage.

    As in a suffix tree's inner nodes, a substring counts that occurs twice or more and
    is followed by different characters (the end of a text being one); its coverage is
    occurrences times length.
    """
    counts: Counter[str] = Counter()
    follows: dict[str, str] = {}
    branching: set[str] = set()
    for text in texts:
        at = 0
        for word in split(text):
            for start in range(len(word)):
                for end in range(start + 2, min(len(word), start + longest) + 1):
                    piece, next_ = word[start:end], text[at + end : at + end + 1]
                    counts[piece] += 1
                    if follows.setdefault(piece, next_) != next_:
                        branching.add(piece)
            at += len(word)
    coverage = {p: n * len(p) for p, n in counts.items() if n > 1 and p in branching}
    chosen = sorted(coverage, key=lambda piece: (-coverage[piece], piece))[:size]
    weights = dict(characters) | {piece: coverage[piece] for piece in chosen}
    total = math.log(sum(weights.values()))
    return {piece: math.log(weight) - total for piece, weight in weights.items()}


def expect(
    words: Mapping[str, int], scores: Scores, longest: int
) -> tuple[Counter[str], float]:
    """Return how often each piece is expected in the words, and their log-likelihood.

    Both sums over all segmentations, by the forward-backward algorithm.
    """
    expected: Counter[str] = Counter()
    likelihood = 0.0
    unknown = min(scores.values()) + UNKNOWN
    for word, count in words.items():
        n = len(word)
        arcs = [
            (start, end, piece, scores.get(piece, unknown))
            for end in range(1, n + 1)
            for start in range(max(0, end - longest), end)
            if (piece := word[start:end]) in scores or end - start == 1
        ]
        forward = [[] for _ in range(n + 1)]
        alpha = [0.0] * (n + 1)
        for i, (start, end, _, score) in enumerate(arcs):
            forward[end].append(alpha[start] + score)
            if i + 1 == len(arcs) or arcs[i + 1][1] > end:
                alpha[end] = _log_sum(forward[end])
        backward: list[list[float]] = [[] for _ in range(n + 1)]
        backward[n] = [0.0]
        beta = [0.0] * (n + 1)
        done = n + 1
        for start, end, _, score in sorted(arcs, key=lambda arc: -arc[1]):
            while done > end:
                done -= 1
                beta[done] = _log_sum(backward[done])
            backward[start].append(beta[end] + score)
        for start, end, piece, score in arcs:
            if piece in scores:
                share = math.exp(alpha[start] + score + beta[end] - alpha[n])
                expected[piece] += count * share
        likelihood += count * alpha[n]
    return expected, likelihood


def maximize(expected: Mapping[str, float]) -> dict[str, float]:
    """Return log-probabilities from expected counts; pieces expected less than 0.5
    times are dropped.

    With digamma for the logarithm, as under a sparse Dirichlet prior: small counts
    are made smaller.
    """
    kept = {piece: count for piece, count in expected.items() if count >= 0.5}
    total = digamma(sum(kept.values()))
    return {piece: digamma(count) - total for piece, count in kept.items()}


def prune(
    words: Mapping[str, int], scores: Scores, size: int, longest: int
) -> dict[str, float]:
    """Return pieces without which the text would become less likely, `size` of them.

    A piece's loss: all its uses are replaced by its own second-best segmentation, and
    frequencies are moved accordingly. Pieces whose best segmentation is another, or
    that no word uses, are dropped; single characters in use stay.
    """
    uses: Counter[str] = Counter()
    for word, count in words.items():
        for piece in viterbi(word, scores, longest=longest):
            uses[piece] += count
    total = sum(n for piece, n in uses.items() if piece in scores)
    losses, kept = {}, {}
    for piece, score in scores.items():
        if uses[piece] == 0:
            continue
        if len(piece) == 1:
            kept[piece] = score
            continue
        others = _without(piece, scores, longest)
        if sum(scores.get(p, -math.inf) for p in others) > score:
            continue
        n = uses[piece]
        with_it = math.log(n) - math.log(total)
        moved = math.log(total + n * (len(others) - 1))
        without = sum(math.log(uses[p] + n) - moved for p in others)
        losses[piece] = n * (with_it - without)
    for piece in sorted(losses, key=lambda piece: -losses[piece]):
        if len(kept) >= size:
            break
        kept[piece] = scores[piece]
    return kept


def _without(piece: str, scores: Scores, longest: int) -> list[str]:
    """Return the best segmentation of a piece into two parts or more."""
    return viterbi(piece, scores, longest=min(longest, len(piece) - 1))


def digamma(x: float) -> float:
    """Return the derivative of the logarithm of the gamma function, for x > 0.

    By the recurrence up to 7, then the asymptotic series in 1 / (x - 1/2).
    """
    result = 0.0
    while x < 7:
        result -= 1 / x
        x += 1
    x -= 0.5
    y = 1 / (x * x)
    series = y / 24 - 7 * y**2 / 960 + 31 * y**3 / 8064 - 127 * y**4 / 30720
    return result + math.log(x) + series


def _log_sum(values: Sequence[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))

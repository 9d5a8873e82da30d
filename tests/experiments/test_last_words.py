"""Words that the context holds: how passages are cut, and the test on the pairs."""

import jax
import numpy as np
import pytest
import scipy.stats

import jaxcompress as jc
from experiments.evaluation import last_words

# Of each sentence one word occurs nowhere else.
TEXT = " ".join(
    f"the parser reads token {i} and {'abcdefgh'[i // 8] * 2}{'stuvwxyz'[i % 8] * 3} "
    f"and the lexer of module {i % 7} returns the token to the parser again;"
    for i in range(64)
)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (3, 9), (40, 41)])
def test_the_exact_test_is_binomial(lost, gained):
    wanted = 1.0
    if lost + gained:
        wanted = scipy.stats.binomtest(lost, lost + gained, 0.5).pvalue
    assert last_words.mcnemar(lost, gained) == pytest.approx(wanted, rel=1e-12)


def test_each_word_occurs_earlier_in_its_passage():
    _, _, tokenizer = jc.models.load("reference")
    windows = last_words.cut_windows(tokenizer, TEXT, tokens=128, items=50)
    assert sum(len(x.words) for x in windows) == 50
    for window in windows:
        text = tokenizer.decode(window.tokens)
        assert len(window.tokens) <= 128 and text in TEXT
        for before, at in zip([range(0), *window.words], window.words, strict=False):
            passage = tokenizer.decode(window.tokens[: at.start])
            word = tokenizer.decode(window.tokens[at.start : at.stop]).strip()
            assert word in passage.split() or f"{word};" in passage.split()
            assert at.start >= 32 and at.start >= before.stop + 8
        assert window.words[-1].stop == len(window.tokens)


def test_a_word_is_right_if_all_its_pieces_are():
    """A model that says the next token in the alphabet, whatever it reads."""

    class Next:
        def hidden(self, params, tokens):
            return jax.nn.one_hot((tokens + 1) % 10, 10)

        def head(self, params, hidden):
            return hidden

    windows = [
        last_words.Window([1, 2, 3, 4, 6], [range(1, 3), range(3, 5)]),
        last_words.Window([5, 6, 8, 9], [range(2, 3), range(3, 4)]),
    ]
    found = last_words.right(Next(), None, windows)
    assert found.tolist() == [True, False, False, True]
    other = np.array([True, True, False, False])
    compared = last_words.compare(found, other)
    assert (compared["lost"], compared["gained"]) == (1, 1)
    assert (compared["float_right"], compared["small_right"]) == (2, 2)
    assert compared["p"] == 1.0

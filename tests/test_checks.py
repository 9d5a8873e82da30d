"""Options are checked in one way: the method is named, and what it takes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import checks


@pytest.mark.parametrize("value", [1, 3, np.int64(2)])
def test_integers_pass(value):
    checks.integer("m", "rank", value, most=3)


@pytest.mark.parametrize("value", [0, 4, 1.0, True, None, "1"])
def test_other_ranks_are_refused(value):
    with pytest.raises(ValueError, match=r"^m takes an integer rank from 1 to 3, not "):
        checks.integer("m", "rank", value, most=3)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), jnp.float32(0.5)])
def test_fractions_pass(value):
    checks.fraction("m", "share", value)
    checks.positive("m", "share", value)


@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan, math.inf, True, None, "0.5"])
def test_other_fractions_are_refused(value):
    with pytest.raises(ValueError, match="m takes share above 0 and below 1, not"):
        checks.fraction("m", "share", value)
    allowed = value is not True and value in (0, 1)
    if allowed:
        checks.fraction("m", "share", value, zero=True, one=True)


def test_positive_numbers_and_choices():
    checks.positive("m", "norm", 0, zero=True)
    with pytest.raises(ValueError, match="norm above 0, not 0"):
        checks.positive("m", "norm", 0)
    with pytest.raises(ValueError, match="norm of 0 or more, not inf"):
        checks.positive("m", "norm", math.inf, zero=True)
    checks.one_of("m", "order", "a", ("a", "b"))
    with pytest.raises(ValueError, match="m takes order='a' or 'b', not 'c'"):
        checks.one_of("m", "order", "c", ("a", "b"))


def test_weights_are_matrices_of_floats():
    checks.weights("m", jnp.ones((2, 3)))
    checks.weights("m", jnp.ones((2, 0)), outputs=False)
    with pytest.raises(TypeError, match="m takes floating-point weights, not int8"):
        checks.weights("m", jnp.ones((2, 3), jnp.int8))
    for shape in ((3,), (0, 3), (2, 0)):
        with pytest.raises(ValueError, match="one input or more"):
            checks.weights("m", jnp.ones(shape))
    jax.eval_shape(lambda x: checks.weights("m", x), jnp.ones((2, 3)))

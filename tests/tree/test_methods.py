"""What a method refuses before it computes, and what registering one refuses."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.tree import methods

X = jnp.ones((4, 4))


@pytest.mark.parametrize("second", [jax.random.key(0), np.ones(4), 4, "moments"])
def test_options_are_given_by_name(second):
    with pytest.raises(TypeError, match=r"symmetric is the moments of x.*by name"):
        jc.symmetric(X, second, bits=4)


def test_a_missing_option_is_named_with_an_example():
    for call in (lambda: jc.symmetric(X), lambda: jc.symmetric(4)):
        with pytest.raises(TypeError, match=r"for instance symmetric\(bits=4\)"):
            call()


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_a_boolean_option_is_a_boolean(value):
    with pytest.raises(ValueError, match="search=True or False"):
        jc.symmetric(X, bits=4, search=value)
    with pytest.raises(ValueError, match="search=True or False"):
        methods.parse(f"symmetric(bits=4, search={value!r})")


def test_a_method_takes_moments_and_options_by_name():
    with pytest.raises(TypeError, match=r"write alone\(x, moments=None"):

        @jc.method()
        def alone(x):
            return x

    with pytest.raises(TypeError, match=r"write keyed\(x, moments=None"):

        @jc.method
        def keyed(x, *, key):
            return x


def test_parentheses_may_be_left_out(monkeypatch):
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))

    @jc.method
    def as_it_is(x, moments=None, *, bits=4):
        return jc.symmetric(x, bits=bits)

    assert methods.parse("as_it_is(bits=3)").keywords == {"bits": 3}
    assert as_it_is(X, bits=2).bits == 2


def test_only_what_reads_moments_gets_them(monkeypatch):
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    seen = []

    def note(x, moments=None):
        seen.append(moments)
        return x

    def reads(x, moments=None):
        return note(x, moments)

    moments = {"w/kernel": jc.moments_from_covariance(jnp.eye(64))}
    params = {"w": {"kernel": jnp.ones((64, 64))}}
    for f in (
        jc.method(traceable=False)(note),
        jc.method(traceable=False, data=True)(reads),
    ):
        jc.compress(params, f, moments)
    assert seen[0] is None and seen[1] is not None


def test_every_public_method_is_under_the_laws():
    """A method of the package joins `laws.METHODS` by a line."""
    tried = {s.split("(")[0] for m in laws.METHODS for s in laws.stages(m)}
    public = {name for name in jc.__all__ if hasattr(getattr(jc, name), "traits")}
    assert public - tried == set()
    flags = {name for name in public if getattr(jc, name).traits.data}
    moved = {laws.stages(m)[0].split("(")[0] for m in laws.DATA}
    assert flags == moved

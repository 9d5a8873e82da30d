"""NNX modules with variables of their own types, in tuples, as states in files."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

import jaxcompress as jc
from jaxcompress.running import nnx as running_nnx


class Adapter(nnx.Variable):
    pass


class Scaled(nnx.Param):
    pass


class Mixed(nnx.Module):
    def __init__(self, rngs):
        self.down = Adapter(jax.random.normal(rngs.params(), (64, 64)))
        self.up = Scaled(jax.random.normal(rngs.params(), (64, 64)))
        self.layer = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        return self.layer(x @ self.down @ self.up[...])


TYPES = {"down": Adapter, "up": Scaled, "kernel": nnx.Param}
X = jax.random.normal(jax.random.key(0), (8, 64))


@pytest.fixture(scope="module")
def mixed():
    module = Mixed(nnx.Rngs(0))
    params = running_nnx.params_of(module, (nnx.Param, Adapter))
    layouts = jc.find_layouts(module, params, X)
    return module, jc.compress(params, "symmetric(bits=8)", layouts=layouts)


def test_variables_keep_their_types(mixed):
    module, small = mixed
    ready = running_nnx.with_params(module, small)
    held = {"down": ready.down, "up": ready.up, "kernel": ready.layer.kernel}
    for name, variable in held.items():
        assert isinstance(running_nnx.stored(variable), jc.Quantized)
        assert isinstance(variable, TYPES[name])
    assert list(nnx.state(ready, Adapter)) == ["down"]
    assert list(nnx.state(ready, Scaled)) == ["up"]
    assert "down" not in nnx.state(ready, nnx.Param)
    want = running_nnx.with_params(module, jc.materialize(small))(X)
    np.testing.assert_allclose(ready(X), want, rtol=1e-5, atol=1e-4)
    merged = nnx.merge(*nnx.split(ready))
    np.testing.assert_allclose(merged(X), want, rtol=1e-5, atol=1e-4)


def test_a_state_is_saved_as_its_values(mixed, tmp_path):
    module, _ = mixed
    rules = [("layer/kernel", "symmetric(bits=8)")]
    state = jc.compress(nnx.state(module, nnx.Param), rules)
    jc.save(tmp_path / "a", state)
    back = jc.load(tmp_path / "a")
    assert isinstance(back["layer"]["kernel"], jc.Quantized)
    want = running_nnx.with_params(module, state)(X)
    np.testing.assert_array_equal(running_nnx.with_params(module, back)(X), want)
    with pytest.raises(TypeError, match=r"params_of\(module\)"):
        jc.save(tmp_path / "b", {"module": module.layer})


class Pair(NamedTuple):
    first: nnx.Param
    second: nnx.Param


@struct.dataclass
class Fixed:
    kernel: nnx.Param


def holder(value):
    class Holder(nnx.Module):
        def __init__(self):
            self.held = nnx.data(value) if hasattr(nnx, "data") else value

    return Holder()


@pytest.mark.parametrize("make", [lambda *x: tuple(x), Pair])
def test_parameters_in_tuples_are_replaced(make):
    kernels = [nnx.Param(jnp.full((64, 64), float(i))) for i in range(2)]
    module = holder(make(*kernels))
    small = jc.compress(running_nnx.params_of(module), [(".*", "symmetric(bits=8)")])
    ready = running_nnx.with_params(module, small)
    assert type(ready.held) is type(module.held)
    for i in range(2):
        assert isinstance(running_nnx.stored(ready.held[i]), jc.Quantized)
        assert module.held[i] is kernels[i]
        np.testing.assert_allclose(ready.held[i][...], kernels[i][...], atol=0.02)


def test_a_container_that_cannot_be_written_is_an_error():
    module = holder(Fixed(nnx.Param(jnp.ones((4, 4)))))
    params = running_nnx.params_of(module)
    with pytest.raises(ValueError, match="held/kernel: its container"):
        running_nnx.with_params(module, params)

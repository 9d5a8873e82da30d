"""NNX modules with variables of their own types, in tuples, as states in files."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
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


class Layers(nnx.Module):
    """A quantized layer, one of factors, and statistics."""

    def __init__(self, rngs):
        self.codes = nnx.Linear(8, 8, rngs=rngs)
        self.factors = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.factors(jnp.tanh(self.codes(x)))))


ROWS = jax.random.normal(jax.random.key(3), (5, 8))
RECIPE = [("codes/kernel", "symmetric(bits=8)"), ("factors/kernel", "svd(rank=3)")]


def squares(module):
    return jnp.mean((module(ROWS) - 1) ** 2)


@pytest.mark.slow
def test_factors_train_with_the_optimizer_as_a_function_of_them_would():
    module = Layers(nnx.Rngs(0))
    small = jc.compress(running_nnx.params_of(module), RECIPE)
    ready = running_nnx.with_params(module, small)
    optimizer = running_nnx.Optimizer(ready, optax.adam(0.1))
    of = nnx.DiffState(0, running_nnx.trainable)
    for _ in range(2):
        optimizer.update(ready, nnx.grad(squares, argnums=of)(ready))
    kept, frozen = {}, {"codes": {"kernel": small["codes"]["kernel"]}}
    for name, layer in small.items():
        kept[name] = {k: x for k, x in layer.items() if k not in frozen.get(name, {})}

    def loss(kept):
        tree = {name: {**frozen.get(name, {}), **kept[name]} for name in kept}
        return squares(running_nnx.with_params(module, tree))

    plain = optax.adam(0.1)
    state = plain.init(kept)
    for _ in range(2):
        updates, state = plain.update(jax.grad(loss)(kept), state)
        kept = optax.apply_updates(kept, updates)
    got = running_nnx.params_of(ready)
    assert isinstance(got["factors"]["kernel"], jc.LowRank)
    chex.assert_trees_all_equal(got["codes"]["kernel"], small["codes"]["kernel"])
    chex.assert_trees_all_close(got["factors"], kept["factors"], rtol=1e-5)
    chex.assert_trees_all_close(got["codes"]["bias"], kept["codes"]["bias"], rtol=1e-5)
    assert squares(ready) < squares(running_nnx.with_params(module, small))


def test_a_part_of_a_compressed_parameter_cannot_be_set():
    module = Layers(nnx.Rngs(0))
    ready = running_nnx.with_params(
        module, jc.compress(running_nnx.params_of(module), RECIPE)
    )
    with pytest.raises(TypeError, match=r"cannot be set in part; .*with_params"):
        ready.codes.kernel[0] = 1.0
    ready.codes.kernel[...] = jnp.ones((8, 8))
    np.testing.assert_array_equal(running_nnx.params_of(ready)["codes"]["kernel"], 1.0)


def test_an_abstract_module_names_what_has_no_values():
    module = Layers(nnx.Rngs(0))
    small = jc.compress(running_nnx.params_of(module), RECIPE)
    shapes = nnx.eval_shape(lambda: Layers(nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="^norm/mean, norm/var: shapes without"):
        running_nnx.with_params(shapes, small)
    whole = jc.compress(
        running_nnx.params_of(module, (nnx.Param, nnx.BatchStat)), RECIPE
    )
    np.testing.assert_array_equal(
        running_nnx.with_params(shapes, whole)(ROWS),
        running_nnx.with_params(module, small)(ROWS),
    )


def test_a_state_with_random_keys_has_layouts():
    module = Layers(nnx.Rngs(0))
    layouts = jc.find_layouts(module, nnx.state(module), ROWS)
    assert list(layouts) == ["codes/kernel", "factors/kernel"]

"""Options with which a CPU dequantizes one layer after the other."""

import jax
import jax.numpy as jnp
import pytest

import jaxcompress as jc
from jaxcompress.running.compiling import compiler_options

LAYERS, WIDTH = 12, 128


def forward(weights, x):
    for weight in weights:
        x = jnp.tanh(x @ jc.materialize(weight))
    return x


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an option of XLA on CPUs")
def test_layers_wait_for_their_turn():
    weight = jc.symmetric(jnp.ones((WIDTH, WIDTH)), bits=8)
    weights, x = [weight] * LAYERS, jnp.ones((1, WIDTH))
    temporaries, results = {}, {}
    for name, options in {"default": None, "in order": compiler_options()}.items():
        program = jax.jit(forward, compiler_options=options).lower(weights, x).compile()
        temporaries[name] = program.memory_analysis().temp_size_in_bytes
        results[name] = program(weights, x)
    assert temporaries["in order"] <= temporaries["default"]
    assert temporaries["in order"] < 3 * 4 * WIDTH**2, temporaries
    assert jnp.array_equal(results["default"], results["in order"])


def test_other_devices_take_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiler_options() == {}

"""Memory of the process."""

import jax
import jax.numpy as jnp

from jaxcompress import reporting
from jaxcompress.memory import give_back_memory


def test_programs_are_dropped_only_where_asked():
    traced = []

    @jax.jit
    def double(x):
        traced.append(x)
        return 2 * x

    double(jnp.ones(2))
    give_back_memory(programs=False)
    double(jnp.ones(2))
    assert len(traced) == 1
    give_back_memory()
    assert (double(jnp.ones(2)) == 2).all()
    assert len(traced) == 2
    assert reporting.peak_memory() > 2**20
